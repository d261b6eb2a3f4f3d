"""From the losses of a step's probes to one slope per direction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_dist.part import Part


class Estimator(Part):
    """What all share: the difference of the losses at two shifts, over their distance.

    `signs`: where the probes of a direction lie, in `eps` along it, two or more; the slope is between the
    first two. `clip_rows`: the slope of each
    row by itself is cut to `[-clip_rows, clip_rows]` before rows are added up, so that none counts for
    more: DPZero (arXiv 2310.09639), DP-ZO (2401.04343). The noise that would make it private, and the
    accounting, are not here. It needs one loss per row, so `ZeroOrder.step_batch`.
    """

    signs: tuple[float, ...]

    def __init__(self, clip_rows: float = math.inf) -> None:
        if not clip_rows > 0.0:
            raise ValueError(f"clip_rows is {clip_rows}; it must be above 0 (.inf does not clip)")
        self.clip_rows = clip_rows

    def distance(self, eps: float) -> float:
        """Between the two shifts, in lengths of the noise: the losses differ by the slope times this."""
        return (self.signs[0] - self.signs[1]) * eps

    def slopes(self, losses: Tensor, eps: float) -> Tensor:
        """`losses` float64 `[directions, sides]` in the order of `signs`; returns `[directions]`."""
        return (losses[:, 0] - losses[:, 1]) / self.distance(eps)

    def curvatures(self, losses: Tensor, eps: float) -> Tensor:
        """`losses` as in `slopes`; of those that tell it, `[directions]`: how the loss bends along each."""
        return losses.new_empty(0)

    def clipped(self, sides: Sequence[Tensor], eps: float) -> list[Tensor]:
        """Sums and weights `[rows, 2]` of the same rows at each side, slopes cut, means kept."""
        first, second, *others = sides
        if self.clip_rows == math.inf:
            return list(sides)
        limit = self.clip_rows * self.distance(eps)
        # A row of no weight has no loss to clip.
        weights = torch.where(first[:, 1] > 0, first[:, 1], 1.0)
        middle = (first[:, 0] + second[:, 0]) / 2.0
        half = ((first[:, 0] - second[:, 0]) / weights).clamp(-limit, limit) * weights / 2.0
        return [
            torch.stack([middle + half, first[:, 1]], dim=1),
            torch.stack([middle - half, second[:, 1]], dim=1),
            *others,
        ]


class TwoSided(Estimator):
    """`(L(w + eps z) - L(w - eps z)) / (2 eps)`: SPSA (Spall 1992), as in MeZO. Two forwards.

    The antithetic pair cancels the even orders of the loss.
    """

    signs = (1.0, -1.0)


class OneSided(Estimator):
    """`(L(w + eps z) - L(w)) / eps`. The unshifted probes of all directions share clean weights.

    Off by `eps / 2 * z.Hz` along a direction z, with H the Hessian. That has the same sign along -z, so the
    mean of `slope * z` is that of `TwoSided`, with more variance; what is made of slopes by their sign or
    size (coefficients, AdaLeZO's scores) does see it. Perturbs half as many copies.
    """

    signs = (1.0, 0.0)


class ThreeSided(Estimator):
    """The slope of `TwoSided`, and the curvature `|L(w + eps z) + L(w - eps z) - 2 L(w)| / (2 eps^2)`.

    Three forwards. The third, at unshifted weights, is for the curvature alone (HiZOO, arXiv 2402.15173), so
    that without a `Curvature` it is refused. Along a direction z the curvature is `|z.Hz| / 2`, with H the
    Hessian.
    """

    signs = (1.0, -1.0, 0.0)

    def curvatures(self, losses: Tensor, eps: float) -> Tensor:
        return (losses[:, 0] + losses[:, 1] - 2.0 * losses[:, 2]).abs() / (2.0 * eps * eps)
