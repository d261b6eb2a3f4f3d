"""Which engine holds a model: the one place that decides."""

from __future__ import annotations

from torch import nn

from zo_dist.engines.base import Engine
from zo_dist.params import unwrap


def select(model: nn.Module) -> Engine:
    """The engine of a module that is plain, in DDP, `fully_shard`-ed, cut by tensor parallelism or into a
    pipeline, or in a DeepSpeed engine.

    Raises ValueError, with the remedy, for what cannot be trained here: FSDP1, ZeRO-3 parameters
    outside a DeepSpeed engine, ZeRO++ forms that hide or quantise the written shard.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    from zo_dist.engines.auto_tp import AutoTPEngine, cuts_layers
    from zo_dist.engines.fsdp2 import FSDP2Engine
    from zo_dist.engines.pipeline import PipelineEngine, stage_of
    from zo_dist.engines.replicated import ReplicatedEngine
    from zo_dist.engines.tensor_parallel import TensorParallelEngine

    module = unwrap(model)
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        raise ValueError(
            "this model is wrapped in FullyShardedDataParallel (FSDP1), whose flattened parameters "
            "have no names of their own; shard it with torch.distributed.fsdp.fully_shard (FSDP2) "
            "(in accelerate: fsdp_version: 2)"
        )
    if type(model).__name__ == "DeepSpeedEngine":
        from zo_dist.engines.deepspeed import zero_engine

        return zero_engine(model)
    if _by_zero3(module):
        raise ValueError(
            "the parameters are partitioned by ZeRO-3, but the model is not a DeepSpeed engine; pass "
            "the engine that deepspeed.initialize(model=..., config=...) returns"
        )
    if _by_fsdp2(module):
        return FSDP2Engine(module)
    if stage_of(module) is not None:
        return PipelineEngine(module)
    if any(isinstance(p, DTensor) for p in module.parameters()):
        return TensorParallelEngine(module)
    if cuts_layers(module):
        return AutoTPEngine(module)
    return ReplicatedEngine(module)


def computes_together(model: nn.Module) -> bool:
    """Do ranks compute parts of this model for each other (tensor parallelism, a pipeline)?

    Every rank must call it; of a model that is distributed it makes the engine.
    """
    from torch.distributed.tensor import DTensor

    from zo_dist.engines.auto_tp import cuts_layers
    from zo_dist.engines.pipeline import stage_of

    module = unwrap(model)
    distributed = any(isinstance(p, DTensor) for p in module.parameters())
    if not (distributed or cuts_layers(module) or stage_of(module) is not None):
        return False
    engine = select(model)
    return engine.num_groups < engine.num_ranks


def forwards_in_step(module: nn.Module) -> bool:
    """Must all ranks make equally many forwards of this module, because each takes part in the gathers?

    True of FSDP2 and ZeRO-3 on several ranks. What makes forwards as long as its rows need them
    (generation) has to keep the ranks together then.
    """
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return _by_fsdp2(module) or _by_zero3(module)


def _by_fsdp2(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in module.modules())


def _by_zero3(module: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") for p in module.parameters())
