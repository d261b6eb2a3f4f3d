"""What a step sends: every sharded weight once, and a handful of scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for
from workers import Pool, needs_deepspeed, wrap

from zo_dist.planning.collectives import Counted, split


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
    if not engine.startswith("zero3"):
        rows = -(-shape[0] // ranks) * ranks
        return rows * (numel // shape[0])
    return -(-numel // ranks) * ranks


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [
        ("fsdp2", 2),
        ("fsdp2_prefetch", 2),
        ("hsdp_2x2", 4),
        pytest.param("zero3", 2, marks=needs_deepspeed),
        pytest.param("zero3_2x2", 4, marks=needs_deepspeed),
    ],
)
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "sequential"])
def test_a_stacked_step_gathers_each_weight_once(
    pool: Callable[[int], Pool], engine: str, num_ranks: int, directions: int, kind: str
) -> None:
    """From the 2 ranks that hold its shards: under HSDP the other replica sends scalars alone."""
    for result in pool(num_ranks).run(one_step, engine, kind, directions, "module"):
        weights, others = split(result["calls"], torch.float32, num_shards=2)
        assert sum(c[1] for c in weights) == sum(padded(engine, shape, 2) for shape in result["shapes"])
        assert 0 < sum(c[2] for c in others) < 100 * directions


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_shard_mode_gathers_once_per_probe(pool: Callable[[int], Pool], engine: str) -> None:
    """The same count sees what module mode saves, so it can fail."""
    for result in pool(2).run(one_step, engine, "llama", 3, "shard"):
        weights, others = split(result["calls"], torch.float32, num_shards=2)
        assert sum(c[1] for c in weights) == 6 * sum(padded(engine, s, 2) for s in result["shapes"])
        assert 0 < sum(c[2] for c in others) < 300


@pytest.mark.parametrize("directions", [1, 4])
def test_replicas_exchange_scalars_alone(pool: Callable[[int], Pool], directions: int) -> None:
    for engine in ("replicated", "ddp"):
        for result in pool(2).run(one_step, engine, "llama", directions, "module"):
            assert 0 < sum(c[2] for c in result["calls"]) < 100 * directions


def order_of_layers(engine: str) -> list[tuple[str, int]]:
    """What a step does in which order: gathers, and forwards of decoder layers, by number."""
    model = build("llama")
    layers = list(model.model.layers)
    optimizer = table.optimizer(wrap(engine, model), directions=2, lr=1e-3, sampler="adalezo")
    batch = rows_for("llama", 4)
    optimizer.step_batch(batch, loss_of)
    events: list[tuple[str, int]] = []
    with Counted() as counted:
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(
                lambda *_, n=number: events.append((f"layer {n}", len(counted.calls)))
            )
        optimizer.step_batch(batch, loss_of)
    return events


def test_fsdp2_still_gathers_a_layer_ahead(pool: Callable[[int], Pool]) -> None:
    """With forward prefetch, one more gather has begun when a layer starts than without."""
    plain, ahead = (pool(2).run(order_of_layers, e)[0] for e in ("fsdp2", "fsdp2_prefetch"))
    assert [name for name, _ in plain] == [name for name, _ in ahead]
    assert all(a == p + 1 for (_, p), (_, a) in zip(plain[:-1], ahead[:-1], strict=True))


def trace_states(steps: int) -> list[bool]:
    model = wrap("zero3", build("llama"))
    optimizer = table.optimizer(model, directions=2, lr=1e-3, sampler="adalezo")
    states = []
    for _ in range(steps):
        optimizer.step_batch(rows_for("llama", 4), loss_of)
        states.append(model.optimizer.get_param_coordinator().is_complete_trace())
    return states


@needs_deepspeed
def test_zero3_prefetches_from_a_trace_that_holds_whatever_is_drawn(pool: Callable[[int], Pool]) -> None:
    """DeepSpeed prefetches once a forward has repeated the order of modules it recorded."""
    for states in pool(2).run(trace_states, 8):
        assert all(states[2:])
