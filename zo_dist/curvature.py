"""How far each weight is perturbed, by the curvature of the loss along it: HiZOO (arXiv 2402.15173).

A number H > 0 for each weight, kept beside it. A direction is `z / sqrt(H)`, in probe and write alike, so a
weight along which the loss bends more is moved less. H itself is learnt from the losses that a step has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.estimators import Estimator, ThreeSided
from zo_dist.noise import Noise
from zo_dist.rules import Rule, square_root
from zo_dist.samplers import Sampler
from zo_dist.scale import Scale
from zo_dist.steering import Drawing, Steering, drawing_of
from zo_dist.trajectory import StepRecord

# H stays between these, so that neither it nor a direction becomes 0 or infinite, whatever losses say.
LOWEST, HIGHEST = 2.0**-64, 2.0**64


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagonalCurvature:
    """Perturbs and moves each weight by `z / sqrt(H)`: HiZOO (arXiv 2402.15173).

    `smoothing` in [0, 1): how much of H is new in a write. 1e-8 is that of the runs in AdaLeZO's paper; the
    commands of HiZOO's code have 1e-4 to 1e-10. 0 is MeZO, bit for bit, with a third forward.
    """

    smoothing: float = 1e-8

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing is {self.smoothing}; it must lie in [0, 1)")


class Curvature(Steering):
    """H of the weights that this rank holds: float32, 1 at the start, sharded as they are.

    Before a weight is written,

        H <- H + smoothing * (mean_d(c_d * z_d**2) - 1) * H        c_d = |L+ + L- - 2 L0| / (2 eps**2)

    over the directions that drew its arm, weighted by their rows; its estimate is then divided by the root of
    the new H. As c is not below 0, at least `1 - smoothing` of H is left, in exact numbers; in float32 it
    is also held between 2**-64 and 2**64, and a step with a c that is not finite is skipped. H of an arm that
    was not drawn stays as it is.

    With Gaussian noise, in a bowl of curvatures h over d weights, H settles around `(1 + d / 2) h`. With
    Rademacher noise z**2 is 1: H is then the same for all weights that were always drawn together, and no
    more than a step size for each arm. Cost: 4 bytes per parameter; a third side, so half as many rows of
    forward more; a weight is shifted and written in plain torch operations, some 10 passes in float32, and a
    write draws its noise twice. Changes of less than 2**-25 of H are lost, at 1e-8 those of `c z**2` below 4.

    Where we differ: `large_models/trainer.py` of the published code (34e8d14) perturbs by `z * sqrt(H)` and
    has `z**2 / H` in the mean, so that it goes further where the loss bends more. This is the form of the
    paper as summarised by others, its text being out of our reach, and of UnifiedZO's code.
    """

    setting = "curvature"
    begins_at = 1.0

    def __init__(self, diagonal: DiagonalCurvature | None = None) -> None:
        super().__init__()
        self.smoothing = None if diagonal is None else diagonal.smoothing

    @property
    def used(self) -> bool:
        return self.smoothing is not None

    def require(self, estimator: Estimator, scale: Scale, rule: Rule, sampler: Sampler) -> None:
        """Raise ValueError unless the estimator tells curvatures if, and only if, they are asked for.

        And for parts that do not go with a curvature.
        """
        if self.used and not isinstance(estimator, ThreeSided):
            raise ValueError(
                f"estimator is {type(estimator).__name__}; a curvature is told by losses at both shifts and "
                "at none, so use ThreeSided (estimator: three_sided), or leave out the curvature"
            )
        if not self.used and isinstance(estimator, ThreeSided):
            raise ValueError(
                "estimator is ThreeSided (three_sided), and without a curvature nothing uses its third side: "
                "use TwoSided (two_sided), or set curvature"
            )
        if self.used and type(scale) is not Scale:
            raise ValueError(
                f"scale is {type(scale).__name__}, but there is a curvature too: both say how far a weight "
                "is perturbed, and H would learn to undo the scale. Leave out one of them"
            )
        if self.used and sampler.weigh == "both":
            raise ValueError(
                f"sampler is {type(sampler).__name__}, which weighs probe and update, but there is a "
                "curvature too: H would take an arm that is perturbed farther for one where the loss bends "
                "more. Use a sampler that weighs the update alone, or leave out the curvature"
            )
        if self.used and rule.factored:
            raise ValueError(
                "factored is true, but there is a curvature too: z / sqrt(H) is no product of two sides, one "
                "of which could have a momentum; set factored to false, or leave out the curvature"
            )

    def along(self, drawing: Drawing, kept: Tensor, name: str, step: int) -> Tensor:
        """`z / sqrt(H)`."""
        z = drawing(name)
        z /= square_root(kept).to(z.device)
        return z

    def bends(self, record: StepRecord) -> Mapping[int, list[tuple[int, float]]]:
        """For each arm that was drawn, `(direction, c)`, c being times its share of the rows that did."""
        if not self.used:
            return {}
        of_arms = {}
        for arm, drawn in record.terms.items():
            total = sum(record.curvatures[direction][1] for direction, _ in drawn)
            shared = [(direction, *record.curvatures[direction]) for direction, _ in drawn]
            of_arms[arm] = [(direction, c * weight / total) for direction, c, weight in shared]
        return of_arms

    def steer(
        self,
        estimate: Tensor,
        kept: Tensor,
        noise: Noise,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        bends: Sequence[tuple[int, float]],
        offset: int,
    ) -> None:
        """Learn H, and then `estimate / sqrt(H)`."""
        assert self.smoothing is not None
        growth = torch.full_like(kept, -self.smoothing)
        for direction, c in bends:
            z = drawing_of(noise, kept, step, direction, offset)(name)
            growth += (z * z) * (self.smoothing * c)
        kept.add_(kept * growth).clamp_(LOWEST, HIGHEST)
        estimate /= square_root(kept)
