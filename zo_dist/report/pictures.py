"""Charts as PNG files, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_dist.files import naming
from zo_dist.report import learning
from zo_dist.report.chart import Bars, Chart, Heat, Line
from zo_dist.report.history import History

# Told apart by those who see few colours (after Okabe and Ito), on white and on black.
COLOURS = ("#2f86d1", "#e0652b", "#1ba07a", "#c76bb0", "#c79200", "#5aa9c8", "#8a8f98", "#a0522d")
GUIDE = "#888888"

_STYLES: dict[str, dict[str, Any]] = {
    "line": {"lw": 1.4},
    "faint": {"lw": 0.6, "alpha": 0.6},
    "points": {"lw": 1.0, "marker": "o", "ms": 4},
    "squares": {"lw": 0.0, "marker": "s", "ms": 6},
    "dashes": {"lw": 1.0, "ls": "--"},
}


def draw_run(folder: Path) -> Path:
    """Draw loss and metrics against training time as `run.png` in a run's folder; returns its path."""
    run = History(folder)
    run.name = folder.name
    return save([learning.loss([run]), learning.metrics([run])], folder / "run.png", by_time=True)


def save(charts: Sequence[Chart], path: Path, *, by_time: bool = False) -> Path:
    """Charts beside each other as one PNG; returns `path`. `by_time`: x is seconds instead of steps."""
    # Slow to import; and no display is needed, whatever the user's default backend is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * max(len(charts), 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        draw(chart, axes, by_time)
    with naming(path):
        figure.savefig(path, dpi=120)
    return path


def draw(chart: Chart, axes: Any, by_time: bool) -> None:
    """Draw on the axes of a matplotlib figure."""
    bottoms: dict[str, float] = {}
    bars = [mark for mark in chart.marks if isinstance(mark, Bars)]
    for mark in chart.marks:
        if isinstance(mark, Line):
            colour = GUIDE if mark.run is None else COLOURS[mark.run % len(COLOURS)]
            x = mark.seconds if by_time and len(mark.seconds) else mark.x
            axes.plot(x, mark.y, color=colour, label=mark.name, **_STYLES[mark.style])
        elif isinstance(mark, Heat):
            x = mark.seconds if by_time and len(mark.seconds) else mark.x
            colours = axes.pcolormesh(x, range(len(mark.rows)), mark.z, vmin=0.0, shading="nearest")
            axes.figure.colorbar(colours, ax=axes, label="p")
            every = math.ceil(len(mark.rows) / 20)
            axes.set_yticks(range(0, len(mark.rows), every), list(mark.rows)[::every], fontsize=6)
        elif mark.part is not None:
            bottom = [bottoms.get(label, 0.0) for label in mark.labels]
            colour = COLOURS[mark.part % len(COLOURS)]
            axes.bar(mark.labels, mark.values, bottom=bottom, label=mark.name, color=colour)
            for label, value in zip(mark.labels, mark.values, strict=True):
                bottoms[label] = bottoms.get(label, 0.0) + value
        else:
            width = 0.8 / len(bars)
            places = [i + width * bars.index(mark) for i in range(len(mark.labels))]
            axes.bar(places, mark.values, width, label=mark.name, color=COLOURS[mark.run % len(COLOURS)])
            axes.set_xticks(range(len(mark.labels)), mark.labels, rotation=90, fontsize=6)
    if chart.log_y:
        axes.set_yscale("log")
    axes.set(title=chart.title, xlabel="training seconds" if by_time else chart.x, ylabel=chart.y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    if not any(isinstance(mark, Heat) for mark in chart.marks):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
