"""Charts of what a run cost: time and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from zo_dist.report.chart import Bars, Chart, Style
from zo_dist.report.history import History, line

# Of a step, in its order, and between steps; `rest` is what none of these is.
OF_A_STEP = ("data", "perturb", "forward", "agree", "update")
_BETWEEN = ("evaluate", "save")
PARTS = (*OF_A_STEP, *_BETWEEN, "rest")

_WAITING, _SLOWER, _GROWN, _APART = 0.2, 1.3, 1.1, 1.25


def spent(run: History) -> dict[str, float]:
    """Seconds of the whole run by what they were spent on; empty where the metrics do not tell."""
    told = [e["spent"] for e in run.of("step") if "spent" in e]
    if not told:
        return {}
    total = {part: math.fsum(e.get(part, 0.0) for e in told) for part in PARTS}
    total["rest"] = max(0.0, run.seconds_at(len(run.records)) - math.fsum(total.values()))
    return total


def time_of_a_step(runs: Sequence[History]) -> Chart:
    totals = [spent(run) for run in runs]
    found = []
    for run, total in zip(runs, totals, strict=True):
        whole = math.fsum(total.values()) or 1.0
        if total.get("agree", 0.0) / whole > _WAITING:
            found.append(
                f"{run.name}: {total['agree'] / whole:.0%} of the time the first rank waits for others."
            )
        if total.get("evaluate", 0.0) / whole > 0.5:
            found.append(f"{run.name}: {total['evaluate'] / whole:.0%} of the time goes to evaluations.")
    marks = []
    for part, name in enumerate(PARTS):
        values = [
            1000.0 * total.get(name, 0.0) / max(len(run.records), 1)
            for run, total in zip(runs, totals, strict=True)
        ]
        labels = [run.name for run in runs]
        marks.append(Bars(name=name, labels=labels, values=values, run=0, part=part))
    return Chart(
        key="time",
        title="Where a step's time goes",
        x="",
        y="milliseconds per step",
        marks=marks if any(totals) else (),
        found=found,
        shows="Means over the run, of the first rank's clock: shifting weights (perturb), the rest of the "
        "forwards, exchanging scalars, which is mostly waiting (agree), writing weights (update), and what "
        "is between steps. On an accelerator the clock sees perturb and update only until they are started; "
        "the rest of them is in forward.",
        worrying="much agree: ranks have unequal work, or one is slow. Much evaluate or save: do it less "
        "often.",
    )


def time_by_step(runs: Sequence[History]) -> Chart:
    marks = []
    found = []
    for number, run in enumerate(runs):
        x, y, before = [], [], (0.0, 0.0)
        for event in run.of("step"):
            step, seconds = float(event["step"]), float(event["seconds"])
            between = math.fsum(event.get("spent", {}).get(part, 0.0) for part in _BETWEEN)
            if step > before[0]:
                x.append(step)
                y.append(max(0.0, seconds - before[1] - between) / (step - before[0]))
            before = step, seconds
        marks.append(line(run, number, "", x, y))
        quarter = len(y) // 4
        if quarter >= 10:
            early, late = statistics.median(y[:quarter]), statistics.median(y[-quarter:])
            if late > _SLOWER * early:
                found.append(
                    f"{run.name}: steps took {early:.3g} s in the first quarter, {late:.3g} s in the last."
                )
    return Chart(
        key="seconds",
        title="Seconds per step",
        y="seconds",
        marks=marks,
        found=found,
        shows="How long each step took, without evaluations and saves.",
        worrying="a line that climbs, or spikes at regular distances: another job, a full memory, or longer "
        "rows.",
    )


def memory(runs: Sequence[History]) -> Chart:
    marks = []
    found = []
    for number, run in enumerate(runs):
        for key, what in (("host_peak", "host"), ("accelerator_peak", "accelerator")):
            told = [(float(e["step"]), e[key]) for e in run.of("step") if e.get(key) and None not in e[key]]
            if not told:
                continue
            x = [step for step, _ in told]
            most = [max(ranks) / 1e9 for _, ranks in told]
            least = [min(ranks) / 1e9 for _, ranks in told]
            lines: list[tuple[str, list[float], Style]] = [("largest rank", most, "line")]
            lines += [("smallest rank", least, "dashes")] if most != least else []
            for name, y, style in lines:
                marks.append(line(run, number, f"{what}, {name}", x, y, style))
            # Of one process: the next one's peak is another.
            mine = [gb for (step, _), gb in zip(told, most, strict=True) if step > run.processes[-1].began]
            if len(mine) >= 20 and mine[-1] > _GROWN * mine[len(mine) // 2]:
                found.append(
                    f"{run.name}: the {what}'s peak went on growing, to {mine[-1]:.2f} GB after "
                    f"{mine[len(mine) // 2]:.2f} at half the steps."
                )
            if most[-1] > _APART * least[-1]:
                found.append(
                    f"{run.name}: one rank needed {most[-1]:.2f} GB of the {what}, another {least[-1]:.2f}."
                )
    return Chart(
        key="memory",
        title="Peak memory",
        y="GB",
        marks=marks,
        found=found,
        shows="The most that a rank's process had resident, and that its accelerator's allocator had given "
        "out, since the process began, loading included.",
        worrying="a line that goes on climbing: something is kept; or ranks far apart.",
    )
