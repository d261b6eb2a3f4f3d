"""What a chart is, before it is drawn: by plotly in the page, by matplotlib as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# Points of a line, columns of a heat map: more are not told apart on a screen.
MOST = 1000

Style = Literal["line", "faint", "points", "squares", "dashes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line, or points. `run`: the number of the run, which its colour is of; None: a guide, in grey.

    `x` is steps; `seconds`, if there are any, is the same points in training time. nan is a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    run: int | None
    seconds: Sequence[float] = ()
    style: Style = "line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Colours of `z`, `[len(rows), len(x)]`, from 0 up."""

    rows: Sequence[str]
    x: Sequence[float]
    z: Sequence[Sequence[float]]
    seconds: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """A bar for each of `labels`. `run`: as of a line. Those with a `part` are stacked, a colour for each."""

    name: str
    labels: Sequence[str]
    values: Sequence[float]
    run: int
    part: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure. `shows`: what one sees; `worrying`: what would be; `found`: what of that was found here."""

    key: str
    title: str
    y: str
    shows: str
    worrying: str
    x: str = "step"
    marks: Sequence[Line] | Sequence[Bars] | Sequence[Heat] = ()
    found: Sequence[str] = field(default_factory=list)
    log_y: bool = False

    @property
    def timed(self) -> bool:
        """Can its x axis be training time?"""
        return any(not isinstance(mark, Bars) and len(mark.seconds) for mark in self.marks)


def thinned(values: Sequence[float], most: int = MOST) -> list[float]:
    """At most `most` numbers: means of neighbours, nan left out. Lists of one length are cut alike."""
    if len(values) <= most:
        return list(values)
    return [mean(values[a:b]) for a, b in bins(len(values), most)]


def bins(count: int, most: int) -> list[tuple[int, int]]:
    """`range(count)` cut into at most `most` pieces of nearly equal length."""
    pieces = min(count, most)
    return [(i * count // pieces, (i + 1) * count // pieces) for i in range(pieces)]


def mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan
