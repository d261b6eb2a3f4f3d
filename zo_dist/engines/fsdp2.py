"""Weights sharded by PyTorch FSDP2 (`fully_shard`), also around tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from zo_dist.engines.base import Engine, await_each_forward
from zo_dist.engines.pieces import fsdp_axis, piece_of, place_of, ranks_along, span_in
from zo_dist.params import Param, Piece, Span, canonical_name


class FSDP2Engine(Engine):
    """Row-sharded DTensors. A forward gathers each group once; a write goes to the local rows.

    A group that stays unsharded after a forward (FSDP2 leaves the root so by default) would not see
    a write, so `spans` and `publish` reshard first. Under mixed precision and CPU offload the gather
    reads, casts and copies what was written; offloaded shards are written on the CPU. (Offload to
    the CPU from a GPU has not been run.) Layers that tensor parallelism cut before stay cut while they run.
    Raises ValueError for placements other than `Shard(0)` and `Replicate` of FSDP2, and those of tensor
    parallelism that `pieces.piece_of` does not know, for parameters that no group manages, and, on every
    rank, for copies that do not start with equal weights.
    """

    name = "fsdp2"

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, FSDPModule):
            raise ValueError(
                "parts of this model are sharded by fully_shard, but the model itself is not; call "
                "fully_shard(model) last, after its layers"
            )
        self._groups = [m for m in module.modules() if isinstance(m, FSDPModule)]
        casts = (group._get_fsdp_state()._mp_policy.param_dtype for group in self._groups)
        self.compute_dtypes = frozenset(dtype for dtype in casts if dtype is not None)
        self._root = module
        self._has_run = False
        module.register_forward_pre_hook(self._note_run)
        self._reshard()
        shards: dict[str, DTensor] = {}
        for name, param in module.named_parameters():
            if not isinstance(param, DTensor):
                raise ValueError(f"parameter {name} is not sharded; do not pass it in ignored_params")
            shards[canonical_name(name)] = param
        first = next(iter(shards.values()))
        device = torch.device(first.device_mesh.device_type)
        if device.type != "cpu":
            device = torch.device(device.type, torch.accelerator.current_device_index())
        super().__init__(module, device)
        # Of a layer that tensor parallelism cuts, the axes of that follow those of FSDP2.
        most = max(shards.values(), key=lambda param: param.device_mesh.ndim)
        rows_with = ranks_along(most, fsdp_axis(most) + 1)
        for shard in shards.values():
            size = shard.device_mesh.size()
            if size not in (self.num_ranks, self.num_ranks // len(rows_with)):
                raise ValueError(
                    f"the model is sharded over {size} of {self.num_ranks} processes; every "
                    "process must be on the mesh (use a 2-D HSDP mesh for replicas)"
                )
        with self.jointly():
            self._pieces = {name: _pieces_of(name, param) for name, param in shards.items()}
        self._take_rows_with(rows_with)
        if first.to_local().device.type != device.type:
            await_each_forward(module)
        locals_ = {name: param.to_local() for name, param in shards.items()}
        self.compare_pieces(locals_, {name: place_of(param) for name, param in shards.items()})

    def _note_run(self, module: nn.Module, args: object) -> None:
        self._has_run = True

    def _reshard(self) -> None:
        for group in self._groups:
            group.reshard()

    def spans(self, params: Iterable[Param]) -> list[Span]:
        self._reshard()
        return super().spans(params)

    def _span(self, param: Param) -> Span | None:
        return span_in(self._pieces[param.name][0], param.name, _sharded(param).to_local().detach())

    def piece_of(self, name: str, param: nn.Parameter) -> Piece | None:
        return self._pieces[name][1]

    def publish(self) -> None:
        self._reshard()
        # Forward-only use grows FSDP2's per-forward lists, which only a backward would clear; before
        # the first forward there are none, and FSDP2 is not set up to be asked.
        if self._has_run:
            self._root.reset_iter_state()
            self._has_run = False

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        self._reshard()
        # An offloaded shard has to be where the process group, maybe NCCL alone, takes it.
        sharded = _sharded(param).to(self.device)
        assert isinstance(sharded, DTensor)
        yield sharded.full_tensor().detach()


def _sharded(param: Param) -> DTensor:
    """The parameter as its module holds it while sharded; FSDP2 swaps the object to unshard."""
    owner = param.owners[0]
    sharded = owner.holder._parameters[owner.attribute]
    assert isinstance(sharded, DTensor)
    return sharded


def _pieces_of(name: str, param: DTensor) -> tuple[Piece, Piece | None]:
    """What this rank holds of a parameter, and what it has of it while its owner runs."""
    axis = fsdp_axis(param)
    cut = param.placements[axis : axis + 1]
    if any(not p.is_shard(0) and not isinstance(p, _StridedShard) for p in cut):
        raise ValueError(
            f"parameter {name} is placed {param.placements}; of FSDP2 only Shard(0) and Replicate "
            "(fully_shard's default, 1-D or HSDP mesh) can be trained"
        )
    running = piece_of(name, param, axis + 1) if axis + 1 < param.device_mesh.ndim else None
    return piece_of(name, param, axis, fsdp=True), running
