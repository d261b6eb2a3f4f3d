"""The page: charts by plotly, in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zo_dist.report.chart import Bars, Chart, Heat, Line
from zo_dist.report.history import History
from zo_dist.report.pictures import COLOURS, GUIDE
from zo_dist.report.table import differing, faults, summary

_STYLES: dict[str, dict[str, Any]] = {
    "line": {"mode": "lines", "line": {"width": 2}},
    "faint": {"mode": "lines", "line": {"width": 1}, "opacity": 0.55},
    "points": {"mode": "lines+markers", "line": {"width": 1.5}, "marker": {"size": 7}},
    "squares": {"mode": "markers", "line": {}, "marker": {"size": 10, "symbol": "square"}},
    "dashes": {"mode": "lines", "line": {"width": 1.5, "dash": "dash"}},
}


def render(runs: Sequence[History], charts: Sequence[Chart]) -> str:
    """The HTML. Raises ValueError where plotly or jinja2 is not installed."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'zo_dist[report]'") from error
    found = [(chart, sentence) for chart in charts for sentence in chart.found]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("zo_dist.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        runs=runs,
        charts=[(chart, figure(chart).to_json()) for chart in charts],
        found=found,
        faults=faults(runs),
        summary=summary(runs),
        differing=differing(runs),
        plotly=get_plotlyjs(),
    )


def figure(chart: Chart) -> Any:
    """A chart as a plotly figure. A trace that can be drawn over time has both axes' values in its `meta`."""
    import plotly.graph_objects as go

    drawn = go.Figure(layout=go.Layout(template="none"))
    for mark in chart.marks:
        drawn.add_trace(_trace(go, mark))
    drawn.update_layout(
        height=max(
            380, 130 + 15 * max((len(mark.rows) for mark in chart.marks if isinstance(mark, Heat)), default=0)
        ),
        margin={"l": 70, "r": 20, "t": 20, "b": 50, "pad": 0},
        hovermode="closest",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
        barmode="stack" if any(isinstance(m, Bars) and m.part is not None for m in chart.marks) else "group",
        xaxis={"title": {"text": chart.x}, "automargin": True},
        yaxis={"title": {"text": chart.y}, "automargin": True, "type": "log" if chart.log_y else "-"},
    )
    if chart.log_y:
        drawn.update_yaxes(exponentformat="power", dtick=1)
    return drawn


def _trace(go: Any, mark: Line | Heat | Bars) -> Any:
    if isinstance(mark, Bars):
        colour = COLOURS[(mark.run if mark.part is None else mark.part) % len(COLOURS)]
        return go.Bar(name=mark.name, x=mark.labels, y=mark.values, marker={"color": colour})
    meta = {"step": list(mark.x), "seconds": list(mark.seconds)} if len(mark.seconds) else None
    if isinstance(mark, Heat):
        shown = {"colorscale": "Cividis", "zmin": 0.0, "colorbar": {"title": {"text": "p"}}}
        hover = "%{x}, %{y}: p = %{z:.3f}<extra></extra>"
        return go.Heatmap(x=mark.x, y=mark.rows, z=mark.z, meta=meta, hovertemplate=hover, **shown)
    style = dict(_STYLES[mark.style])
    colour = GUIDE if mark.run is None else COLOURS[mark.run % len(COLOURS)]
    style["line"] = {**style["line"], "color": colour}
    return go.Scatter(name=mark.name, x=mark.x, y=mark.y, meta=meta, connectgaps=False, **style)
