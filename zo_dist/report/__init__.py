"""`zo-dist report`: runs as one HTML page and pictures, from their folders alone.

history.py   what happened in a run: config, log, metrics, the sampler replayed
chart.py     what a chart is, before it is drawn
learning.py, costs.py, table.py   which there are: charts of learning, of time and memory; tables
page.py (page.html), pictures.py  drawn by plotly in a page, by matplotlib as PNGs
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_dist.files import write_whole
from zo_dist.report import costs, learning
from zo_dist.report.chart import Chart
from zo_dist.report.history import History
from zo_dist.report.page import render
from zo_dist.report.pictures import save
from zo_dist.report.table import faults
from zo_dist.resume import REPORT

PAGE = "report.html"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Write the report of the runs in these folders; returns the paths, and what was found.

    `out`: a folder, for the page and a PNG of each chart, or a file that ends in .html, for the page alone;
    None: the folder `report` in that of the first run. ValueError, before anything is written, for a folder
    that holds no whole run, and where plotly is not installed.
    """
    runs = [History(folder) for folder in folders]
    _name_apart(runs)
    charts = charts_of(runs)
    page = render(runs, charts)
    out = Path(folders[0]) / REPORT if out is None else Path(out)
    alone = out.suffix == ".html"
    path = out if alone else out / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode())
    pictures = (
        [] if alone else [str(save([chart], out / f"{chart.key}.png")) for chart in charts if chart.marks]
    )
    found = [sentence for chart in charts for sentence in chart.found]
    return {"page": str(path), "pictures": pictures, "found": found, "faults": len(faults(runs))}


def charts_of(runs: Sequence[History]) -> list[Chart]:
    """All charts, in the order of the page."""
    return [
        learning.loss(runs),
        learning.metrics(runs),
        *(learning.probabilities(run, number) for number, run in enumerate(runs, start=1)),
        learning.draws(runs),
        learning.slopes(runs),
        learning.distribution(runs),
        learning.sides(runs),
        learning.learning_rate(runs),
        costs.time_of_a_step(runs),
        costs.time_by_step(runs),
        costs.memory(runs),
    ]


def _name_apart(runs: Sequence[History]) -> None:
    """Name runs by their folders: the last part of the path where that tells them apart."""
    short = [run.folder.resolve().name for run in runs]
    for run, name in zip(runs, short, strict=True):
        run.name = name if short.count(name) == 1 else str(run.folder)
