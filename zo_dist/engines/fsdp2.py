"""Weights sharded by PyTorch FSDP2 (`fully_shard`), on a 1-D mesh or HSDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from zo_dist.engines.base import Engine, await_each_forward
from zo_dist.params import Param, Span, canonical_name


class FSDP2Engine(Engine):
    """Row-sharded DTensors. A forward gathers each group once; a write goes to the local rows.

    A group that stays unsharded after a forward (FSDP2 leaves the root so by default) would not see
    a write, so `spans` and `publish` reshard first. Under mixed precision and CPU offload the gather
    reads, casts and copies what was written; offloaded shards are written on the CPU. (Offload to
    the CPU from a GPU has not been run.) Raises ValueError for placements other than
    `Shard(0)` and `Replicate`, for parameters that no group manages, and, on every rank, for HSDP
    replicas that do not start with equal weights.
    """

    name = "fsdp2"

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, FSDPModule):
            raise ValueError(
                "parts of this model are sharded by fully_shard, but the model itself is not; call "
                "fully_shard(model) last, after its layers"
            )
        self._groups = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self._root = module
        self._has_run = False
        module.register_forward_pre_hook(self._note_run)
        self._reshard()
        shards: dict[str, DTensor] = {}
        for name, param in module.named_parameters():
            if not isinstance(param, DTensor):
                raise ValueError(f"parameter {name} is not sharded; do not pass it in ignored_params")
            if not all(isinstance(p, Replicate) or p == Shard(0) for p in param.placements):
                raise ValueError(
                    f"parameter {name} is placed {param.placements}; only Shard(0) and Replicate "
                    "(fully_shard's default, 1-D or HSDP mesh) can be trained"
                )
            shards[canonical_name(name)] = param
        first = next(iter(shards.values()))
        mesh = first.device_mesh
        device = torch.device(mesh.device_type)
        if device.type != "cpu":
            device = torch.device(device.type, torch.accelerator.current_device_index())
        super().__init__(module, device)
        if mesh.size() != self.num_ranks:
            raise ValueError(
                f"the model is sharded over {mesh.size()} of {self.num_ranks} processes; every "
                "process must be on the mesh (use a 2-D HSDP mesh for replicas)"
            )
        if first.to_local().device.type != device.type:
            await_each_forward(module)
        pieces = {name: param.to_local() for name, param in shards.items()}
        self.compare_copies(pieces, _ranks_of_same_shard(first))

    def _note_run(self, module: nn.Module, args: object) -> None:
        self._has_run = True

    def _reshard(self) -> None:
        for group in self._groups:
            group.reshard()

    def spans(self, params: Iterable[Param]) -> list[Span]:
        self._reshard()
        return super().spans(params)

    def _span(self, param: Param) -> Span | None:
        sharded = _sharded(param)
        local = sharded.to_local().detach()
        return Span(param.name, local.reshape(-1), _first_row(sharded) * local[:1].numel())

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


def _ranks_of_same_shard(param: DTensor) -> list[int]:
    """The ranks whose shards are copies of this rank's, itself among them: one per HSDP replica."""
    mesh, coordinate = param.device_mesh, param.device_mesh.get_coordinate()
    assert coordinate is not None
    axes = zip(param.placements, coordinate, strict=True)
    return mesh.mesh[tuple(slice(None) if p == Replicate() else c for p, c in axes)].flatten().tolist()


def _first_row(param: DTensor) -> int:
    """The first row of this rank's shard; FSDP2 cuts dim 0 as `torch.chunk` does."""
    for axis, placement in enumerate(param.placements):
        if placement == Shard(0):
            coordinate = param.device_mesh.get_coordinate()
            assert coordinate is not None
            rows, parts = param.shape[0], param.device_mesh.size(axis)
            return min(coordinate[axis] * -(-rows // parts), rows)
    return 0
