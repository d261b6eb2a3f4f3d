"""How directions and coefficients become a write: the update rule, and the rounding of the result.

A rule is a pure function of flat float32 tensors. `update_span` is the one loop that all rules
share: it reads each weight once, adds up every direction's noise in float32 while the chunk is in
cache, applies the rule, rounds once and writes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zo_dist import native
from zo_dist.noise import GROUP, NOISE, ROUNDING, Noise
from zo_dist.params import Param, Span

Rounding = Literal["stochastic", "kahan", "nearest"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)

# Elements per pass and core: their float32 sums stay in its cache over all directions. A GPU takes
# more at once, because a call takes it less time than it takes the processor to ask for it.
_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24


class SGD:
    """`w <- (1 - lr * weight_decay) * w - lr * estimate`: decoupled weight decay, no state.

    As in MeZO, decay leaves biases and norms alone (here: every parameter of fewer than two
    dimensions), and touches drawn arms only.
    """

    def __init__(self, weight_decay: float = 0.0) -> None:
        if not 0.0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay is {weight_decay}; it must be finite and at least 0")
        self.weight_decay = weight_decay

    def scalars(self, lr: float, shape: torch.Size) -> tuple[float, float]:
        """What `apply` takes for a parameter of this shape: the learning rate, and the share that stays."""
        return lr, 1.0 - lr * self.weight_decay if len(shape) > 1 else 1.0

    def apply(self, weight: Tensor, estimate: Tensor, scalars: Tensor) -> Tensor:
        """The new float32 weights. `scalars`: float64, from the method of that name."""
        # Two operations on purpose: one fused multiply-add would round differently by device.
        return weight * scalars[1] - estimate * scalars[0]


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
        self._scratch: dict[torch.device, Tensor] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        """Make the state there will be, from the start: zeros like each 16-bit span."""
        if self.mode == "kahan":
            self.lost = {s.name: torch.zeros_like(s.flat) for s in spans if s.flat.dtype != torch.float32}

    def scratch(self, flat: Tensor) -> Tensor:
        """float32, as long as `flat`, with anything in it: the same memory from one call to the next."""
        held = self._scratch.get(flat.device)
        if held is None or len(held) < len(flat):
            held = self._scratch[flat.device] = torch.empty_like(flat, dtype=torch.float32)
        return held[: len(flat)]

    def lost_of(self, name: str, start: int, numel: int) -> Tensor | None:
        """What was lost of the chunk that begins `start` into the span; None where nothing is kept."""
        return self.lost[name][start : start + numel] if name in self.lost else None

    def write(
        self, flat: Tensor, exact: Tensor, lost: Tensor | None, name: str, step: int, offset: int
    ) -> None:
        """Round float32 `exact`, which is overwritten, into `flat`: elements `offset ...` of `name`."""
        if self.mode == "stochastic" and flat.dtype != torch.float32:
            self.noise.round(flat, exact, name, step, offset)
            return
        flat.copy_(exact)
        if lost is not None:
            lost.copy_(exact.sub_(flat))


def _new_weights(
    estimate: Tensor, scalars: Tensor, rule: Rule, flat: Tensor, lost: Tensor | None = None
) -> Tensor:
    """What the rule makes of weights and what they lost before, in float32: not yet rounded."""
    weight = flat.to(torch.float32)
    if lost is not None:
        weight = weight + lost.to(torch.float32)
    return rule.apply(weight, estimate, scalars)


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
    if noise.in_native(span.flat):
        factor, keep = rule.scalars(lr, param.shape)
        address, bits = (noise.address(span.name, step, stream) for stream in (NOISE, ROUNDING))
        lost = rounding.lost_of(span.name, 0, span.flat.numel())
        drawn = bits if rounding.mode == "stochastic" else None
        native.update(span.flat, lost, noise.law, address, span.offset, terms, drawn, keep, factor)
        return
    scalars = torch.tensor(rule.scalars(lr, param.shape), dtype=torch.float64, device=span.flat.device)
    chunk = _CHUNK * torch.get_num_threads() if span.flat.device.type == "cpu" else _GPU_CHUNK
    for start in range(0, span.flat.numel(), chunk):
        flat = span.flat[start : start + chunk]
        offset = span.offset + start
        exact = rounding.scratch(flat)
        lost = rounding.lost_of(span.name, start, flat.numel())
        inputs = (flat,) if lost is None else (flat, lost)
        noise.combine(exact, inputs, span.name, step, terms, offset, _new_weights, (scalars, rule))
        rounding.write(flat, exact, lost, span.name, step, offset)


def use_each_kernel(weights: Tensor, rule: Rule, mode: Rounding, noise: Noise, directions: int) -> None:
    """Shift and update flat scratch `weights` in each way that a run will, so that all is compiled."""
    outs = [torch.empty_like(weights), torch.empty_like(weights)]
    noise.shift(outs, weights, "", 0, 0, 0, [0.0, 0.0])
    noise.shift(outs[:1], weights, "", 0, 0, 0, [0.0])
    span, matrix = Span("", weights, 0), nn.Parameter(weights.view(-1, 1), requires_grad=False)
    rounding = Rounding16(mode, noise)
    rounding.begin([span])
    # An arm may be drawn by any number of directions: one, a group or less, or more.
    for count in (1, 2, GROUP + 1):
        if count <= directions:
            terms = [(0, 0.0)] * count
            update_span(
                span, Param("", matrix, matrix.shape, ()), terms, rule, rounding, noise, step=0, lr=0.0
            )
