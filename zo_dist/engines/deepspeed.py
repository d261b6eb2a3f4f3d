"""DeepSpeed engines: ZeRO-3 without an optimizer; stages 0 to 2 hold full copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_dist.engines.base import Engine, await_each_forward
from zo_dist.engines.replicated import ReplicatedEngine
from zo_dist.params import Param, Span, canonical_name, unwrap


def zero_engine(engine: Any) -> Engine:
    """The engine for a `DeepSpeedEngine` of any ZeRO stage."""
    module = unwrap(engine)
    return ZeRO3Engine(engine, module) if engine.zero_optimization_stage() == 3 else ReplicatedEngine(module)


class ZeRO3Engine(Engine):
    """Flat shards of each parameter (`ds_tensor`), on the device or offloaded to the CPU.

    A forward gathers each weight once, from the shard as it is then; a write goes to the shard. A
    gathered copy that outlives its forward (a persistent parameter) would hide the write, so `spans`
    and `publish` release every copy. Groups of ranks may each hold all weights. Raises ValueError, with the
    remedy, for an engine with an optimizer, for hpZ, quantised gathers, NVMe offload, and, on every rank, for
    groups that do not start with equal weights.
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
        offloaded = False
        for name, param in named:
            if param.ds_tensor.status.name != "AVAILABLE":
                raise ValueError(
                    f"the shard of {canonical_name(name)} is on NVMe, which is not supported; set "
                    'offload_param.device to "cpu" or "none"'
                )
            offloaded |= param.ds_tensor.device.type != self.device.type
        if offloaded:
            await_each_forward(module)
        spans = [self._span(Param(canonical_name(name), p, p.ds_shape, ())) for name, p in named]
        pieces = {span.name: span.flat for span in spans}
        self.compare_copies(pieces, self._ranks_of_same_shard([p for _, p in named]))

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
        shard = sharded.ds_tensor
        offset = sharded.ds_zero_partition_rank * shard.ds_numel
        # The tail of the last shards is uninitialised padding.
        numel = max(0, min(shard.ds_numel, sharded.ds_numel - offset))
        return Span(param.name, shard.detach().view(-1)[:numel], offset)

    def publish(self) -> None:
        if self.device.type != "cpu":
            # Gathers run on a stream of DeepSpeed's own, which waits for no write.
            torch.accelerator.current_stream(self.device).synchronize()
        self._offload.empty_partition_cache()

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([param.param], modifier_rank=None):
            yield param.param.detach()
