"""Which elements of a weight a DTensor has on this rank: under FSDP2, tensor parallelism, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from zo_dist.params import Piece, Runs, Span


def fsdp_axis(param: DTensor) -> int:
    """The mesh axis along which FSDP2 cuts this parameter of its own: those after it are tensor parallel.

    FSDP2 puts its axes first, and of these shards the last; it is the number of axes where it cuts none.
    """
    whole = [isinstance(placement, Replicate) for placement in param.placements]
    return whole.index(False) if False in whole else len(whole)


def ranks_along(param: DTensor, first_axis: int) -> list[int]:
    """The ranks that differ from this one along axes from `first_axis` on, itself among them."""
    return param.device_mesh.mesh[_coordinate(param)[:first_axis]].flatten().tolist()


def place_of(param: Tensor) -> int:
    """A number that those ranks alone share that hold the same piece."""
    place = 0
    if not isinstance(param, DTensor):
        return place
    for placement, at, parts in _axes(param):
        place = place * parts + (0 if isinstance(placement, Replicate) else at)
    return place


def piece_of(name: str, param: DTensor, first_axis: int = 0, fsdp: bool = False) -> Piece:
    """What this rank has of a parameter that is cut along the mesh axes from `first_axis` on.

    `fsdp`: the first of these axes is FSDP2's, which cuts rows of what the others leave. ValueError for
    placements that leave no equal runs at equal distances.
    """
    index = [torch.arange(size) for size in param.shape]
    axes = _axes(param)
    cut: set[int] = set()
    for axis in range(len(axes) - 1, first_axis - 1, -1):
        placement, at, parts = axes[axis]
        if isinstance(placement, Replicate):
            continue
        last = fsdp and axis == first_axis
        if not isinstance(placement, Shard | _StridedShard) or (placement.dim in cut and not last):
            raise _unknown(name, param)
        # Fused weights (gate and up) are cut one by one; on its own axis FSDP2 means its order by this.
        fused = placement.split_factor if isinstance(placement, _StridedShard) and not last else 1
        blocks = index[placement.dim].chunk(int(fused))
        index[placement.dim] = torch.cat([_chunk(block, at, parts) for block in blocks])
        cut.add(placement.dim)
    piece = piece_at(param.shape, index)
    if piece is None:
        raise _unknown(name, param)
    return piece


def piece_at(whole: torch.Size, index: Sequence[Tensor]) -> Piece | None:
    """What has these numbers along each dimension of a weight; None if not equal runs at equal distances."""
    shape = torch.Size(len(i) for i in index)
    parted = [dim for dim, i in enumerate(index) if len(i) != whole[dim]]
    if not parted or not shape.numel():
        return Piece(shape)
    inner = math.prod(whole[parted[-1] + 1 :])
    along = index[parted[-1]]
    begins = torch.cat([along[:1], along[1:][along.diff() != 1]])
    starts = torch.zeros(1, dtype=torch.int64)
    for size, of_dim in zip(whole, [*index[: parted[-1]], begins], strict=False):
        starts = (starts.unsqueeze(1) * size + of_dim).flatten()
    starts, width = starts * inner, len(along) // len(begins) * inner
    steps = sorted(set(starts.diff().tolist()))
    if len(along) % len(begins) or len(steps) > 1:
        return None
    contiguous = not steps or steps[0] == width
    return Piece(shape, int(starts[0]), None if contiguous else Runs(width, steps[0]))


def local_of(weight: Tensor) -> Tensor:
    """What this rank has of a weight; all of one that is no DTensor."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def span_in(piece: Piece | None, name: str, local: Tensor) -> Span:
    """The span of `local`, which is this piece of a weight; None for all of it."""
    _, offset, runs = piece or Piece(local.shape)
    return Span(name, local.reshape(-1), offset, runs)


def like(weight: Tensor, local: Tensor) -> Tensor:
    """A tensor that lies on the ranks as `weight` does, of which this one has `local`, flat."""
    if not isinstance(weight, DTensor):
        return local.view(weight.shape)
    shaped = local.view(weight.to_local().shape)
    place = weight.device_mesh, weight.placements
    return DTensor.from_local(shaped, *place, run_check=False, shape=weight.shape, stride=weight.stride())


def added_up(out: Tensor) -> Tensor:
    """`out`, with what ranks have yet to add up added up: rows of it can then be taken and put elsewhere."""
    if not isinstance(out, DTensor) or not any(p.is_partial() for p in out.placements):
        return out
    return out.redistribute(placements=[Replicate() if p.is_partial() else p for p in out.placements])


def _axes(param: DTensor) -> list[tuple[Any, int, int]]:
    """Of each axis of its mesh: the placement, where this rank is, and how many ranks there are."""
    return list(zip(param.placements, _coordinate(param), param.device_mesh.shape, strict=True))


def _coordinate(param: DTensor) -> tuple[int, ...]:
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(coordinate)


def _chunk(index: Tensor, at: int, parts: int) -> Tensor:
    """Chunk number `at` of `parts`, of which the last may be shorter or empty."""
    size = -(-len(index) // parts)
    return index[at * size : (at + 1) * size]


def _unknown(name: str, param: DTensor) -> ValueError:
    return ValueError(
        f"parameter {name} is placed {param.placements} on a mesh of {tuple(param.device_mesh.shape)}, and "
        "what a rank has of it is not equal runs at equal distances; cut it along one dimension by tensor "
        "parallelism, and along the first by FSDP2 after it"
    )
