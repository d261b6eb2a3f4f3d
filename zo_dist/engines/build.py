"""Shard a model the ways the engines read: what a training script does before `ZeroOrder`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zo_dist.engines.ds_config import DsConfig
from zo_dist.params import find_layers


def require_process_group(kind: str) -> None:
    """ValueError, with the remedy, where no launcher has set up processes."""
    if not dist.is_initialized():
        raise ValueError(
            f"engine.kind {kind} shards weights over processes, and there is no process group: start "
            "with torchrun --nproc-per-node N -m zo_dist ... (N may be 1) or the deepspeed launcher"
        )


def shard_with_fsdp2(module: nn.Module, device: torch.device, shard_ranks: int | None = None) -> nn.Module:
    """`fully_shard` each layer, then the root, which keeps embeddings and head, tied or not, together.

    `shard_ranks`: shard over groups of so many consecutive ranks, replicas between the groups
    (HSDP); it must divide the number of ranks. Every group reshards after its forward, so that a
    write to a shard reaches the next one. Parameters move to `device`, one group at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    num_ranks = dist.get_world_size()
    if shard_ranks is None or shard_ranks == num_ranks:
        mesh = init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    elif num_ranks % shard_ranks:
        raise ValueError(f"shard_ranks is {shard_ranks}; it must divide the number of ranks, {num_ranks}")
    else:
        shape = (num_ranks // shard_ranks, shard_ranks)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for _, layer in find_layers(module):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


@contextmanager
def zero3_loading(ds: DsConfig) -> Iterator[None]:
    """Inside, `from_pretrained` builds models partitioned from the start (zero.Init)."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # zero.Init shards over deepspeed's idea of the process group: one rank, until it takes up torch's.
    deepspeed.init_distributed()
    # transformers keeps a weak reference only.
    alive = HfDeepSpeedConfig(ds.config)  # type: ignore[no-untyped-call,unused-ignore]
    try:
        yield
    finally:
        del alive


def zero3_engine(module: nn.Module, ds: DsConfig) -> nn.Module:
    """The DeepSpeed engine that gathers and releases the weights of `module`: no optimizer in it."""
    import deepspeed

    engine: Any = deepspeed.initialize(model=module, config=ds.config)[0]
    wrapped: nn.Module = engine
    return wrapped
