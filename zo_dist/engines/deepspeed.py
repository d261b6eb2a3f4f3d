"""DeepSpeed engines: ZeRO-3 without an optimizer; stages 0 to 2 hold full copies, or what AutoTP cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_dist.engines.auto_tp import AutoTPEngine, cuts_layers
from zo_dist.engines.base import Engine, await_each_forward
from zo_dist.engines.ds_keys import AUTOTP_AT_STAGE_3
from zo_dist.engines.replicated import ReplicatedEngine
from zo_dist.params import Param, Span, canonical_name, unwrap


def zero_engine(engine: Any) -> Engine:
    """The engine for a `DeepSpeedEngine` of any ZeRO stage; ValueError for AutoTP at stage 3."""
    module = unwrap(engine)
    shards = engine.zero_optimization_stage() == 3
    if cuts_layers(module):
        if shards:
            raise ValueError(AUTOTP_AT_STAGE_3)
        # It compares the first inputs of ranks, as `step_batch` does, but waits for ever where some differ.
        engine.first_dataloader_check.remove()
        return AutoTPEngine(module)
    return ZeRO3Engine(engine, module) if shards else ReplicatedEngine(module)


class SwappedSpan(Span):
    """A span on NVMe: `flat` is in memory until that of another is asked for, or `publish` is called."""

    __slots__ = ("_numel", "_read")
    _read: Callable[[], Tensor]
    _numel: int

    def __init__(self, name: str, read: Callable[[], Tensor], offset: int, numel: int) -> None:
        values = {"name": name, "_read": read, "offset": offset, "runs": None, "_numel": numel}
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)

    @property
    def flat(self) -> Tensor:
        return self._read()[: self._numel]

    @property
    def numel(self) -> int:
        return self._numel

    def lasting(self) -> Tensor:
        return self.flat.clone()


class ZeRO3Engine(Engine):
    """Flat shards of each parameter (`ds_tensor`), on the device or offloaded to the CPU or to NVMe.

    A forward gathers each weight once, from the shard as it is then; a write goes to the shard. A
    gathered copy that outlives its forward (a persistent parameter) would hide the write, so `spans`
    and `publish` release every copy. Of NVMe one shard at a time is in memory, beside what a forward reads;
    it is written back if it has changed, which a copy of it tells. Groups of ranks may each hold all weights.
    Raises ValueError, with the remedy, for an engine with an optimizer, for hpZ, quantised gathers, and, on
    every rank, for groups that do not start with equal weights.
    """

    name = "deepspeed"

    def __init__(self, engine: Any, module: nn.Module) -> None:
        super().__init__(module, torch.device(engine.device))
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        if not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
            raise ValueError(
                "the ZeRO-3 engine was built with an optimizer, which holds a float32 copy of every "
                "weight that zeroth-order steps do not use; call deepspeed.initialize(model=model, "
                "config=zo_dist.engines.read_ds_config(...).config) without optimizer or parameters"
            )
        if engine.zero_quantized_weights() or engine.zero_quantized_nontrainable_weights():
            raise ValueError(
                "zero_quantized_weights rounds every gathered weight to 8 bits, far more than eps "
                "shifts it: the loss difference would measure rounding; set it to false"
            )
        if engine.zero_hpz_partition_size() > 1:
            raise ValueError(
                f"zero_hpz_partition_size is {engine.zero_hpz_partition_size()}: gathers would read a "
                "second copy that writes do not reach; set it to 1 (to shard inside a node: "
                "engine.shard_ranks, or build the model under deepspeed.zero.Init(data_parallel_group=...))"
            )
        self._offload = engine.optimizer
        named: list[tuple[str, Any]] = list(module.named_parameters())
        if any(param.ds_tensor.device.type != self.device.type for _, param in named):
            await_each_forward(module)
        # The shard that `spans` brought in from NVMe, and as it was.
        self._held: Any = None
        self._as_read = torch.empty(0)
        if any(_on_nvme(param) for _, param in named):
            # A forward takes shards that are in memory for its own, and drops them.
            module.register_forward_pre_hook(lambda *_: self._swap_out(), prepend=True)
        spans = [self._span(Param(canonical_name(name), p, p.ds_shape, ())) for name, p in named]
        pieces = ((span.name, span.flat) for span in spans)
        self.compare_copies(pieces, self._ranks_of_same_shard([p for _, p in named]))
        self._swap_out()

    def _ranks_of_same_shard(self, params: Sequence[Any]) -> list[int]:
        """This rank, and where groups of ranks each hold all weights its like in the others. A collective."""
        first = params[0]
        if any(p.ds_zero_partition_world_size != first.ds_zero_partition_world_size for p in params):
            raise ValueError(
                "parameters are sharded over groups of different sizes; build the whole model under one "
                "deepspeed.zero.Init(data_parallel_group=...)"
            )
        places = self.exchange([float(first.ds_zero_partition_rank)]).flatten().tolist()
        return [rank for rank, place in enumerate(places) if place == first.ds_zero_partition_rank]

    def shape_of(self, param: Any) -> torch.Size:
        return torch.Size(param.ds_shape)

    def spans(self, params: Iterable[Param]) -> list[Span]:
        self.publish()
        return super().spans(params)

    def _span(self, param: Param) -> Span:
        sharded: Any = param.param
        size = sharded.ds_tensor.ds_numel
        offset = sharded.ds_zero_partition_rank * size
        # The tail of the last shards is uninitialised padding.
        numel = max(0, min(size, sharded.ds_numel - offset))
        if _on_nvme(sharded):
            return SwappedSpan(param.name, lambda: self._swapped_in(sharded), offset, numel)
        return Span(param.name, sharded.ds_tensor.detach().view(-1)[:numel], offset)

    def _swapped_in(self, param: Any) -> Tensor:
        if self._held is not param:
            self._swap_out()
            # Else it may be in memory, and a gathered copy as well.
            self._offload.empty_partition_cache()
            param.nvme_swapper.synchronize_reads()
            if param.ds_tensor.status.name == "NOT_AVAILABLE":
                param.nvme_swapper.swap_in([param], async_op=False)
            self._held, self._as_read = param, param.ds_tensor.clone()
        shard: Tensor = param.ds_tensor.detach()
        return shard

    def _swap_out(self) -> None:
        if self._held is None:
            return
        param, self._held = self._held, None
        if torch.equal(*(t.detach().view(torch.uint8) for t in (param.ds_tensor, self._as_read))):
            param.nvme_swapper.remove_partition_and_release_buffers([param])
        else:
            param.nvme_swapper.swap_out_and_release([param])
        self._as_read = torch.empty(0)

    def publish(self) -> None:
        self._swap_out()
        if self.device.type != "cpu":
            # Gathers run on a stream of DeepSpeed's own, which waits for no write.
            torch.accelerator.current_stream(self.device).synchronize()
        self._offload.empty_partition_cache()

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        self._swap_out()
        with GatheredParameters([param.param], modifier_rank=None):
            yield param.param.detach()


def _on_nvme(param: Any) -> bool:
    """Has its shard a file? (DeepSpeed leaves those below 1 MiB in memory.)"""
    return param.ds_tensor.final_location is not None
