"""What each engine holds of a model, gathers for a forward and keeps gathered, border by border.

FSDP2 and ZeRO-3 gather what a module needs when it begins and free it when it ends, in ways of their own.
Both are followed here through the modules of one traced forward, as torch 2.13 (`fsdp/_fully_shard/
_fsdp_param_group.py`) and deepspeed 0.19.8 (`runtime/zero/partitioned_param_coordinator.py`,
`partition_parameters.py`) run it once their traces are complete. The collectives, their elements and the peak
are held to real runs in `tests/distributed/test_plan_measured.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Size, nn

from zo_dist.params import find_layers
from zo_dist.planning.meta import Border, Live

# DeepSpeed's defaults (runtime/zero/config.py).
ZERO3_DEFAULTS = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}

# What a ds_config.json that plan writes holds; `read_ds_config` fills in the rest.
ZERO3: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


class Peak(NamedTuple):
    """The moment of a forward that needs most: bytes gathered, and what lives beside."""

    gathered: int
    live: Live

    @property
    def total(self) -> int:
        return self.gathered + self.live.total


@dataclass(slots=True)
class Gathers:
    """Of one forward: the elements of each all-gather, those of them that each rank put in, and the peak."""

    elements: list[int] = field(default_factory=list)
    put_in: list[int] = field(default_factory=list)
    peak: Peak = field(default_factory=lambda: Peak(0, Live(0, 0, 0)))

    def at(self, gathered: int, live: Live) -> None:
        if gathered + live.total > self.peak.total:
            self.peak = Peak(gathered, live)

    def call(self, shards: Sequence[int], ranks: int) -> None:
        self.put_in.append(sum(shards))
        self.elements.append(sum(shards) * ranks)


def shard_numel(engine: str, shape: Size, ranks: int) -> int:
    """Elements of a parameter on rank 0, which has the most. FSDP2 cuts rows, ZeRO-3 elements."""
    if engine == "replicated" or ranks == 1:
        return shape.numel()
    if engine == "fsdp2":
        return -(-shape[0] // ranks) * math.prod(shape[1:])
    return -(-shape.numel() // ranks)


def no_gathers(borders: Sequence[Border]) -> Gathers:
    """Weights that are whole on every rank."""
    gathers = Gathers()
    for border in borders:
        gathers.at(0, border.peak)
    return gathers


def fsdp2_gathers(
    module: nn.Module, borders: Sequence[Border], ranks: int, itemsize: int, staged: bool
) -> Gathers:
    """`shard_with_fsdp2`: a group for each layer and one for the rest; `itemsize`: of what is gathered.

    A group is gathered into one flat buffer and copied out of it; the buffer lasts until the next group's
    copy is done (`wait_for_unshard` lets go of it before, but for a variable of its own). The rest stays
    gathered for the whole forward. `staged`: shards are cast, or copied from the CPU, before they are sent.
    """
    groups = _fsdp2_groups(module, ranks)
    gathers, unsharded, buffer = Gathers(), 0, 0
    for border in borders:
        shards = groups.get(border.module, [])
        # On one rank shards are copied, not sent.
        size = sum(shards) * ranks * itemsize
        if shards and border.enters:
            if ranks > 1:
                gathers.call(shards, ranks)
                # No more than what it is copied to, which comes later.
                staging = sum(shards) * itemsize if staged else 0
                gathers.at(unsharded + buffer + size + max(size, staging), border.at)
                buffer = size
            unsharded += size
        elif shards:
            unsharded -= size
        gathers.at(unsharded + buffer, border.peak)
    return gathers


def _fsdp2_groups(module: nn.Module, ranks: int) -> dict[nn.Module, list[int]]:
    """The shards that each group's root gathers: a weight belongs to the first group that reaches it."""
    seen: set[nn.Parameter] = set()
    groups: dict[nn.Module, list[int]] = {}
    for root in [*(layer for _, layer in find_layers(module)), module]:
        mine = [p for p in root.parameters() if p not in seen]
        seen.update(mine)
        groups[root] = [shard_numel("fsdp2", p.shape, ranks) for p in mine]
    return groups


@dataclass(eq=False, slots=True)
class _Handle:
    """An all-gather under way: of several parameters, with a buffer that they are copied out of."""

    params: list[nn.Parameter]
    buffer: int
    waited: bool = False
    waiting: set[nn.Parameter] = field(default_factory=set)


class _Coordinator:
    """DeepSpeed's `PartitionedParameterCoordinator` with a complete trace, forwards only."""

    def __init__(
        self, module: nn.Module, borders: Sequence[Border], ranks: int, itemsize: int, staged: bool, zero: Any
    ) -> None:
        self._ranks, self._itemsize, self._staged = ranks, itemsize, staged
        settings = {**ZERO3_DEFAULTS, **{k: v for k, v in zero.items() if k in ZERO3_DEFAULTS}}
        self._bucket, self._max_live, self._reuse = (int(settings[key]) for key in ZERO3_DEFAULTS)
        self._sequential = bool(zero.get("stage3_allgather_sequential"))
        self._id = {p: i for i, p in enumerate(module.parameters())}
        self._order = [b.module for b in borders if b.enters]
        self._queue = deque(
            (p, step)
            for step, m in enumerate(self._order)
            for p in sorted(self._own(m), key=lambda p: self._id[p])
        )
        self._last_fetched: dict[nn.Parameter, int] = {}
        self._here: set[nn.Parameter] = set()
        self._inflight: dict[nn.Parameter, _Handle] = {}
        self._active: dict[nn.Parameter, set[nn.Module]] = {p: set() for p in self._id}
        # What each gathered parameter occupies.
        self._sizes: dict[nn.Parameter, int] = {}
        self._step = self._available = 0
        self.bytes = 0
        self.gathers = Gathers()

    def _own(self, module: nn.Module) -> set[nn.Parameter]:
        return {p for p in module._parameters.values() if p is not None}

    def _shard(self, param: nn.Parameter) -> int:
        return shard_numel("zero3", param.shape, self._ranks)

    def enter(self, border: Border) -> None:
        """`fetch_sub_module`: gather what the module needs, wait for it, and prefetch."""
        needed = self._own(border.module)
        self._gather([p for p in needed if p not in self._here and p not in self._inflight], border.at)
        for param in needed:
            self._active[param].add(border.module)
            if param in self._inflight:
                self._wait(param, border.at)
        fresh = {p for p in needed if self._last_fetched.get(p, -1) < self._step}
        taken: set[nn.Parameter] = set()
        while self._queue and len(taken) < len(fresh):
            param, step = self._queue.popleft()
            self._last_fetched[param] = step
            taken.add(param)
        limit = min(self._max_live - self._available, self._bucket)
        # By identity, as in a set, and in order.
        ahead: dict[nn.Parameter, None] = {}
        numel = 0
        while self._bucket > 0 and self._queue and numel < limit:
            param, step = self._queue.popleft()
            self._last_fetched[param] = max(self._last_fetched.get(param, -1), step)
            if param not in self._here and param not in self._inflight and param not in ahead:
                ahead[param] = None
                numel += param.numel()
        self._gather(list(ahead), border.at)
        self._step += 1

    def _gather(self, params: list[nn.Parameter], live: Live) -> None:
        if not params:
            return
        params = sorted(params, key=lambda p: self._id[p])
        self._available += sum(p.numel() for p in params)
        calls = [[p] for p in params] if self._sequential or len(params) == 1 else [params]
        for group in calls:
            shards = [self._shard(p) for p in group]
            self.gathers.call(shards, self._ranks)
            size = sum(shards) * self._ranks * self._itemsize
            self.bytes += size
            self.gathers.at(self.bytes + (sum(shards) * self._itemsize if self._staged else 0), live)
            handle = _Handle(group, size, waiting=set(group))
            for param in group:
                # A gather of one is its own buffer, padding and all.
                self._sizes[param] = size if len(group) == 1 else param.numel() * self._itemsize
                self._inflight[param] = handle

    def _wait(self, param: nn.Parameter, live: Live) -> None:
        handle = self._inflight.pop(param)
        if not handle.waited:
            handle.waited = True
            if len(handle.params) > 1:
                # Each is put together from its pieces; the buffer goes when all have been asked for.
                self.bytes += sum(self._sizes[p] for p in handle.params)
            self.gathers.at(self.bytes, live)
            self._here.update(handle.params)
        handle.waiting.discard(param)
        if not handle.waiting and len(handle.params) > 1:
            self.bytes -= handle.buffer

    def leave(self, module: nn.Module) -> None:
        """`release_sub_module`: free what is not used again soon."""
        mine = self._own(module)
        release = {p for p in mine if self._last_fetched.get(p, -1) <= self._step}
        passed = 0
        for following in self._order[self._step :] if mine else ():
            if passed >= self._reuse:
                break
            for param in self._own(following):
                release.discard(param)
                passed += param.numel()
        for param in mine:
            self._active[param].discard(module)
            if param in release and param in self._here and not self._active[param]:
                self._here.discard(param)
                self._available -= param.numel()
                self.bytes -= self._sizes.pop(param)


def zero3_gathers(
    module: nn.Module, borders: Sequence[Border], ranks: int, itemsize: int, staged: bool, zero: Any
) -> Gathers:
    """DeepSpeed at stage 3: each module's own parameters, and those of the next ones as far as it prefetches.

    `zero`: the `zero_optimization` section. Parameters gathered together pass through a buffer. `staged`:
    shards are copied from the CPU before they are sent.
    """
    coordinator = _Coordinator(module, borders, ranks, itemsize, staged, zero)
    for border in borders:
        if border.enters:
            coordinator.enter(border)
        else:
            coordinator.leave(border.module)
        coordinator.gathers.at(coordinator.bytes, border.peak)
    return coordinator.gathers
