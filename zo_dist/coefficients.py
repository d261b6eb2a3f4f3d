"""From the slopes of a step's directions to the coefficients of the update.

A function of scalars that are the same on every rank, and so is its state. Samplers learn from the
slopes themselves, whose sizes tell which arms matter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from zo_dist.part import Part


class Coefficients(Part):
    """What all forms share; in this one, `Raw`, coefficients are the slopes.

    `bind` is called once, by `ZeroOrder`, and raises ValueError if a step has too few directions.
    """

    def bind(self, directions: int) -> None:
        pass

    def of(self, slopes: Sequence[float]) -> list[float]:
        """One coefficient for each slope (loss per parameter unit). Not finite where a slope is not."""
        return list(slopes)

    def observe(self, slopes: Sequence[float]) -> None:
        """Learn from a step that was written."""


class Raw(Coefficients):
    """The slopes as they are: MeZO."""


class SignOnly(Coefficients):
    """The sign of each slope: ZO-Bench's form of ZO-SignSGD (arXiv 2402.11592).

    One bit per direction, and no outlier of the loss weighs more than another row. `rules.Sign` takes
    the sign of each weight's estimate instead; with one direction and Rademacher noise they agree.
    """

    def of(self, slopes: Sequence[float]) -> list[float]:
        return [slope if math.isnan(slope) else float((slope > 0) - (slope < 0)) for slope in slopes]


class Clip(Coefficients):
    """Each slope, cut to `[-limit, limit]`: as QZO does (arXiv 2505.13430, there 100). `limit` > 0."""

    def __init__(self, limit: float = 100.0) -> None:
        if not limit > 0.0:
            raise ValueError(f"limit is {limit}; it must be above 0")
        self.limit = limit

    def of(self, slopes: Sequence[float]) -> list[float]:
        # min and max of a NaN depend on the order of their arguments; one has to come through.
        return [s if math.isnan(s) else max(-self.limit, min(self.limit, s)) for s in slopes]


class RootMeanSquare(Coefficients):
    """Slopes over the root of a running mean of their squares, one scalar: MEAZO (arXiv 2605.03869).

    `beta` in [0, 1): how much of the mean stays in a step; of `beta` the paper's value was not to be
    found. `floor` > 0 is added to the root. The step's own slopes are in the mean, and its bias of
    starting at 0 is corrected, as in Adam.
    """

    def __init__(self, beta: float = 0.99, floor: float = 1e-8) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta is {beta}; it must lie in [0, 1)")
        if not floor > 0.0:
            raise ValueError(f"floor is {floor}; it must be above 0")
        self.beta, self.floor = beta, floor
        self._state = {"mean": 0.0, "steps": 0.0}

    def _next(self, slopes: Sequence[float]) -> dict[str, float]:
        square = math.fsum(s * s for s in slopes) / len(slopes)
        mean = self.beta * self._state["mean"] + (1.0 - self.beta) * square
        return {"mean": mean, "steps": self._state["steps"] + 1.0}

    def of(self, slopes: Sequence[float]) -> list[float]:
        if not all(map(math.isfinite, slopes)):
            return [math.nan] * len(slopes)
        after = self._next(slopes)
        root = math.sqrt(after["mean"] / (1.0 - self.beta ** after["steps"])) + self.floor
        return [slope / root for slope in slopes]

    def observe(self, slopes: Sequence[float]) -> None:
        self._state = self._next(slopes)

    def state_dict(self) -> dict[str, float]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, float]) -> None:
        if set(state) != set(self._state):
            raise ValueError(f"RootMeanSquare's state holds mean and steps; got {sorted(state)}")
        self._state = {key: float(value) for key, value in state.items()}


# Of the largest slope: what deviation is no difference.
_EQUAL = 1e-6


class Standardise(Coefficients):
    """Slopes over their standard deviation in the step: needs at least 2 directions.

    As they are, they make FZOO (arXiv 2506.09034), with one-sided directions: no `eps` is left in the
    update, which so has the size of a normalised step. So they do GRZO (arXiv 2606.02857), with two sides.
    `centre`: with their mean taken off, the z-scores of evolution strategies (arXiv 2509.24372). All 0 where
    slopes are equal, or so within a millionth. Without `centre` take 4 directions or more: the deviation of 2
    or 3 slopes is close to 0 every so often, and the step then 10 to 100 times as large.
    """

    def __init__(self, centre: bool = False) -> None:
        self.centre = centre

    def bind(self, directions: int) -> None:
        if directions < 2:
            raise ValueError(
                f"directions is {directions}; Standardise needs at least 2, to have a deviation of slopes"
            )

    def of(self, slopes: Sequence[float]) -> list[float]:
        if not all(map(math.isfinite, slopes)):
            return [math.nan] * len(slopes)
        deviation, mean = statistics.pstdev(slopes), statistics.fmean(slopes)
        # Equal but for the rounding of float32 scores, or of means of a few rows.
        if deviation <= _EQUAL * max(map(abs, slopes)):
            return [0.0] * len(slopes)
        return [(slope - mean if self.centre else slope) / deviation for slope in slopes]
