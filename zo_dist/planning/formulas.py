"""What a mode needs: memory per GPU by part, traffic and seconds per step. docs/planning.md explains each.

Bytes and collectives follow from shapes alone. Seconds rest on `hardware.Assumptions`, and are given as two
bounds: gathers wholly hidden behind computing, and not hidden at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from zo_dist.noise import GROUP
from zo_dist.optimizer import Perturb, ZeroOrder
from zo_dist.params import Param, Span, frozen_params
from zo_dist.planning.hardware import Cluster
from zo_dist.planning.meta import Traced, Tracer, without_values
from zo_dist.planning.sharding import Gathers, fsdp2_gathers, no_gathers, shard_numel, zero3_gathers
from zo_dist.rounding import ROUNDINGS
from zo_dist.scale import LearnedScale
from zo_dist.state import tensors_of
from zo_dist.update import Terms, Write, update_span

Sharded = Literal["replicated", "fsdp2", "zero3"]

# Of the exchanges of a step: the counts of `count_rows`, and the digest of `Engine.reduce`.
_COUNTED, _DIGEST = 3, 1
# What `LearnedScale` sends for each parameter: `Engine.moments` and `holders`.
_MOMENTS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way to run a step. `ranks`: how many hold a copy of the weights together.

    `stored`: the dtype of shards where gathers cast them (`engine.compute_dtype`), or None.
    """

    engine: Sharded
    ranks: int
    perturb: Perturb
    offload: bool = False
    stored: torch.dtype | None = None

    def name(self, count: int) -> str:
        words = {"replicated": "replicated", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}[self.engine]
        if self.engine != "replicated" and self.ranks < count:
            words += f", HSDP {count // self.ranks} x {self.ranks}"
        return words + (", CPU offload" if self.offload else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The forwards of one step on the busiest rank.

    `worst`: the forward that needs most memory; `forwards`: what runs and how often, a mean over draws;
    `rounds`: how often each weight is gathered.
    """

    worst: Traced
    forwards: tuple[tuple[Traced, float], ...]
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What a step draws: the most arms of one direction, and means over steps.

    `share`, `union`: of the weights, those that a direction draws, and those that are written; `groups`: of
    noise, that the write of such a weight adds up. With a jacobian, once its window is full.
    """

    most_arms: int
    share: float
    union: float
    groups: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one GPU, and `host` of a whole node for what is kept there.

    `weights`: this rank's part, and buffers; `state`: of rule, steering, anchor and projection; `lost`: what
    kahan keeps; `snapshot`: of shards that are put back (`perturb: shard`, projection). The forward needs
    `gathered`, `scratch`, `activations` and `logits`, at its worst moment, together; the write needs `update`
    instead.
    """

    weights: int
    state: int
    lost: int
    snapshot: int
    gathered: int
    scratch: int
    activations: int
    logits: int
    update: int
    host: int

    @property
    def held(self) -> int:
        return self.weights + self.state + self.lost

    @property
    def forward(self) -> int:
        return self.snapshot + self.gathered + self.scratch + self.activations + self.logits

    @property
    def total(self) -> int:
        return self.held + max(self.forward, self.update)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Of one rank and step.

    `gathers`: collectives that gather weights; `elements`: of all they make, of which the rank puts in
    `put_in`; `received`: bytes that come from others; `copied`: bytes from the host's memory; `scalars`:
    bytes that the rank sends besides, in `exchanges` collectives.
    """

    gathers: int
    elements: int
    put_in: int
    received: int
    copied: int
    scalars: int
    exchanges: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Of one step; `hidden` if computing hides gathers and copies, `apart` if nothing is hidden."""

    compute: float
    noise: float
    gather: float
    copy: float
    update: float

    @property
    def hidden(self) -> float:
        return max(self.compute + self.noise, self.gather, self.copy) + self.update

    @property
    def apart(self) -> float:
        return self.compute + self.noise + self.gather + self.copy + self.update


def gathers_of(mode: Mode, module: nn.Module, traced: Traced, zero: Mapping[str, Any]) -> Gathers:
    """The gathers of one forward. `zero`: see `zero3_gathers`."""
    itemsize, staged = _itemsize(module), mode.offload or mode.stored is not None
    if mode.engine == "fsdp2":
        return fsdp2_gathers(module, traced.borders, mode.ranks, itemsize, staged)
    if mode.engine == "zero3" and mode.ranks > 1:
        return zero3_gathers(module, traced.borders, mode.ranks, itemsize, staged, zero)
    return no_gathers(traced.borders)


def memory(mode: Mode, optimizer: ZeroOrder, gathers: Gathers, drawn: Drawn, per_node: int) -> Memory:
    """Raises ValueError where the optimizer's parts do not go with the mode (as `ZeroOrder` itself would)."""
    spans = _spans(mode, optimizer.params)
    noise = optimizer.noise
    optimizer.rounding.begin(spans)
    optimizer.rule.begin([noise.factor_span(s) for s in spans] if optimizer.rule.factored else spans)
    optimizer.steering.begin(spans, optimizer.params, mode.perturb)
    optimizer.anchor.begin(spans)
    optimizer.projection.begin(spans, optimizer.params)
    state = sum(_nbytes(t) for kept in optimizer.rule.kept.values() for t in kept.values())
    state += sum(map(_nbytes, [*optimizer.steering.kept.values(), *optimizer.anchor.weights.values()]))
    start = sum(map(_nbytes, optimizer.projection.weights.values()))
    state += 0 if optimizer.projection.on_cpu else start
    lost = sum(map(_nbytes, optimizer.rounding.lost.values()))
    module = optimizer.engine.module
    frozen = frozen_params(module, optimizer.engine.shape_of)
    weights = sum(_nbytes(s.flat) for s in [*spans, *_spans(mode, frozen)])
    buffers = sum(map(_nbytes, module.buffers()))
    # A search shifts shards in either mode.
    snapshot = start
    if mode.perturb == "shard":
        local = {s.name: _nbytes(s.flat) for s in spans}
        arms = sorted((sum(local[p.name] for p in arm.params) for arm in optimizer.arms), reverse=True)
        snapshot = max(snapshot, sum(arms[: drawn.most_arms]))
    kept = weights + state + lost + snapshot
    on_gpu = 0 if mode.offload else 1
    live = gathers.peak.live
    return Memory(
        weights=on_gpu * weights + buffers,
        state=on_gpu * state,
        lost=on_gpu * lost,
        snapshot=on_gpu * snapshot,
        gathered=gathers.peak.gathered,
        scratch=live.scratch,
        activations=live.activations,
        logits=live.logits,
        update=on_gpu * _update_peak(optimizer, spans),
        host=per_node * ((kept if mode.offload else 0) + (start if optimizer.projection.on_cpu else 0)),
    )


def signs_of(optimizer: ZeroOrder) -> list[tuple[float, ...]]:
    """Of each time that a step's rows are run, where a direction's probes lie."""
    signs = [optimizer.estimator.signs] * (2 if optimizer.anchor.every else 1)
    return [*signs, optimizer.trials.signs] if optimizer.trials else signs


def traffic(
    mode: Mode, optimizer: ZeroOrder, gathers: Gathers, work: Work, count: int, outputs: int
) -> Traffic:
    """`count`: all ranks. `outputs`: of the loss function, that ranks agree on."""
    sides = sum(map(len, signs_of(optimizer)))
    numbers, exchanges = _COUNTED + _DIGEST + (2 + 2 * outputs) * sides * optimizer.directions, 2
    numbers += optimizer.jacobian.used
    if optimizer.trials:
        numbers, exchanges = numbers + _DIGEST, exchanges + 1
    if isinstance(optimizer.scale, LearnedScale):
        numbers, exchanges = numbers + _MOMENTS * len(optimizer.params), exchanges + 2
    elements, put_in = (work.rounds * sum(of) for of in (gathers.elements, gathers.put_in))
    copied = work.rounds * sum(_nbytes(s.flat) for s in _all_spans(mode, optimizer)) if mode.offload else 0
    return Traffic(
        gathers=work.rounds * len(gathers.elements),
        elements=elements,
        put_in=put_in,
        received=(elements - put_in) * _itemsize(optimizer.engine.module),
        copied=copied,
        scalars=8 * numbers if count > 1 else 0,
        exchanges=exchanges if count > 1 else 0,
    )


def seconds(
    mode: Mode, optimizer: ZeroOrder, sent: Traffic, work: Work, drawn: Drawn, cluster: Cluster
) -> Seconds:
    taken, gpu = cluster.assumptions, cluster.gpu
    flops, hbm = gpu.tflops * 1e12 * taken.compute, gpu.hbm_gbps * 1e9 * taken.hbm
    compute = noise = 0.0
    for traced, times in work.forwards:
        compute += times * _roofline(traced.kernels, flops, hbm)
        noise += times * traced.noise_bytes / hbm
    local = sum(_nbytes(s.flat) for s in _spans(mode, optimizer.params))
    # A shard that is offloaded is shifted and written where it lies.
    there = taken.host_gbps * 1e9 / cluster.per_node * taken.hbm if mode.offload else hbm
    if mode.perturb == "shard":
        shifted = sum(sign != 0.0 for signs in signs_of(optimizer) for sign in signs) * optimizer.directions
        # Copied, shifted, put back: each reads and writes.
        noise += 6 * shifted * drawn.share * local / there
    latency = (sent.gathers + sent.exchanges) * taken.latency_us * 1e-6
    return Seconds(
        compute=compute,
        noise=noise,
        gather=sent.received / cluster.gather_bandwidth(mode.ranks) + latency,
        copy=sent.copied / (gpu.host_gbps * 1e9 * taken.links),
        update=_written_bytes(mode, optimizer, drawn) / there,
    )


def _written_bytes(mode: Mode, optimizer: ZeroOrder, drawn: Drawn) -> float:
    """Bytes of the writes of a step: weights, float32 sums for each group of directions, state."""
    spans = _spans(mode, optimizer.params)
    numel, itemsize = sum(s.numel for s in spans), spans[0].flat.element_size()
    each = 2 * itemsize + 8 * drawn.groups
    each += 8 * len(optimizer.rule.keeps) + 8 * optimizer.steering.used
    if optimizer.rounding.mode == ROUNDINGS[1] and itemsize < 4:
        each += 2 * itemsize
    return drawn.union * numel * each


def drawn_of(optimizer: ZeroOrder, steps: int = 8) -> Drawn:
    """From the draws of the first steps, before the sampler has learnt anything."""
    sizes = [arm.numel for arm in optimizer.arms]
    most, shares, unions, groups = 0, list[float](), list[float](), list[float]()
    window = max(1, optimizer.jacobian.window)
    of_steps = [optimizer._draws(step, optimizer.directions) for step in range(window - 1 + steps)]
    for last, draws in enumerate(of_steps[window - 1 :], start=window):
        written = [Counter(arm for d in each for arm in d.arms) for each in of_steps[last - window : last]]
        most = max([most, *(len(draw.arms) for draw in draws)])
        union = sum(sizes[arm] for arm in set().union(*written))
        unions.append(union / sum(sizes))
        shares += [sum(sizes[arm] for arm in draw.arms) / sum(sizes) for draw in draws]
        groups.append(sum(-(-n // GROUP) * sizes[arm] for of in written for arm, n in of.items()) / union)
    return Drawn(most_arms=most, share=_mean(shares), union=_mean(unions), groups=_mean(groups))


def _spans(mode: Mode, params: list[Param]) -> list[Span]:
    """What rank 0 holds of these, on the meta device."""
    sizes = [shard_numel(mode.engine, p.shape, mode.ranks) for p in params]
    return [
        Span(p.name, torch.empty(size, dtype=mode.stored or p.param.dtype, device="meta"), 0)
        for p, size in zip(params, sizes, strict=True)
    ]


def _all_spans(mode: Mode, optimizer: ZeroOrder) -> list[Span]:
    frozen = frozen_params(optimizer.engine.module, optimizer.engine.shape_of)
    return _spans(mode, [*optimizer.params, *frozen])


def _update_peak(optimizer: ZeroOrder, spans: list[Span]) -> int:
    """What the write of the largest span needs beside it: the real code on the meta device."""
    span = max(spans, key=lambda s: s.numel)
    param = next(p for p in optimizer.params if p.name == span.name)
    tracer = Tracer([span.flat, *tensors_of(optimizer.beside).values()], None)
    without_values(optimizer.noise, tracer)
    parts = optimizer.rule, optimizer.rounding, optimizer.noise
    write = Write(*parts, step=0, lr=1.0, steering=optimizer.steering)
    every = [(d, 1.0) for d in range(optimizer.directions)]
    terms = Terms(every, bends=[(0, 1.0)], earlier=[(0, every)] if optimizer.jacobian.used else [])
    # Made anew and kept from write to write: it is needed by the first.
    optimizer.rounding._scratch.clear()
    with torch.no_grad(), tracer:
        tracer.border(optimizer.engine.module, True)
        update_span(span, param, terms, write)
    return tracer.traced.borders[0].peak.total


def _roofline(kernels: Counter[tuple[int, int]], flops: float, hbm: float) -> float:
    """Each kernel takes as long as its arithmetic or its bytes, whichever is longer."""
    return sum(times * max(work / flops, size / hbm) for (work, size), times in kernels.items())


def _itemsize(module: nn.Module) -> int:
    """Bytes of a weight as it is gathered and computed with."""
    return next(module.parameters()).element_size()


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
