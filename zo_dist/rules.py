"""How directions and coefficients become a move of the weights: SGD, Momentum, Adam, Sign.

Every rule writes `w <- (1 - lr * weight_decay) * w - lr * move`, where `move` is a function, element by
element, of the estimate (the sum over directions of scale * z) and of what the rule keeps beside each
weight. That loop, and the rounding, are in update.py; a rule says what the move is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from zo_dist.params import Span
from zo_dist.part import Part

log = logging.getLogger(__name__)

Moment = Literal["estimate", "momentum"]


class Rule(Part):
    """What all rules share; `Momentum` is the simplest that keeps something.

    `keeps`: names of the float32 tensors that are kept beside each weight (4 bytes per parameter each),
    sharded as the weight is and zero at the start. `factored`: in a matrix whose noise has two sides, the
    rule moves what a step draws of them (`Noise.factor`), and keeps tensors of its shape; the weights' move
    is made of these. `lasting`: what it does not draw is to last for the run. As in MeZO, `weight_decay`
    leaves biases and norms alone (here: every parameter of fewer than two dimensions).
    Under a sampler, weights that were not drawn do not decay, and what is kept of them stays as it is.
    """

    keeps: tuple[str, ...] = ()
    factored: bool = False
    lasting: bool = False

    def __init__(self, weight_decay: float = 0.0) -> None:
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay is {weight_decay}; it must be finite and at least 0")
        self.weight_decay = weight_decay
        self.kept: dict[str, dict[str, Tensor]] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        """Make what is kept, by its name and that of the weight: called once, by `ZeroOrder`.

        `spans`: what is moved (see `Noise.factor_span`).
        """
        self.places = {span.name: (span.offset, span.runs) for span in spans}
        self.kept = {
            key: {span.name: torch.zeros_like(span.flat, dtype=torch.float32) for span in spans}
            for key in self.keeps
        }

    def remaining(self, lr: float, shape: torch.Size) -> float:
        """The share of a weight that decay leaves, in a parameter of this shape."""
        return 1.0 - lr * self.weight_decay if len(shape) > 1 else 1.0

    def warn_of_no_decay(self, lr: float) -> None:
        """Tell where so small a share decays in a step that float32 has no such number."""
        if 0.0 < lr * self.weight_decay < 2.0**-25:
            log.warning(
                "weight_decay %g does nothing at lr %g: their product is below 3e-8, and weights are "
                "multiplied by 1 less that in float32; raise it, or set it to 0",
                self.weight_decay,
                lr,
            )

    def move(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> Tensor:
        """The move, float32 like `estimate`, which may be overwritten; brings `kept` up to date in place.

        `writes`: how often these weights have been written, this time included.
        """
        raise TypeError(f"{type(self).__name__} does not say how weights move; override move")


class SGD(Rule):
    """`move = estimate`: MeZO's rule, no state."""

    def move(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> Tensor:
        return estimate


class Momentum(Rule):
    """`m <- beta * m + estimate; move = m`, as torch's SGD with momentum (ZO-Bench, arXiv 2402.11592).

    `beta` in [0, 1); the move grows to 1 / (1 - beta) estimates. Keeps one tensor.

    `factored`, for noise of low rank alone: of a matrix, rank numbers per row are kept: LOZO-M (arXiv
    2410.07698). While a right side lasts the moves are the same. One that is new takes over what it can of
    the momentum: of that of LOZO a share of some `sqrt(rank / columns)`, so this is nearly a new start. Of
    fixed sides, rank numbers per matrix are all: TeZO-m (arXiv 2501.19057).
    """

    keeps = ("momentum",)

    def __init__(self, beta: float = 0.9, weight_decay: float = 0.0, factored: bool = False) -> None:
        super().__init__(weight_decay)
        self.beta, self.factored = _share("beta", beta), factored
        if factored:
            # Another name, for a snapshot of one form is none of the other.
            self.keeps = ("factored_momentum",)

    def move(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> Tensor:
        return kept[0].mul_(self.beta).add_(estimate)


class Adam(Rule):
    """Adam on the estimate; `amsgrad=True` is ZO-AdaMM (arXiv 1910.06513).

    `second`: what the second moment is of, the `estimate` as in Adam or the `momentum`, whose variance
    is lower (R-AdaZO, arXiv 2502.01014). `beta1`, `beta2` in [0, 1); `eps` >= 0. Keeps two tensors, with
    `amsgrad` three. Moments of a weight count its own writes, so that a bias is corrected under any
    sampler.

    `factored`, for noise of low rank with fixed sides alone: of a matrix, both moments of the rank numbers
    that a step draws are kept: TeZO-Adam (arXiv 2501.19057). The first makes the momentum as it would be, the
    second the sum of the products' squares, without their products with each other, whose mean is small
    (docs/methods.md, Rules). With rank 1 it is Adam. Not with `amsgrad` or `second="momentum"`.
    """

    lasting = True

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        second: Moment = "estimate",
        amsgrad: bool = False,
        weight_decay: float = 0.0,
        factored: bool = False,
    ) -> None:
        super().__init__(weight_decay)
        self.beta1, self.beta2 = _share("beta1", beta1), _share("beta2", beta2)
        if not 0.0 <= eps < math.inf:
            raise ValueError(f"eps is {eps}; it must be finite and at least 0")
        if second not in get_args(Moment):
            raise ValueError(f"second is {second!r}; use one of {', '.join(get_args(Moment))}")
        if factored and (amsgrad or second != "estimate"):
            raise ValueError(
                f"factored is true, but amsgrad is {amsgrad} and second {second!r}: what is kept of a factor "
                "is the second moment of its estimate; set amsgrad to false and second to estimate, or "
                "factored to false"
            )
        self.eps, self.second, self.amsgrad, self.factored = eps, second, amsgrad, factored
        self.keeps = ("momentum", "second", "highest") if amsgrad else ("momentum", "second")
        if factored:
            self.keeps = ("factored_momentum", "factored_second")

    def move(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> Tensor:
        return self.quotient(*self.moments(estimate, kept, writes))

    def moments(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> tuple[Tensor, Tensor]:
        """Both, bias corrected; brings `kept` up to date."""
        # No lerp, addcmul or alpha: fused multiply-adds round otherwise at the ends of a tensor.
        momentum = kept[0].mul_(self.beta1).add_(estimate * (1.0 - self.beta1))
        unbiased = momentum / (1.0 - self.beta1**writes)
        seen = estimate if self.second == "estimate" else unbiased
        second = kept[1].mul_(self.beta2).add_(seen * seen * (1.0 - self.beta2))
        if self.amsgrad:
            second = torch.maximum(second, kept[2], out=kept[2])
        return unbiased, second / (1.0 - self.beta2**writes)

    def quotient(self, momentum: Tensor, second: Tensor) -> Tensor:
        """The move, of both moments of a weight."""
        root = square_root(second).add_(self.eps)
        # Where both moments are 0 there is nowhere to go, whatever eps is.
        return torch.where(root == 0.0, 0.0, momentum / root)


class Sign(Rule):
    """`move = sign(estimate)`, for each weight by itself: ZO-SignSGD (Liu et al. 2019). No state.

    `coefficients.SignOnly` is the other form, which takes the sign of each direction's slope.
    """

    def move(self, estimate: Tensor, kept: Sequence[Tensor], writes: int) -> Tensor:
        return estimate.sign_()


def square_root(x: Tensor) -> Tensor:
    """float32. In float64 first: torch's roots in float32 are off by a last place, machine by machine."""
    return x.to(torch.float64).sqrt().to(torch.float32)


def _share(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1)")
    return value
