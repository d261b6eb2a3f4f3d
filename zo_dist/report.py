"""The picture of a run: loss and metrics against training time."""

from __future__ import annotations

from pathlib import Path

from zo_dist.files import naming
from zo_dist.runlog import read_metrics

# Of the tasks, in `zo_dist.tasks`.
METRICS_OF_EVALS = ("accuracy", "f1", "em")


def plot_run(folder: Path) -> Path:
    """Draw `metrics.jsonl` of a run's folder as `run.png` beside it; returns the picture's path."""
    # Slow to import; and no display is needed, whatever the user's default backend is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(folder)
    steps = [r for r in records if r["event"] == "step" and r["loss"] is not None]
    evals = {
        split: [r for r in records if r["event"] == "eval" and r["split"] == split]
        for split in ("validation", "test")
    }
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([r["seconds"] for r in steps], [r["loss"] for r in steps], lw=0.6, alpha=0.6, label="step")
    for split, marker in (("validation", "o-"), ("test", "s")):
        times = [r["seconds"] for r in evals[split]]
        left.plot(times, [r["loss"] for r in evals[split]], marker, ms=4, label=split)
        for metric in [key for key in METRICS_OF_EVALS if evals[split] and key in evals[split][0]]:
            shares = [100 * r[metric] for r in evals[split]]
            right.plot(times, shares, marker, ms=4, label=f"{split} {metric}")
    left.set(xlabel="training seconds", ylabel="cross-entropy")
    right.set(xlabel="training seconds", ylabel="%")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = folder / "run.png"
    with naming(path):
        figure.savefig(path, dpi=120)
    return path
