"""What holds for every way to steer: in parts, in chunks, in a snapshot, and where arms were not drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import Injected
from models import build, rows_for, step
from torch import nn
from workers import HAVE_DEEPSPEED, Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist.snapshot import load_snapshot, save_snapshot

# Options of `table.optimizer`, by what `ZeroOrder` calls each.
STEERED: dict[str, dict[str, Any]] = {
    "curvature": {"noise": "gaussian", "estimator": "three_sided"},
    "perturbation_momentum": {"noise": "zo_adamu"},
}
every_steering = pytest.mark.parametrize("steering", list(STEERED))


def make(steering: str, model: nn.Module | None = None, **options: Any) -> zo_dist.ZeroOrder:
    shared = {"lr": 2.0**-7, "eps": 2.0**-6, "seed": 4, "self_check": False, **STEERED[steering]}
    optimizer = table.optimizer(build("sequential") if model is None else model, **{**shared, **options})
    assert optimizer.steering is getattr(optimizer, steering)
    assert optimizer.steering.used
    return optimizer


@every_steering
def test_what_is_kept_of_arms_that_were_not_drawn_stays(steering: str) -> None:
    optimizer = make(steering, sampler="uniform")
    stayed = 0
    for _ in range(6):
        before = {name: kept.clone() for name, kept in optimizer.steering.kept.items()}
        step(optimizer)
        drawn = set(optimizer.record.arms[0])
        for i, arm in enumerate(optimizer.arms):
            for param in arm.params:
                kept = optimizer.steering.kept[param.name]
                assert torch.equal(kept, before[param.name]) == (i not in drawn)
        stayed += len(optimizer.arms) - len(drawn)
    assert stayed


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@every_steering
def test_chunks_leave_the_same_bits(steering: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(steering, perturb="shard")
    step(expected, 5)
    monkeypatch.setattr("zo_dist.update._CHUNK", chunk)
    monkeypatch.setattr("zo_dist.steering._CHUNK", chunk)
    for compiled in (False, True):
        optimizer = make(steering, perturb="shard", compile=compiled)
        step(optimizer, 5)
        assert digest(whole_weights(optimizer)) == digest(whole_weights(expected))
        assert digest(optimizer.steering.kept) == digest(expected.steering.kept)


def resumed_on_rank(steering: str, engine: str, snapshot: str, steps: int) -> tuple[str, float]:
    optimizer = make(steering, wrap(engine, build("sequential", torch.bfloat16)), perturb="shard")
    load_snapshot(optimizer, snapshot)
    # Every rank has the same rows, and so the same means.
    rows = rows_for("sequential", 4, dtype=torch.bfloat16)
    known = Injected("shard", 1, estimator=STEERED[steering].get("estimator", "two_sided"))
    for _ in range(steps):
        optimizer.step_batch(rows, known)
    total = sum(float(kept.double().abs().sum()) for kept in optimizer.steering.kept.values())
    return digest(whole_weights(optimizer)), total


@needs_deepspeed
@every_steering
def test_a_snapshot_goes_on_with_the_same_bits_on_every_engine(
    steering: str, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    ran = make(steering, build("sequential", torch.bfloat16), perturb="shard")
    step(ran, 6)
    snapshot = str(save_snapshot(ran, tmp_path))
    (expected, total), *_ = pool(1).run(resumed_on_rank, steering, "replicated", snapshot, 8)
    for engine, ranks in (("fsdp2", 2), ("fsdp2", 3), ("zero3", 2)):
        got = pool(ranks).run(resumed_on_rank, steering, engine, snapshot, 8)
        assert [of_rank[0] for of_rank in got] == [expected] * ranks
        assert sum(of_rank[1] for of_rank in got) == pytest.approx(total, rel=1e-12)


def refusal_on_rank(steering: str, engine: str) -> str:
    with pytest.raises(ValueError, match=r"perturb is 'module'.*use perturb: shard") as caught:
        make(steering, wrap(engine, build("sequential")))
    return str(caught.value)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@every_steering
def test_module_mode_is_refused_where_weights_are_sharded(
    steering: str, engine: str, pool: Callable[[int], Pool]
) -> None:
    if engine == "zero3" and not HAVE_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    for message in pool(2).run(refusal_on_rank, steering, engine):
        assert f"of what {steering} keeps" in message
        assert "has only a part" in message
