"""A plan as people read it: tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from zo_dist.planning.dry_run import NOT_RUN, TOLERANCE, Stepped
from zo_dist.planning.plan import Plan, Planned

_NUMBERS = ("weights", "gathered", "scratch", "activations", "logits", "kept", "total")


def show(plan: Plan, console: Console) -> None:
    """Print the model, a row for each mode, what is assumed, and what is recommended."""
    facts, cluster = plan.facts, plan.cluster
    tied = ", tied embeddings" if facts["tied"] else ""
    console.print(
        f"[bold]{facts['source']}[/bold]: {facts['parameters']:,} parameters{tied}, {facts['dtype']}, "
        f"{facts['layers']} layers; {facts['trained']:,} trained in {facts['arms']} arms"
    )
    console.print(
        f"{cluster.count} x {cluster.kind}, {cluster.nodes} node(s) of {cluster.per_node}; a step: "
        f"{facts['rows']} rows of {facts['length']} tokens, {facts['directions']} direction(s), sampler "
        f"{facts['sampler']}, rule {facts['rule']}; on the busiest rank {facts['forwards']} forward(s) of "
        f"{facts['rows_of_a_forward']} row(s)"
    )
    console.print("[bold]Computed from shapes, not measured.[/bold]")
    table = Table(title="GiB on each GPU, and what a step takes", title_justify="left")
    table.add_column("mode")
    table.add_column("perturb")
    for name in _NUMBERS:
        table.add_column(name, justify="right")
    table.add_column("fits")
    table.add_column("GB received", justify="right")
    table.add_column("gathers", justify="right")
    table.add_column("seconds", justify="right")
    for planned in plan.modes:
        style = "bold" if planned is plan.recommended else None if planned.fits else "dim"
        table.add_row(*_cells(planned), style=style)
    console.print(table)
    for planned in plan.modes:
        if planned.refused:
            console.print(f"{planned.name}, perturb {planned.mode.perturb}: refused. {planned.refused}")
    for planned in plan.modes:
        if planned.memory and planned.memory.host:
            host = planned.memory.host / 2**30
            console.print(
                f"{planned.name}, perturb {planned.mode.perturb}: {host:.0f} GiB in each node's own memory"
            )
    console.print("kept: the state of the rule and such, what kahan keeps, the snapshot of perturb: shard")
    console.print("total: the larger of the forward, which has the columns before it, and of the write")
    console.print("seconds: gathers hidden behind computing, to nothing hidden. Assumed:")
    for line in plan.assumed:
        console.print(f"  - {line}")
    chosen = plan.recommended
    if chosen is None:
        console.print(
            "[bold]Nothing fits.[/bold] Try more GPUs, fewer rows of a forward (train.micro_rows), shorter "
            "rows, or a rule without state"
        )
    else:
        console.print(f"[bold]Recommended: {chosen.name}, perturb: {chosen.mode.perturb}[/bold]")


def show_stepped(stepped: Sequence[Stepped], console: Console) -> None:
    """Print what each mode's dry run did, beside what was planned."""
    table = Table(title="Dry run: a step of the code itself, without values, as rank 0", title_justify="left")
    table.add_column("mode")
    table.add_column("perturb")
    for name in ("gathers", "elements gathered", "of its own", "exchanges", "scalar bytes", "GiB", "planned"):
        table.add_column(name, justify="right")
    table.add_column("as planned")
    table.add_column("took", justify="right")
    for each in stepped:
        wrong = ", ".join(f"{k}: planned {planned:,}" for k, (_, planned) in each.differing.items())
        table.add_row(
            each.planned.name,
            each.planned.mode.perturb,
            *(f"{number:,}" for number in each.traffic.values()),
            *(f"{size / 2**30:.2f}" for size in (each.bytes, each.planned_bytes)),
            wrong or "yes",
            f"{each.seconds:.0f} s",
        )
    console.print(table)
    console.print(f"as planned: traffic exactly, GiB of forwards within {TOLERANCE:.0%}; {NOT_RUN}")


def _cells(planned: Planned) -> list[str]:
    memory, sent, taken = planned.memory, planned.traffic, planned.seconds
    if memory is None or sent is None or taken is None:
        return [planned.name, planned.mode.perturb, *["-"] * len(_NUMBERS), "refused"]
    kept = memory.state + memory.lost + memory.snapshot
    parts = memory.weights, memory.gathered, memory.scratch, memory.activations, memory.logits, kept
    return [
        planned.name,
        planned.mode.perturb,
        *(f"{size / 2**30:.2f}" for size in (*parts, memory.total)),
        "yes" if planned.fits else "no",
        f"{sent.received / 1e9:.1f}",
        str(sent.gathers),
        f"{taken.hidden:.2g} - {taken.apart:.2g}",
    ]
