"""Is a step taken, turned round or left? By the losses that it would lead to.

ZO-Bench's conservative ZO-SGD (arXiv 2402.11592), for each direction by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from zo_dist.anchor import Anchored
from zo_dist.curvature import Curvature
from zo_dist.estimators import Estimator
from zo_dist.rules import SGD, Rule


class Trials(Estimator):
    """Where the losses that are compared lie, in lengths of what a direction writes.

    At the write, at its opposite, and at the weights as they are.
    """

    signs = (-1.0, 1.0, 0.0)
    # Of equal ones the first is taken: a step that changes no loss is as good as any.
    _preferred = (0, 2, 1)

    def kept(self, losses: Tensor) -> list[float]:
        """What each direction's coefficient is multiplied by: 1, or -1 to turn it round, or 0 to leave it.

        `losses` float64 `[directions, 3]` in the order of `signs`. One that is not finite is never taken.
        """
        found = []
        for of_direction in losses.tolist():
            best = min(
                (side for side in self._preferred if math.isfinite(of_direction[side])),
                key=of_direction.__getitem__,
                default=self.signs.index(0.0),
            )
            found.append(0.0 - self.signs[best])
        return found


def require_trials(rule: Rule, curvature: Curvature, anchor: Anchored, estimator: Estimator) -> None:
    """Raise ValueError for parts that conservative steps do not go with."""
    but = "conservative is true, and trials are along what each direction writes by itself"
    if type(rule) is not SGD:
        raise ValueError(
            f"{but}, but rule is {type(rule).__name__}, whose moves are of other directions too: set rule to "
            "SGD (sgd), or conservative to false"
        )
    if curvature.used:
        raise ValueError(
            f"{but}, but there is a curvature, which a step changes before its write: leave it out, or set "
            "conservative to false"
        )
    if math.isfinite(estimator.clip_rows):
        raise ValueError(
            f"{but}, but clip_rows is {estimator.clip_rows}, and trials compare losses as they are: leave it "
            "out, or set conservative to false"
        )
    if anchor.every:
        raise ValueError(
            f"{but}, but there is an anchor, whose estimate is written too: leave it out, or set "
            "conservative to false"
        )


def require_fine_weights(dtypes: Iterable[torch.dtype]) -> None:
    """Raise ValueError for weights in which the trials of a step would all be the same weights."""
    for dtype in dtypes:
        if dtype != torch.float32:
            raise ValueError(
                f"conservative is true, but forwards take weights in {dtype}, whose steps are longer than "
                "what one update writes, so that trials would not differ: set the dtype (and compute_dtype, "
                "or the param_dtype of a mixed precision) to float32, or conservative to false"
            )
