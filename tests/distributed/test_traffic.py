"""What a step sends: every sharded weight once, and a handful of scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from workers import Pool, needs_deepspeed, wrap

# One collective: its operator, the elements it makes here, the bytes this rank puts in, and their dtype.
Call = tuple[str, int, int, torch.dtype | None]


class Counted(TorchDispatchMode):
    """Records every collective below torch.distributed, where FSDP2, DeepSpeed and zo_dist all end."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [pytree.tree_leaves(arg) for arg in args]
            lists = [[t for t in leaves if isinstance(t, torch.Tensor)] for leaves in tensors]
            filled = [leaves for leaves in lists if leaves]
            made, put = (filled[0], filled[-1]) if filled else ([], [])
            name = func._schema.name.split("::")[1]
            elements = sum(t.numel() for t in made)
            dtype = put[0].dtype if put else None
            self.calls.append((name, elements, sum(t.numel() * t.element_size() for t in put), dtype))
        return func(*args, **(kwargs or {}))


def one_step(engine: str, kind: str, directions: int, mode: str) -> dict[str, Any]:
    import torch.distributed as dist

    model = build(kind)
    shapes = [tuple(p.shape) for p in model.parameters()]
    optimizer = table.optimizer(wrap(engine, model), directions=directions, perturb=mode, lr=1e-3)
    batch = rows_for(kind, 2 * directions, seed=dist.get_rank())
    optimizer.step_batch(batch, loss_of)  # the self-check, and what an engine learns from its first pass
    with Counted() as counted:
        optimizer.step_batch(batch, loss_of)
    return {"calls": counted.calls, "shapes": shapes}


def padded(engine: str, shape: tuple[int, ...], ranks: int) -> int:
    """Elements of one gather: FSDP2 pads rows, ZeRO-3 elements, to a multiple of the ranks."""
    numel = torch.Size(shape).numel()
    if engine != "zero3":
        rows = -(-shape[0] // ranks) * ranks
        return rows * (numel // shape[0])
    return -(-numel // ranks) * ranks


@pytest.mark.parametrize(
    ("engine", "num_ranks"), [("fsdp2", 2), ("hsdp_2x2", 4), pytest.param("zero3", 2, marks=needs_deepspeed)]
)
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_a_stacked_step_gathers_each_weight_once(
    pool: Callable[[int], Pool], engine: str, num_ranks: int, directions: int, kind: str
) -> None:
    """From the 2 ranks that hold its shards: under HSDP the other replica sends scalars alone."""
    for result in pool(num_ranks).run(one_step, engine, kind, directions, "module"):
        weights, others = split(result["calls"])
        assert sum(c[1] for c in weights) == sum(padded(engine, shape, 2) for shape in result["shapes"])
        assert 0 < sum(c[2] for c in others) < 100 * directions


def split(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """The gathers of float32 weights over two ranks (half of what they make is put in), the rest."""
    weights = [c for c in calls if "allgather" in c[0] and c[3] == torch.float32 and c[2] == c[1] // 2 * 4]
    others = [c for c in calls if c not in weights]
    return weights, others


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_shard_mode_gathers_once_per_probe(pool: Callable[[int], Pool], engine: str) -> None:
    """The same count sees what module mode saves, so it can fail."""
    for result in pool(2).run(one_step, engine, "llama", 3, "shard"):
        weights, others = split(result["calls"])
        assert sum(c[1] for c in weights) == 6 * sum(padded(engine, s, 2) for s in result["shapes"])
        assert 0 < sum(c[2] for c in others) < 300


@pytest.mark.parametrize("directions", [1, 4])
def test_replicas_exchange_scalars_alone(pool: Callable[[int], Pool], directions: int) -> None:
    for engine in ("replicated", "ddp"):
        for result in pool(2).run(one_step, engine, "llama", directions, "module"):
            assert 0 < sum(c[2] for c in result["calls"]) < 100 * directions
