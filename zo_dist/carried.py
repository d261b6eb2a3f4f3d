"""Directions that carry on from the one before: ZO-AdaMU (arXiv 2312.15184).

A number c for each weight, kept beside it: the last direction that was written, with the sign of what it was
multiplied by. The next direction is drawn around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.anchor import Anchored
from zo_dist.curvature import Curvature
from zo_dist.estimators import Estimator, TwoSided
from zo_dist.noise import Noise
from zo_dist.rules import Rule, square_root
from zo_dist.scale import cut
from zo_dist.steering import Drawing, Steering, drawing_of
from zo_dist.structure import Structure


@dataclass(frozen=True, kw_only=True, slots=True)
class PerturbationMomentum:
    """How much of a direction is new: ZO-AdaMU (arXiv 2312.15184). What it does is in `Carried`.

    `uncertainty` and `beta1` in (0, 1], `beta2` in [0, 1): what a, b1 and b2 come down to; `beta2` null does
    not divide. All three are 1 before step `begin`, and fall along half a cosine until step `end`. Defaults:
    the steps of the published code in a run of 20,000, and where its schedule ends for each of them if it is
    called once per step.
    """

    uncertainty: float = 0.01
    beta1: float = 0.13
    beta2: float | None = 0.01
    begin: int = 1024
    end: int = 16000

    def __post_init__(self) -> None:
        if not 0.0 < self.uncertainty <= 1.0:
            raise ValueError(
                f"uncertainty is {self.uncertainty}; it must lie in (0, 1]: with 0 nothing of x is left"
            )
        if not 0.0 < self.beta1 <= 1.0:
            raise ValueError(
                f"beta1 is {self.beta1}; it must lie in (0, 1]: with 0 directions grow without bound"
            )
        if self.beta2 is not None and not 0.0 <= self.beta2 < 1.0:
            raise ValueError(
                f"beta2 is {self.beta2}; it must lie in [0, 1), or be null: with 1 weights are divided by x "
                "alone, which is near 0 for some"
            )
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"begin is {self.begin} and end {self.end}; it must be 0 <= begin <= end")


class Carried(Steering):
    """c of the weights that this rank holds, 0 at the start.

    With z and z' two draws of noise, a direction u and what a write makes of all of them is

        x = sqrt(a) z        y = sqrt(1 - a) z' + c        u = b1 x + (1 - b1) y
        estimate = sum_d scale_d u_d / sqrt(b2 x_d**2 + (1 - b2) y_d**2 + 1e-8)
        c <- mean_d(sign(scale_d) u_d)

    over the directions that drew the arm and have a scale; where there are none c stays. u is what a probe
    shifts by. While a, b1 and b2 are 1 that is `z`, and what is written `scale sign(z)`; with b2 null it is
    MeZO, bit for bit. Later u is longer: with a mean square of
    `((1 - b1)**2 (1 - a) + b1**2 a) / (1 - (1 - b1)**2)` in a settled run of one direction, 3.1 by the
    defaults, so that `eps` is in effect 1.8 times as large.

    No gradient is carried: a slope enters c by its sign alone. In the mean of `g u` over noise c's part is
    `(1 - b1)**2 (c . gradient) c`, which goes downhill too. It wants two sides: of one the mean has a part of
    order eps along c, u not being as likely as -u.

    Cost: 4 bytes per parameter; once a is below 1 noise is drawn twice in a shift or a write, which make some
    10 and, for each direction, 20 passes in float32.

    Where we differ: the published code (MathIsAll/ZO-AdaMU, 5ee86f0) probes with x and y mixed 1 to 9
    whatever b1 is, so that it moves along what it has not tested; its one schedule, a cosine over a length
    that each call makes shorter by as much as the share asks for, is called three times for each parameter.
    That there may be several directions is ours.
    """

    setting = "perturbation_momentum"
    sums_noise = False

    def __init__(self, momentum: PerturbationMomentum | None = None) -> None:
        super().__init__()
        # Not used, unless a step is said; numbers, so that logs name them.
        self.begins, self.ends, self.uncertainty, self.beta1 = -1, -1, 1.0, 1.0
        self.beta2: float | None = None
        if momentum is not None:
            self.begins, self.ends = momentum.begin, momentum.end
            self.uncertainty, self.beta1, self.beta2 = momentum.uncertainty, momentum.beta1, momentum.beta2

    @property
    def used(self) -> bool:
        return self.begins >= 0

    def require(
        self,
        estimator: Estimator,
        curvature: Curvature,
        structure: Structure | None,
        rule: Rule,
        anchor: Anchored,
        conservative: bool,
    ) -> None:
        """Raise ValueError for parts that do not go with it."""
        if not self.used:
            return
        but = "there is a perturbation_momentum"
        if curvature.used:
            raise ValueError(
                f"{but}, and a curvature too: each of them says what a direction is. Leave out one of them"
            )
        if not isinstance(estimator, TwoSided):
            raise ValueError(
                f"{but}, but estimator is {type(estimator).__name__}: around the one before a direction is "
                "likelier than its opposite, and one side is off along it. Use TwoSided (estimator: "
                "two_sided), or leave it out"
            )
        if structure is not None:
            raise ValueError(
                f"{but}, but structure is {type(structure).__name__}: a direction around the one before has "
                "none. Leave out one of them"
            )
        if rule.factored:
            raise ValueError(
                f"{but}, but factored is true: u is no product of two sides, one of which could have "
                "moments. Set factored to false, or leave it out"
            )
        if anchor.every:
            raise ValueError(
                f"{but}, and an anchor too, whose directions were around others: leave out one of them"
            )
        if conservative:
            raise ValueError(
                f"{but}, but conservative is true, and trials lie along directions as they are tested, which "
                "beta2 divides in the write: leave it out, or set conservative to false"
            )

    def shares(self, step: int) -> tuple[float, float, float | None]:
        """a, b1 and b2 in a step; cut as factors are, for another machine's cosine."""
        done = (step - self.begins) / max(1, self.ends - self.begins)
        new = cut(0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0))))
        a, b1 = (least + (1.0 - least) * new for least in (self.uncertainty, self.beta1))
        return a, b1, None if self.beta2 is None else self.beta2 + (1.0 - self.beta2) * new

    def along(self, drawing: Drawing, kept: Tensor, name: str, step: int) -> Tensor:
        """u."""
        return self._mixed(drawing, kept, name, step)[2]

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
        """The estimate along u, and c for the next."""
        b2 = self.shares(step)[2]
        told, carried = [(d, scale) for d, scale in terms if scale], torch.zeros_like(kept)
        for direction, scale in told:
            x, y, u = self._mixed(drawing_of(noise, kept, step, direction, offset), kept, name, step)
            carried += u * math.copysign(1.0, scale)
            if b2 is not None:
                u /= square_root(x * x * b2 + y * y * (1.0 - b2) + 1e-8)
            estimate += u * scale
        if told:
            kept.copy_(carried / len(told))

    def _mixed(self, drawing: Drawing, kept: Tensor, name: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and u."""
        a, b1, _ = self.shares(step)
        z = drawing(name)
        y = kept.to(z.device)
        # Else nothing of it is drawn.
        if a < 1.0:
            y = drawing(f"{name}\0around") * math.sqrt(1.0 - a) + y
        x = z * math.sqrt(a)
        return x, y, x * b1 + y * (1.0 - b1)
