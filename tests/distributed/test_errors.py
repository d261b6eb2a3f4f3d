"""Bad input stops every rank with a clear message, and none of them hangs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import Injected, remembered_noise
from models import build, cut, loss_of, rows_for
from tiny_run import environment
from workers import Pool, deepspeed_engine, digest, ds_config, needs_deepspeed, whole_weights, wrap

from zo_dist.engines import on_each_node_first

PoolOf = Callable[[int], Pool]


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def make(engine: str, **options: Any) -> Any:
    return table.optimizer(wrap(engine, build("sequential")), self_check=False, **options)


def test_a_rate_that_is_no_number_writes_nothing() -> None:
    optimizer = table.optimizer(build("sequential"), lr=0.1)
    before = digest(whole_weights(optimizer))
    for lr in (math.nan, math.inf, -1.0):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match=r"lr is .* at step 0; a schedule must keep it finite"):
            optimizer.step_batch(rows_for("sequential", 4), loss_of)
    assert (digest(whole_weights(optimizer)), optimizer.step_count) == (before, 0)


def test_a_check_that_an_error_ends_leaves_the_weights_and_is_made_again() -> None:
    rows, forwards, last = rows_for("sequential", 4), 0, math.inf

    def counted(model: Any, batch: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if forwards == last:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    table.optimizer(build("sequential"), lr=0.1).prepare(rows, counted)
    whole = forwards
    assert whole >= 3
    for last in range(1, whole + 1):
        optimizer, forwards = table.optimizer(build("sequential"), lr=0.1), 0
        before = digest(whole_weights(optimizer))
        with pytest.raises(KeyboardInterrupt):
            optimizer.prepare(rows, counted)
        assert digest(whole_weights(optimizer)) == before, last
        forwards, last = 0, math.inf
        optimizer.prepare(rows, counted)
        assert forwards == whole


def with_files_that_rank_1_cannot_read() -> None:
    def job() -> None:
        if rank() == 1:
            raise OSError("no such snapshot of the tokenizer")

    on_each_node_first(job)


def test_what_one_rank_cannot_read_is_told_by_all(pool: PoolOf) -> None:
    first, second = pool(2).errors(with_files_that_rank_1_cannot_read)
    assert "rank 1 failed to prepare its files: no such snapshot of the tokenizer" in first
    assert "OSError" in second


def with_a_setting_of_its_own(engine: str, options: dict[str, list[Any]]) -> None:
    make(engine, **{key: values[rank()] for key, values in options.items()})


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": [1e-3, 2e-3]},
        {"seed": [0, 1]},
        {"eps": [1e-3, 1e-2]},
        {"directions": [1, 2]},
        {"rounding": ["kahan", "nearest"]},
        {"noise": ["rademacher", "gaussian"]},
        {"perturb": ["module", "shard"]},
        {"sampler": ["dense", "uniform"]},
        {"estimator": ["two_sided", "one_sided"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_that_differ_between_ranks(pool: PoolOf, engine: str, options: dict[str, list[Any]]) -> None:
    for error in pool(2).errors(with_a_setting_of_its_own, engine, options):
        assert "ValueError: ranks disagree" in error
        key = next(iter(options))
        assert key in error or key in ("sampler", "estimator")


@pytest.mark.parametrize(
    "options",
    [
        {"lr": [1e-3, -1.0]},
        {"eps": [1e-3, float("nan")]},
        {"directions": [0, 1]},
        {"rounding": ["kahan", "up"]},
        {"noise": ["rademacher", "cauchy"]},
        {"perturb": ["module", "layer"]},
        {"seed": [0, -1]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_bad_setting_on_one_rank_stops_both(pool: PoolOf, options: dict[str, list[Any]]) -> None:
    key = next(iter(options))
    for error in pool(2).errors(with_a_setting_of_its_own, "replicated", options):
        assert "ValueError" in error
        assert key in error


def with_weights_of_its_own(engine: str) -> None:
    table.optimizer(wrap(engine, build("sequential", seed=rank())))


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [("replicated", 3), ("hsdp_2x2", 4), ("tp_2x2", 4), pytest.param("zero3_2x2", 4, marks=needs_deepspeed)],
)
def test_starting_weights_that_differ_between_replicas(pool: PoolOf, engine: str, num_ranks: int) -> None:
    for error in pool(num_ranks).errors(with_weights_of_its_own, engine):
        assert "ValueError: ranks disagree on the starting weights: 0.weight" in error


def with_nan(engine: str, mode: str, max_skipped: int) -> dict[str, Any]:
    """A NaN on row 5, which the last rank holds, in steps 1 and 2."""
    optimizer = make(engine, lr=0.1, perturb=mode, directions=2, max_skipped=max_skipped)
    batch = cut(rows_for("sequential", 6), 3 * rank(), 3 * rank() + 3)
    losses, digests, means = Injected(mode, 2), [digest(whole_weights(optimizer))], []
    with remembered_noise():
        for step in range(4):
            losses.nan_at = (step, 5) if step in (1, 2) else None
            means.append(optimizer.step_batch(batch, losses))
            digests.append(digest(whole_weights(optimizer)))
    return {"digests": digests, "means": means, "skipped": optimizer.skipped}


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_a_nan_on_one_rank_skips_the_step_on_all(pool: PoolOf, engine: str, mode: str) -> None:
    for result in pool(2).run(with_nan, engine, mode, 2):
        start, *after = result["digests"]
        assert after[0] != start
        assert after[0] == after[1] == after[2]
        assert after[3] != after[2]
        assert [math.isnan(m) for m in result["means"]] == [False, True, True, False]
        assert result["skipped"] == 2


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_too_many_nans_in_a_row_stop_the_run(pool: PoolOf, engine: str) -> None:
    for error in pool(2).errors(with_nan, engine, "module", 1):
        assert "NonFiniteLossError: 2 steps in a row" in error


def with_a_bad_weight(engine: str, value: float) -> None:
    """One stored number of rank 1 is none, as after bad memory or an update that overflowed."""
    optimizer = make(engine, lr=0.1, directions=2, max_skipped=3)
    spans = optimizer.engine.spans(optimizer.params)
    if rank() == 1:
        spans[-1].flat[0] = value
    before = [span.flat.view(torch.int32).tolist() for span in spans]
    batch = cut(rows_for("sequential", 6), 3 * rank(), 3 * rank() + 3)
    try:
        for _ in range(10):
            optimizer.step_batch(batch, loss_of)
    finally:
        spans = optimizer.engine.spans(optimizer.params)
        assert [span.flat.view(torch.int32).tolist() for span in spans] == before, "a rank wrote"
        assert (optimizer.skipped, optimizer.step_count) == (4, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_a_weight_that_is_no_number_stops_the_run(pool: PoolOf, engine: str, value: float) -> None:
    for error in pool(2).errors(with_a_bad_weight, engine, value):
        assert "NonFiniteLossError: 4 steps in a row had a loss that is not finite" in error
        assert "more than max_skipped=3" in error


FAILS_ON_RANK_1 = """
import sys, torch, torch.distributed as dist, zo_dist
from torch.distributed.fsdp import fully_shard
from zo_dist.engines import initialize_process_group

initialize_process_group()
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
if sys.argv[1] == "fsdp2":
    fully_shard(model)
optimizer = zo_dist.ZeroOrder(model)

def row_loss(model, batch):
    if dist.get_rank() == 1 and optimizer.step_count == 3:
        raise RuntimeError("a row that cannot be scored")
    return model(batch["x"]).sum(1)

for _ in range(1000):
    optimizer.step_batch({"x": torch.ones(2, 4)}, row_loss)
"""


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
def test_a_loss_that_raises_on_one_rank_ends_all(tmp_path: Path, engine: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILS_ON_RANK_1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), engine]
    # The start takes most of it; the launcher gives the others 30 s to leave.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode != 0
    assert "RuntimeError: a row that cannot be scored" in done.stderr
    assert "rank      : 1" in done.stderr


def with_a_bad_batch(engine: str, case: str) -> None:
    optimizer = make(engine, directions=3)
    batch: Any = cut(rows_for("sequential", 2), rank(), rank() + 1)
    if case == "bad on rank 1" and rank() == 1:
        batch["y"] = torch.zeros(2)
        batch["x"] = torch.zeros(3, 3)
    if case == "empty list on rank 1" and rank() == 1:
        batch = []
    optimizer.step_batch(batch, loss_of)


@pytest.mark.parametrize("engine", ["replicated", "fsdp2"])
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("bad on rank 1", ("rank 1 was given a bad batch", "disagree on the number of rows")),
        ("empty list on rank 1", ("rank 1 was given a bad batch", "empty list")),
        ("too few rows", ("3 directions need at least", "3 directions need at least")),
    ],
)
def test_bad_batches(pool: PoolOf, engine: str, case: str, messages: tuple[str, str]) -> None:
    errors = pool(2).errors(with_a_bad_batch, engine, case)
    assert all(message in error for message, error in zip(messages, errors, strict=True)), errors


def with_a_wrong_model(case: str) -> None:
    model = build("llama")
    if case == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif case == "an optimizer":
        config = {**ds_config(model, {"stage": 3}), "zero_allow_untested_optimizer": True}
        model = deepspeed_engine(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    elif case == "hpz" or case == "quantised":
        model = wrap("zero3", model)
        if case == "hpz":
            model.zero_hpz_partition_size = lambda: 2
        else:
            model.zero_quantized_weights = lambda: True
    elif case == "no engine":
        model = wrap("zero3", model).module
    elif case == "not the root":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.model.layers[0])
    table.optimizer(model)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fsdp1", "fully_shard (FSDP2)"),
        ("not the root", "fully_shard(model) last"),
        pytest.param("an optimizer", "without optimizer", marks=needs_deepspeed),
        pytest.param("hpz", "zero_hpz_partition_size is 2", marks=needs_deepspeed),
        pytest.param("quantised", "zero_quantized_weights rounds", marks=needs_deepspeed),
        pytest.param("no engine", "deepspeed.initialize", marks=needs_deepspeed),
    ],
)
def test_models_that_cannot_be_trained(pool: PoolOf, case: str, message: str) -> None:
    for error in pool(2).errors(with_a_wrong_model, case):
        assert error.startswith("ValueError")
        assert message in error


def with_shards_on(engine: str, shard_ranks: int) -> None:
    from zo_dist.engines.build import fsdp2_mesh, zero3_group

    if engine == "fsdp2":
        fsdp2_mesh(torch.device("cpu"), shard_ranks)
    else:
        zero3_group(shard_ranks)


@pytest.mark.parametrize("shard_ranks", [3, 8])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_replicas_of_unequal_size(pool: PoolOf, engine: str, shard_ranks: int) -> None:
    for error in pool(4).errors(with_shards_on, engine, shard_ranks):
        assert f"ValueError: engine.shard_ranks is {shard_ranks}; it must divide" in error
        assert "1, 2, 4, or null" in error


# No errors


def accumulated(engine: str, mode: str, pieces: list[list[tuple[int, int]]]) -> str:
    """Digest after 5 steps with this rank's micro-batches of the 12 rows of all ranks."""
    import torch.distributed as dist

    optimizer = make(engine, lr=2.0**-7, eps=2.0**-6, directions=5, perturb=mode, sampler="adalezo")
    batch = rows_for("sequential", 12)
    losses = Injected(mode, 5, max(len(p) for p in pieces[: dist.get_world_size()]))
    with remembered_noise():
        for _ in range(5):
            optimizer.step_batch([cut(batch, a, b) for a, b in pieces[rank()]], losses)
    return digest(whole_weights(optimizer))


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("engine", ["replicated", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_micro_batches_are_one_large_batch(pool: PoolOf, engine: str, mode: str) -> None:
    """Cut anywhere, unequal in number between ranks, a rank of no rows among them."""
    cuts = [
        [[(0, 6)], [(6, 12)]],
        [[(0, 1), (1, 6)], [(6, 12)]],
        [[(0, 12)], [(12, 12)]],
        [[(0, 0)], [(0, 3), (3, 4), (4, 12)]],
    ]
    digests = [d for pieces in cuts for d in pool(2).run(accumulated, engine, mode, pieces)]
    assert len(set(digests)) == 1
