"""The start-up check names planted faults and finds none in healthy engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for
from torch import nn
from workers import (
    HAVE_DEEPSPEED,
    Pool,
    deepspeed_engine,
    digest,
    ds_config,
    needs_deepspeed,
    whole_weights,
    wrap,
)

import zo_dist

PoolOf = Callable[[int], Pool]


def check(optimizer: Any, kind: str) -> tuple[str, str]:
    """Digests before and after a step with lr 0, which runs the check."""
    before = digest(whole_weights(optimizer))
    dtype = optimizer.params[0].param.dtype
    optimizer.step_batch(rows_for(kind, 2, dtype=dtype), loss_of)
    return before, digest(whole_weights(optimizer))


def healthy(engine: str, kind: str, mode: str) -> tuple[str, str]:
    return check(table.optimizer(wrap(engine, build(kind)), lr=0.0, perturb=mode), kind)


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize(
    "engine", ["replicated", "fsdp2", "hsdp_1x2", "fsdp2_mixed", "fsdp2_offload", "zero3", "zero3_offload"]
)
def test_healthy_engines_pass_and_keep_their_bytes(pool: PoolOf, engine: str, mode: str) -> None:
    if engine.startswith("zero") and not HAVE_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    for kind in ("llama_tied", "sequential"):
        for before, after in pool(2).run(healthy, engine, kind, mode):
            assert before == after


def unsharded_root() -> tuple[str, str]:
    """FSDP2 leaves the root gathered after a forward by default; the engine sees to it."""
    from torch.distributed.fsdp import fully_shard

    model = build("llama")
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    loss_of(model, rows_for("llama", 1))
    return check(table.optimizer(model, lr=0.0), "llama")


def test_a_root_left_unsharded_is_no_fault(pool: PoolOf) -> None:
    for before, after in pool(2).run(unsharded_root):
        assert before == after


def stale_fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    from zo_dist.engines.fsdp2 import FSDP2Engine

    model = build("llama")
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    optimizer = table.optimizer(model)
    optimizer.engine.publish = lambda: None
    optimizer.engine._reshard = lambda: None
    assert isinstance(optimizer.engine, FSDP2Engine)
    # Spans of the shards themselves, as a faulty engine would hand them out while copies are alive.
    spans = optimizer.engine.spans(optimizer.params)
    optimizer.engine.spans = lambda params: [s for s in spans if s.name in {p.name for p in params}]
    optimizer.step_batch(rows_for("llama", 2), loss_of)


def stale_zero3() -> None:
    model = build("llama")
    config = ds_config(model, {"stage": 3})
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**5
    optimizer = table.optimizer(deepspeed_engine(model, config))
    optimizer.engine.publish = lambda: None
    optimizer.step_batch(rows_for("llama", 2), loss_of)


def test_a_gathered_copy_that_stays_is_found_under_fsdp2(pool: PoolOf) -> None:
    for error in pool(2).errors(stale_fsdp2):
        assert "SelfCheckError: a write to the shard of " in error
        assert ".weight" in error
        assert "Reshard after forward" in error


@needs_deepspeed
def test_a_persistent_parameter_is_found_under_zero3(pool: PoolOf) -> None:
    for error in pool(2).errors(stale_zero3):
        assert "SelfCheckError: a write to the shard of " in error
        assert ".weight" in error
        assert "stage3_param_persistence_threshold" in error


class HalfUsed(nn.Module):
    """Its second block runs, but what it says is multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        out: torch.Tensor = self.head(first + 0 * self.blocks[1](first))
        return out


def ignored_arm(engine: str, mode: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HalfUsed()
    optimizer = table.optimizer(wrap(engine, model), perturb=mode)
    optimizer.step_batch(rows_for("sequential", 2), loss_of)


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_an_arm_without_effect_is_found(pool: PoolOf, engine: str) -> None:
    for error in pool(2).errors(ignored_arm, engine, "module"):
        assert "SelfCheckError: shifting the weights of blocks.1 does not change the loss" in error


@pytest.mark.parametrize(
    ("dtype", "eps", "share"),
    # Up to 1.5 bfloat16 has steps of .0078, of which float16 has an eighth.
    [
        (torch.bfloat16, 1e-3, True),
        (torch.bfloat16, 0.1, False),
        (torch.float16, 1e-3, False),
        (torch.float32, 1e-3, False),
    ],
)
def test_weights_that_eps_cannot_shift_are_told(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, eps: float, share: bool
) -> None:
    model = build("llama", dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-1.5, 1.5)
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    shifted = (values.float() + eps).to(dtype)
    # A shift of less than half of a step is rounded away.
    assert bool((shifted == values).float().mean() > 0.01) == share
    for structure in (None, zo_dist.Orthogonal()):
        caplog.clear()
        zo_dist.ZeroOrder(model, eps=eps, structure=structure).prepare(rows_for("llama", 2), loss_of)
        assert ("cannot be shifted by eps" in caplog.text) == share
