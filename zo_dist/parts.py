"""torch's own Embedding and Linear at shifted weights, with no shifted copy of a whole large weight.

Also what all owners use: the scratch that shifted copies live in, and the shifts of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zo_dist.clock import Clock
from zo_dist.kernels import EAGER_CHUNK, part_of
from zo_dist.mask import Mask
from zo_dist.noise import Noise
from zo_dist.params import Runs
from zo_dist.runs import in_runs
from zo_dist.steering import Steering

# An embedding of at least so many rows for each token is shifted where it is looked up.
_FEW = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """One evaluation of the loss: weights shifted by `sign * eps * z` of one direction.

    `drawn`: names of the parameters that the direction perturbs; empty for the unshifted probe.
    """

    direction: int
    sign: float
    drawn: frozenset[str]


@dataclass(frozen=True, slots=True)
class Shifts:
    """Weights at the probes of one step.

    `eps` is the perturbation size, `step` keys the noise, `factors` are those of `Scale`, by name,
    `steering` makes directions of noise, `lengths` are those of draws, by direction and name. What
    `mask` leaves out is as it was. `clock` is told what shifting takes.
    """

    noise: Noise
    step: int
    eps: float
    factors: Mapping[str, float] = field(default_factory=dict)
    mask: Mask = field(default_factory=Mask)
    steering: Steering = field(default_factory=Steering)
    lengths: Mapping[tuple[int, str], float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def copies(
        self,
        outs: Sequence[Tensor],
        flat: Tensor,
        name: str,
        probes: Sequence[Probe],
        offset: int = 0,
        runs: Runs | None = None,
    ) -> None:
        """For each of one direction's probes, `flat` shifted; where in `name` it lies is as in a `Span`."""
        if not flat.numel():
            return
        noise = in_runs(self.noise, offset, runs)
        scales = [self.size(name, probe) for probe in probes]
        where = name, self.step, probes[0].direction, offset
        with self.clock.on("perturb"):
            if self.steering.used:
                self.steering.shift(outs, flat, noise, *where, scales)
            else:
                noise.shift(outs, flat, *where, scales)
            self.mask.put_back(outs, flat, name)

    def rows(self, table: Tensor, ids: Tensor, name: str, probe: Probe) -> Tensor:
        """`[len(ids), width]`: these rows of a whole matrix as `copies` shifts them, but for the mask."""
        where = name, self.step, probe.direction, self.size(name, probe)
        with self.clock.on("perturb"):
            if self.steering.used:
                return self.steering.shift_rows(table, ids, self.noise, *where)
            return self.noise.shift_rows(table, ids, *where)

    def are_thin(self, name: str) -> bool:
        """Is what is added to this weight the product of two thin matrices?"""
        return self.noise.has_sides(name) and not self.mask.cuts(name) and not self.steering.used

    def size(self, name: str, probe: Probe) -> float:
        """What the noise of a parameter is multiplied by."""
        length = self.lengths.get((probe.direction, name), 1.0)
        return probe.sign * self.eps * length * self.factors.get(name, 1.0)


class Scratch:
    """Buffers for shifted copies: they stack up while owners nest, and are used again after.

    Large ones are given back instead: an embedding that is shifted whole, before the layers, would else stay
    beside all that the layers need.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._depth = 0

    @contextmanager
    def taken(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, what gives a flat buffer like a tensor; on leaving, all that it gave are free again."""
        depth = self._depth
        try:
            yield self._take
        finally:
            self._depth = depth
            for i in range(depth, len(self._buffers)):
                buffer = self._buffers[i]
                # In bytes: a part of a linear layer in float32 stays.
                if buffer.numel() > 4 * part_of(buffer.device):
                    self._buffers[i] = buffer.new_empty(0)

    def _take(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        if self._depth == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8, device=like.device))
        buffer = self._buffers[self._depth]
        if buffer.numel() < size or buffer.device != like.device:
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._buffers[self._depth] = buffer
        self._depth += 1
        return buffer[:size].view(like.dtype)

    def holds(self, tensor: Tensor) -> bool:
        # Not by address: memory without values has none.
        held = {buffer.untyped_storage()._cdata for buffer in self._buffers}
        return tensor.untyped_storage()._cdata in held


def is_own(kind: type[nn.Module], forward: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> bool:
    """Is this call torch's own forward of `kind`, with its one argument, here and not on several ranks?"""
    alone = len(args) == 1 and not kwargs and not hasattr(args[0], "placements")
    return alone and getattr(forward, "__func__", None) is kind.forward


def looks_up_few(owner: nn.Module, ids: Tensor) -> bool:
    """Does this embedding have many more rows than are asked of it, and leave them as they are?"""
    assert isinstance(owner, nn.Embedding)
    return owner.max_norm is None and ids.numel() * _FEW <= owner.num_embeddings


def looked_up(shifts: Shifts, table: Tensor, name: str, probe: Probe, ids: Tensor) -> Tensor:
    """What an nn.Embedding returns: the rows that are looked up are shifted, and no others."""
    flat_ids = ids.reshape(-1)
    rows = shifts.rows(table, flat_ids, name, probe)
    if shifts.mask.cuts(name):
        few = max(1, EAGER_CHUNK // table.shape[1])
        for some, shifted in zip(torch.split(flat_ids, few), torch.split(rows, few), strict=True):
            shifts.mask.put_back([shifted.view(-1)], table[some].view(-1), name)
    return rows.view(*ids.shape, -1)


def writes_in_place(owner: nn.Module, x: Tensor) -> bool:
    """May the products of this linear layer be written to memory of the caller, in x's dtype?"""
    assert isinstance(owner, nn.Linear)
    kind = x.device.type
    in_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.dtype == owner.weight.dtype and not in_autocast


def linear(
    shifts: Shifts,
    scratch: Scratch,
    weight: Tensor,
    bias: Tensor | None,
    drawn: Mapping[str, str],
    sides: Sequence[tuple[Probe, Tensor, Tensor | None]],
) -> list[Tensor]:
    """What an nn.Linear returns for one or both sides of a direction, some of its outputs at a time.

    `drawn`: the names of what is shifted, by `weight` and `bias`. `sides`: a probe, its input, and where
    the output goes, if the caller has a place for it. The scratch copies stay small: of `part_of` elements.
    """
    probes = [probe for probe, _, _ in sides]
    num_out, rows = len(weight), max(1, part_of(weight.device) // weight.shape[1])
    outs = [out for _, _, out in sides]

    def shifted(which: str, whole: Tensor, take: Callable[[Tensor], Tensor]) -> list[Tensor]:
        part = whole[start:stop]
        if which not in drawn:
            return [part] * len(sides)
        copies = [take(part) for _ in sides]
        offset = start * (whole.numel() // num_out)
        shifts.copies(copies, part.reshape(-1), drawn[which], probes, offset)
        return [copy.view(part.shape) for copy in copies]

    for start in range(0, num_out, rows):
        stop = min(start + rows, num_out)
        with scratch.taken() as take:
            weights = shifted("weight", weight, take)
            biases = [None] * len(sides) if bias is None else shifted("bias", bias, take)
            for i, (_, x, _) in enumerate(sides):
                outs[i] = _product(x, weights[i], biases[i], outs[i], start, num_out)
    return [out for out in outs if out is not None]


def corrected(
    shifts: Shifts,
    owned: Mapping[str, str],
    x: Tensor,
    out: Tensor,
    groups: Sequence[Sequence[tuple[Probe, slice]]],
) -> Tensor:
    """What an nn.Linear returns under noise of two sides: `out`, of stored weights, and other products added.

    `owned`: the names of weight and bias. `groups`: the probes of one direction that drew them, with their
    rows. No weight is shifted and all probes share one product; `x` is read once more for each. In 16
    bits an output is rounded twice, where a product with a shifted copy is rounded once.
    """
    weight, bias = owned.get("weight", ""), owned.get("bias", "")
    drawn = [(probe, rows) for group in groups for probe, rows in group if weight in probe.drawn]
    if drawn:
        terms = [(probe.direction, shifts.size(weight, probe), rows) for probe, rows in drawn]
        with shifts.clock.on("perturb"):
            shifts.noise.add_products(out, x, weight, shifts.step, terms)
    for group in groups:
        if bias in group[0][0].drawn:
            z = torch.zeros(out.shape[-1], device=x.device)
            shifts.noise.accumulate(z, bias, shifts.step, [(group[0][0].direction, 1.0)], 0)
            for probe, rows in group:
                out[rows] += z * shifts.size(bias, probe)
    return out


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, start: int, num_out: int
) -> Tensor:
    """`x @ weight.T + bias`, being the outputs from `start` on, put in their place in `out`."""
    if out is not None and len(weight) == num_out:
        # The product lands where it belongs: no copy of it is made.
        flat, into = x.reshape(-1, x.shape[-1]), out.view(-1, num_out)
        if bias is None:
            torch.mm(flat, weight.t(), out=into)
        else:
            torch.addmm(bias, flat, weight.t(), out=into)
        return out
    part = nn.functional.linear(x, weight, bias)
    if out is None:
        if len(weight) == num_out:
            return part
        out = part.new_empty(*part.shape[:-1], num_out)
    out[..., start : start + len(weight)] = part
    return out
