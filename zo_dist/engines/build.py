"""Shard a model the ways the engines read: what a training script does before `ZeroOrder`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from zo_dist.engines.auto_tp import cuts_layers
from zo_dist.engines.base import Engine
from zo_dist.engines.ds_config import DsConfig
from zo_dist.memory import freed_at_once
from zo_dist.params import find_layers, is_quantised


def require_process_group(kind: str) -> None:
    """ValueError, with the remedy, where no launcher has set up processes."""
    if not dist.is_initialized():
        raise ValueError(
            f"engine.kind {kind} shards weights over processes, and there is no process group: start "
            "with torchrun --nproc-per-node N -m zo_dist ... (N may be 1) or the deepspeed launcher"
        )


def fsdp2_mesh(device: torch.device, shard_ranks: int | None = None) -> DeviceMesh:
    """The ranks that hold a copy of the weights together, and their replicas. Every rank must call it.

    `shard_ranks`: so many consecutive ranks hold a copy (a 2-D mesh: HSDP), or all (1-D) if it is
    None. ValueError, with the legal numbers, if it does not divide the number of ranks.
    """
    num_ranks = dist.get_world_size()
    if shard_ranks is None or shard_ranks == num_ranks:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    require_divisor("engine.shard_ranks", shard_ranks, num_ranks, f"the number of ranks, {num_ranks}", "all")
    shape = (num_ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def require_divisor(key: str, value: int, number: int, what: str, null: str) -> None:
    """ValueError, with the legal values of `key`, unless `value` divides `number`, which is called `what`.

    `null`: what null is for.
    """
    if number % value:
        legal = [str(n) for n in range(1, number + 1) if number % n == 0]
        raise ValueError(f"{key} is {value}; it must divide {what}: {', '.join(legal)}, or null for {null}")


def shard_with_fsdp2(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    offload_to_cpu: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """`fully_shard` each layer, then the root, which keeps embeddings and head, tied or not, together.

    Every group reshards after its forward, so that a write to a shard reaches the next one.
    Parameters move to the mesh's device, one group at a time. `offload_to_cpu`: their shards go back
    to pinned CPU memory, and a gather copies them to the device first (where that is the CPU, FSDP2
    copies nothing). `compute_dtype`: what a gather casts to; the shards keep their dtype, and the
    gather's traffic is that of `compute_dtype`. Both were run on CPU ranks only, not on a GPU. ValueError
    for weights that FSDP2 cannot split (torchao's int8).
    """
    # Page-locked memory needs an accelerator to copy to.
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload_to_cpu else OffloadPolicy()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "offload_policy": offload}
    options["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype)
    try:
        for _, layer in find_layers(module):
            fully_shard(layer, **options)
        fully_shard(module, **options)
    except NotImplementedError as error:
        kinds = {type(p).__name__ for p in module.parameters() if is_quantised(p)}
        if not kinds:
            raise
        raise ValueError(
            f"FSDP2 cannot split weights that are stored as {', '.join(sorted(kinds))}: leave the base "
            "unquantised, or hold it whole on each rank (without fsdp; engine.kind replicated)"
        ) from error
    return module


def is_cpu_offload(policy: object) -> bool:
    """Is this FSDP2's policy that keeps shards in CPU memory?"""
    return isinstance(policy, CPUOffloadPolicy)


class NotInPartsError(ValueError):
    """A rank cannot read its part of this model alone; the message says why."""


@contextmanager
def reading_shards(shard: Callable[[nn.Module], nn.Module], num_shards: int) -> Iterator[None]:
    """Inside, `from_pretrained` with a `distributed_config` reads what this rank holds, no more.

    It is `DistributedConfig(tp_size=1, fsdp_size=1)`. transformers builds the model without memory, has a
    hook of its own shard it, then reads, converts and casts slices of the files (since 5.15). Its sharding
    makes other groups than `shard_with_fsdp2`, needs a plan that some models lack, and more than one process:
    so `shard` takes the hook's place. Shards come to the mesh's device; buffers stay on the CPU until
    `.to(device)`. NotInPartsError, before anything is read, for a model with quantised weights, or with fewer
    experts than leave one for each of `num_shards` ranks.
    """

    def hook(cls: type[PreTrainedModel], model: PreTrainedModel, *others: object) -> nn.Module:
        if getattr(model.config, "quantization_config", None) is not None:
            raise NotInPartsError("its weights are quantised")
        # Experts in a file each are stacked, which fails where there is none.
        stacked = {param.shape[0] for param in model.parameters() if param.ndim > 2}
        few = [rows for rows in stacked if -(-rows // num_shards) * (num_shards - 1) >= rows]
        if few and num_shards > 1:
            raise NotInPartsError(f"its {few[0]} experts leave none for some of {num_shards} ranks")
        # Else FSDP2 takes what is tied after it was read for two parameters.
        model.tie_weights()
        return shard(model)

    PreTrainedModel.maybe_distribute_model = classmethod(hook)  # type: ignore[assignment]
    try:
        yield
    finally:
        # What it inherits is found again.
        del PreTrainedModel.maybe_distribute_model


def shard_by_rows(module: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """Make each parameter, which has no memory yet, rows over a group: what `zero3_engine` takes.

    ValueError, before anything is read, for a group that takes no CPU tensors: rows are read there.
    """
    ranks = group or dist.group.WORLD
    assert ranks is not None
    if "cpu" not in dist.get_backend_config(ranks):
        raise ValueError(
            f"the process group has the backends {dist.get_backend_config(ranks)}, none of them for the CPU, "
            'where ranks read their slices: init_process_group("cpu:gloo,cuda:nccl")'
        )
    mesh = DeviceMesh.from_group(ranks, "cpu")

    def rows_of(param: nn.Parameter) -> nn.Parameter:
        places = [Shard(0) if param.ndim else Replicate()]
        rows = distribute_tensor(param.detach(), mesh, places, src_data_rank=None)
        return nn.Parameter(rows, requires_grad=param.requires_grad)

    _replace_parameters(module, rows_of)
    return module


@contextmanager
def zero3_loading(ds: DsConfig) -> Iterator[None]:
    """Inside, `from_pretrained` builds models partitioned from the start (zero.Init), read by rank 0."""
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


def zero3_group(shard_ranks: int | None) -> dist.ProcessGroup | None:
    """This rank's group of so many consecutive ranks, or None for all of them. Every rank must call it.

    ValueError, with the legal numbers, if `shard_ranks` does not divide the number of ranks.
    """
    num_ranks = dist.get_world_size()
    if shard_ranks is None or shard_ranks == num_ranks:
        return None
    require_divisor("engine.shard_ranks", shard_ranks, num_ranks, f"the number of ranks, {num_ranks}", "all")
    group: dist.ProcessGroup = dist.new_subgroups(shard_ranks)[0]  # type: ignore[no-untyped-call]
    return group


def zero3_engine(module: nn.Module, ds: DsConfig, group: dist.ProcessGroup | None = None) -> nn.Module:
    """The DeepSpeed engine that gathers and releases the weights of `module`: no optimizer in it.

    `group`: the ranks that hold a copy together. `module`: its weights are rows over that group
    (`shard_by_rows`), or partitioned already, or whole on each rank; then they are partitioned here, one
    weight at a time.
    """
    import deepspeed

    deepspeed.init_distributed()
    if ds.offload_param == "nvme":
        from deepspeed.accelerator import get_accelerator

        with Engine(module, torch.device(get_accelerator().current_device_name())).jointly():
            _require_nvme(module, ds, dist.get_world_size(group))
    if not any(hasattr(param, "ds_id") for param in module.parameters()):
        rows = any(isinstance(param, DTensor) for param in module.parameters())
        if not rows:
            # What is partitioned keeps its dtype, and `initialize` casts none of it.
            cast_parameters(module, ds.dtype)
        # Not left to `initialize`, whose buffers for NVMe are of another dtype on a CPU.
        init: Any = deepspeed.zero.Init(
            module=None if rows else module, data_parallel_group=group, config_dict_or_path=ds.config
        )
        if rows:
            _partition_rows(module, init)
        # Weights are where they belong, and those of a dry run cannot be moved.
        if any(buffer.device != init.local_device for buffer in module.buffers()):
            module.to(init.local_device)
    engine: Any = deepspeed.initialize(model=module, config=ds.config)[0]
    wrapped: nn.Module = engine
    return wrapped


def autotp_engine(module: nn.Module, ds: DsConfig) -> nn.Module:
    """The DeepSpeed engine of `module`, whole on each rank, whose layers AutoTP cuts: no optimizer in it.

    ValueError, on every rank, for what AutoTP does not cut.
    """
    import deepspeed

    deepspeed.init_distributed()
    cast_parameters(module, ds.dtype)
    frozen = [n for n, p in module.named_parameters() if p.is_floating_point() and not p.requires_grad]
    # It hangs hooks for gradients on some, which frozen parameters refuse.
    for name in frozen:
        module.get_parameter(name).requires_grad_()
    try:
        engine: Any = deepspeed.initialize(model=module, config=ds.config)[0]
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"tensor_parallel.autotp_size is {ds.tensor_ranks}, but AutoTP does not cut "
            f"{type(module).__name__}: {error}"
        ) from error
    if not cuts_layers(module):
        raise ValueError(
            f"tensor_parallel.autotp_size is {ds.tensor_ranks}, but AutoTP found no layer of "
            f"{type(module).__name__} to cut: see the patterns of tensor_parallel.partition_config"
        )
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    wrapped: nn.Module = engine
    return wrapped


def cast_parameters(module: nn.Module, dtype: torch.dtype | None) -> None:
    """As DeepSpeed does it, one by one, and no buffers: those of rotary positions stay in float32."""
    for param in module.parameters() if dtype is not None else ():
        if param.is_floating_point():
            param.data = param.data.to(dtype)


def _require_nvme(module: nn.Module, ds: DsConfig, num_shards: int) -> None:
    """ValueError, with the remedy, where DeepSpeed would fail to hold weights on NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ValueError(
            "offload_param.device is nvme, for which DeepSpeed's async_io needs libaio: install it (Debian: "
            "apt-get install libaio-dev), or set the device to cpu or none"
        )
    size = int(ds.config["zero_optimization"]["offload_param"].get("buffer_size", 1e8))
    largest = max(-(-getattr(p, "ds_numel", p.numel()) // num_shards) for p in module.parameters())
    if largest > size:
        raise ValueError(
            f"offload_param.buffer_size is {size} elements, but a rank's part of the largest weight has "
            f"{largest}: set it to that at least"
        )


def _partition_rows(module: nn.Module, init: Any) -> None:
    """Make the rows that each rank holds partitions of a `zero.Init`, cut flat, one weight at a time.

    Where ranks have equally many rows those are the partition: on a CPU, without offload, in the same memory,
    which may be a file's pages. Else the weight is gathered, and cut by DeepSpeed.
    """

    def partition_of(param: nn.Parameter) -> nn.Parameter:
        rows: Any = param.detach()
        mesh, kept = rows.device_mesh, False
        # Memory that is not written to takes none.
        whole = torch.empty(rows.shape, dtype=init.dtype, device=init.local_device)
        if rows.ndim and rows.shape[0] % mesh.size() == 0:
            mine = rows.to_local().reshape(-1)
            kept = (mine.device, mine.dtype) == (init.remote_device, init.dtype)
            if not kept:
                whole.view(-1).narrow(0, mesh.get_local_rank() * len(mine), len(mine)).copy_(mine)
        else:
            whole.copy_(rows.full_tensor())
        partitioned = nn.Parameter(whole, requires_grad=param.requires_grad)
        init._convert_to_deepspeed_param(partitioned)
        of_zero: Any = partitioned
        of_zero.partition()
        if kept:
            of_zero.ds_tensor.data = mine
        return partitioned

    # Holes of DeepSpeed's copies added up to a third of a model.
    with freed_at_once():
        _replace_parameters(module, partition_of)


def _replace_parameters(module: nn.Module, replacement: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put another in the place of each parameter, in all its places where it is tied, and let go of it."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for holder in module.modules():
        for name, param in holder._parameters.items():
            if param is not None:
                places.setdefault(param, []).append((holder, name))
    while places:
        param = next(iter(places))
        new = replacement(param)
        for holder, name in places.pop(param):
            setattr(holder, name, new)
