"""The write: one read and one write of each weight, for all directions, with one rounding.

A chunk at a time, the noise of every direction is added up in float32 while the chunk is in cache, the
rule makes a move of the sum, and the new weights are rounded. SGD has this fused into one kernel,
but not where a mask leaves some weights out or directions are steered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zo_dist import native
from zo_dist.mask import Mask
from zo_dist.noise import GROUP, NOISE, ROUNDING, Noise, to_device
from zo_dist.params import Param, Span
from zo_dist.rounding import Rounding, Rounding16
from zo_dist.rules import SGD, Adam, Rule, square_root
from zo_dist.runs import in_runs
from zo_dist.steering import Steering
from zo_dist.thin import SquareSum, Thin

# Elements per pass and core: their float32 sums stay in its cache over all directions. A GPU takes
# more at once, because a call takes it less time than it takes the processor to ask for it.
_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 24


@dataclass(frozen=True, slots=True)
class Write:
    """How a step writes: the same for all parameters. What `mask` leaves out stays as it is.

    So does all that is kept beside it, but for what a factored rule keeps of sides.
    """

    rule: Rule
    rounding: Rounding16
    noise: Noise
    step: int
    lr: float
    mask: Mask = field(default_factory=Mask)
    steering: Steering = field(default_factory=Steering)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a step writes to a parameter.

    `of_step`: `(direction, coefficient)`, the coefficients already weighted and averaged. `writes`: as of
    `Rule.move`; `last`: the step that wrote before, or -1. `bends`: what a curvature learns from,
    `(direction, curvature)`. `earlier`: other steps, and terms of each that are added after this one's.
    """

    of_step: Sequence[tuple[int, float]]
    writes: int = 1
    last: int = -1
    bends: Sequence[tuple[int, float]] = ()
    earlier: Sequence[tuple[int, Sequence[tuple[int, float]]]] = ()


def update_span(span: Span, param: Param, terms: Terms, write: Write) -> None:
    """Apply all directions to one span: one read and one write of each weight.

    Terms are added up in float32 in the order given, so the result does not depend on how weights are cut.
    """
    rule, rounding, step = write.rule, write.rounding, write.step
    noise = in_runs(write.noise, span.offset, span.runs)
    mask, steering = write.mask, write.steering
    # The fused forms know one step, no mask, no steering, and no noise that is made of two sides.
    plain = not (mask.cuts(span.name) or steering.used or noise.has_sides(span.name) or terms.earlier)
    fused = type(rule) is SGD and plain and span.runs is None
    remaining = rule.remaining(write.lr, param.shape)
    if fused and noise.in_native(span.flat):
        address, bits = (noise.address(span.name, step, stream) for stream in (NOISE, ROUNDING))
        lost = rounding.lost_of(span.name, 0, span.numel)
        drawn = bits if rounding.mode == "stochastic" else None
        native.update(
            span.flat, lost, noise.law, address, span.offset, terms.of_step, drawn, remaining, write.lr
        )
        return
    # A factored rule has made its move of a side.
    thin = _thin(span, terms, write) if noise.is_product(span.name) else None
    moved = thin is not None and rule.factored
    scalars = to_device((remaining, write.lr), torch.float64, span.flat.device)
    chunk = _CHUNK * torch.get_num_threads() if span.flat.device.type == "cpu" else _GPU_CHUNK
    for start in range(0, span.numel, chunk):
        flat = span.flat[start : start + chunk]
        offset = span.offset + start
        exact = rounding.scratch(flat)
        lost = rounding.lost_of(span.name, start, flat.numel())
        inputs = (flat,) if lost is None else (flat, lost)
        keeps = () if moved else rule.keeps
        kept = [rule.kept[key][span.name][start : start + chunk] for key in keeps]
        steered = steering.of(span.name, offset, flat.numel()) if steering.used else None
        with mask.kept(flat, [t for t in (lost, *kept, steered) if t is not None], span.name):
            if fused:
                noise.combine(exact, inputs, span.name, step, terms.of_step, offset, _new_weights, (scalars,))
            else:
                if thin is None:
                    summed = terms.of_step if steering.sums_noise else ()
                    noise.accumulate(exact.zero_(), span.name, step, summed, offset)
                else:
                    for piece, total in thin.pieces(offset, len(exact)):
                        exact[piece] = total
                for another, of_it in terms.earlier:
                    noise.accumulate(exact, span.name, another, of_it, offset)
                if steered is not None:
                    of_directions = terms.of_step, terms.bends
                    steering.steer(exact, steered, noise, span.name, step, *of_directions, offset)
                move = exact if moved else rule.move(exact, kept, terms.writes)
                exact.copy_(_new_weights(move, scalars, *inputs))
            rounding.write(flat, exact, lost, span.name, step, offset, noise)


def _thin(span: Span, terms: Terms, write: Write) -> Thin | _Quotients:
    """The estimate as one product of two sides; with a rule that is factored, the move."""
    rule, noise, place = write.rule, write.noise, (span.offset, span.numel)
    factor = noise.factor(span.name, write.step, terms.of_step, span.flat.device, *place)

    def sides_of(factor: Tensor) -> tuple[Tensor, Tensor]:
        return noise.sides_of(span.name, write.step, factor, *place)

    if rule.factored:
        kept = [rule.kept[key][span.name] for key in rule.keeps]
        for tensor in kept:
            noise.carry(span.name, tensor, terms.last, write.step)
        if isinstance(rule, Adam):
            momentum, second = rule.moments(factor, kept, terms.writes)
            squares = SquareSum(*sides_of(square_root(second)), span.offset)
            return _Quotients(rule, Thin(*sides_of(momentum), span.offset), squares)
        factor = rule.move(factor, kept, terms.writes)
    return Thin(*sides_of(factor), span.offset)


@dataclass(frozen=True, slots=True)
class _Quotients:
    """The move of Adam that is factored, some elements at a time: see `Thin`."""

    rule: Adam
    momentum: Thin
    second: SquareSum

    def pieces(self, offset: int, numel: int) -> Iterator[tuple[slice, Tensor]]:
        moments = (of.pieces(offset, numel) for of in (self.momentum, self.second))
        for (piece, momentum), (_, second) in zip(*moments, strict=True):
            yield piece, self.rule.quotient(momentum, second)


def _new_weights(move: Tensor, scalars: Tensor, flat: Tensor, lost: Tensor | None = None) -> Tensor:
    """Weights and what they lost before, after the move, in float32: not yet rounded."""
    weight = flat.to(torch.float32)
    if lost is not None:
        weight = weight + lost.to(torch.float32)
    # Two operations on purpose: one fused multiply-add would round differently by device.
    return weight * scalars[0] - move * scalars[1]


def use_each_kernel(
    weights: Tensor, rule: Rule, mode: Rounding, noise: Noise, directions: int, unfused: bool = False
) -> None:
    """Shift and update flat scratch `weights` in each way that a run will, so that all is compiled.

    `unfused`: some writes of the run are not fused, whatever its rule.
    """
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
            param = Param("", matrix, matrix.shape, ())
            write = Write(rule, rounding, noise, step=0, lr=0.0)
            # What other rules keep is not for scratch, and their moves are not compiled.
            if type(rule) is SGD:
                update_span(span, param, Terms(terms), write)
                if not unfused:
                    continue
            exact = rounding.scratch(weights)
            noise.accumulate(exact.zero_(), "", 0, terms, 0)
            rounding.write(weights, exact, None, "", 0, 0)
