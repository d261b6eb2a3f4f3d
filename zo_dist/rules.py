"""How directions and coefficients become a write: the update rule, and the rounding of the result.

A rule is a pure function of flat float32 tensors. `update_span` is the one loop that all rules
share: it reads each weight once, adds up every direction's noise in float32 while the chunk is in
cache, applies the rule, rounds once and writes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from zo_dist.noise import Noise
from zo_dist.params import Param, Span

Rounding = Literal["stochastic", "kahan", "nearest"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

# Elements per pass: the float32 accumulators of one chunk stay in cache over all directions.
_CHUNK = 1 << 19


class SGD:
    """`w <- (1 - lr * weight_decay) * w - lr * estimate`: decoupled weight decay, no state.

    As in MeZO, decay leaves biases and norms alone (here: every parameter of fewer than two
    dimensions), and touches drawn arms only.
    """

    def __init__(self, weight_decay: float = 0.0) -> None:
        if not 0.0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}; it must be finite and at least 0")
        self.weight_decay = weight_decay

    def apply(self, weight: Tensor, estimate: Tensor, lr: float, decays: bool) -> Tensor:
        """The new float32 weights; `weight` and `estimate` are float32 and may be overwritten."""
        if decays and self.weight_decay:
            weight.mul_(1.0 - lr * self.weight_decay)
        # Two operations on purpose: one fused multiply-add would round differently by device.
        return weight.sub_(estimate.mul_(lr))


Rule = SGD


class Rounding16:
    """Writes float32 results to weights of any of the three dtypes; one rounding, nothing more.

    `stochastic`: up or down with the probability that keeps the mean exact, from 16 random bits of
    the weight's own stream, so it replays. `kahan`: to nearest, and the part lost is kept beside the
    weight (2 bytes per parameter) and added back next time. `nearest`: what published code does;
    updates below half a unit in the last place vanish. float32 weights take the result as it is.
    """

    def __init__(self, mode: Rounding, noise: Noise) -> None:
        if mode not in ROUNDINGS:
            raise ValueError(f"rounding {mode!r} is not known; use one of {', '.join(ROUNDINGS)}")
        self.mode, self.noise = mode, noise
        self.lost: dict[str, Tensor] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        """Make the state there will be, from the start: zeros like each 16-bit span."""
        if self.mode == "kahan":
            self.lost = {s.name: torch.zeros_like(s.flat) for s in spans if s.flat.dtype != torch.float32}

    def read(self, flat: Tensor, name: str, start: int) -> Tensor:
        """float32 copy of the exact weights of one chunk that begins `start` into the span."""
        exact = flat.to(torch.float32, copy=True)
        if name in self.lost:
            exact += self.lost[name][start : start + flat.numel()].to(torch.float32)
        return exact

    def write(self, flat: Tensor, exact: Tensor, name: str, step: int, offset: int, start: int) -> None:
        """Round `exact` into `flat`, whose first element is number `offset + start` of `name`."""
        if flat.dtype == torch.float32 or self.mode == "nearest":
            flat.copy_(exact)
        elif self.mode == "kahan":
            flat.copy_(exact)
            self.lost[name][start : start + flat.numel()] = (exact - flat.to(torch.float32)).to(flat.dtype)
        else:
            self.noise.round(flat, exact, name, step, offset + start)


def update_span(
    span: Span,
    param: Param,
    terms: Sequence[tuple[int, float]],
    rule: Rule,
    rounding: Rounding16,
    noise: Noise,
    step: int,
    lr: float,
) -> None:
    """Apply all directions to one span: one read and one write of each weight.

    `terms` are `(direction, coefficient)`, the coefficients already weighted and averaged; they are
    added up in float32 in the order given, so the result does not depend on how weights are cut.
    """
    for start in range(0, span.flat.numel(), _CHUNK):
        flat = span.flat[start : start + _CHUNK]
        estimate = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
        for direction, coef in terms:
            noise.accumulate(estimate, span.name, step, direction, span.offset + start, coef)
        exact = rounding.read(flat, span.name, start)
        exact = rule.apply(exact, estimate, lr, decays=len(param.shape) > 1)
        rounding.write(flat, exact, span.name, step, span.offset, start)
