"""The tables of the page: what the runs are, how they differ, and what went wrong in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_dist.report.costs import OF_A_STEP, spent
from zo_dist.report.history import History
from zo_dist.tasks import get_task

# Differ between any two runs, and say nothing.
_OF_THE_FOLDER = ("train.output", "train.existing")


@dataclass(frozen=True, slots=True)
class Fault:
    """What interrupted a run, or that it had to leave out. `step`: after which; `lost`: what is gone."""

    run: str
    step: int
    time: str
    what: str
    lost: str


def summary(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Rows: a name, and a value for each run."""
    columns = [_summary_of(run) for run in runs]
    # Runs of other tasks have other metrics.
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "") for column in columns]) for name in names]


def _summary_of(run: History) -> dict[str, str]:
    settings, steps = run.config, run.of("step")
    scores = run.evals("test")
    last = run.processes[-1]
    peaks = [max(peak) for e in steps for peak in [e.get("host_peak")] if peak and None not in peak]
    seconds = run.seconds_at(len(run.records))
    return {
        "model": f"{settings.model.source}, {settings.model.dtype}",
        "task": f"{settings.data.task}, {settings.data.source}",
        "engine": f"{last.engine}, {last.ranks} rank{'s' * (last.ranks != 1)}",
        "method": f"{settings.optimizer.sampler.name}, {settings.optimizer.rule.name}, "
        f"{settings.optimizer.directions} directions, {settings.train.rows} rows",
        "lr, eps": f"{settings.optimizer.lr:g}, {settings.optimizer.eps:g}",
        "steps": str(len(run.records)),
        "training seconds": f"{seconds:.1f}",
        **{
            f"test {metric}": " to ".join(f"{100 * e[metric]:.1f}%" for e in scores if e[metric] is not None)
            for metric in get_task(settings.data.task).metrics
        },
        "test loss": " to ".join(f"{e['loss']:.4f}" for e in scores if e["loss"] is not None),
        "forward share": _share(spent(run)),
        "peak memory, host": f"{max(peaks) / 1e9:.2f} GB" if peaks else "not recorded",
        "processes": str(len(run.processes)),
    }


def _share(seconds: dict[str, float]) -> str:
    step = sum(seconds.get(part, 0.0) for part in OF_A_STEP)
    return f"{seconds['forward'] / step:.0%} of a step" if step else "not recorded"


def differing(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: a key, and each run's value."""
    settings = [run.config.flat() for run in runs]
    keys = list(dict.fromkeys(key for each in settings for key in each if key not in _OF_THE_FOLDER))
    rows = [(key, [str(each.get(key, "-")) for each in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def faults(runs: Sequence[History]) -> list[Fault]:
    """Ends that were no finish, what the next process found of them, skipped steps, a log cut short."""
    found: list[Fault] = []
    for run in runs:
        for process, after in zip(run.processes, [*run.processes[1:], None], strict=True):
            if process.ended == "finished":
                continue
            lost = []
            if after and after.torn_bytes:
                lost.append(
                    f"a record that was cut short ({after.torn_bytes} bytes): its step was taken again"
                )
            if after and after.lost_steps:
                lost.append(f"{after.lost_steps} steps that were not forced to the disk (train.sync_every)")
            if after is None and run.torn_bytes:
                lost.append(f"a record that is cut short ({run.torn_bytes} bytes), or is being written")
            said = process.ended or "no end is recorded: it was killed" + (
                ", or still runs" if after is None else ""
            )
            what = said + (f"; resumed at {after.time} on {after.ranks} ranks" if after else "")
            found.append(
                Fault(run.name, process.steps, process.time or "", what, "; ".join(lost) or "nothing")
            )
        skipped = "skipped: a loss was not finite", "the step; no weight was written"
        found += [Fault(run.name, step, "", *skipped) for step in run.skipped]
    return found
