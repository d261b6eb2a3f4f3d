"""Ranks that come apart are found before they write again, and a log rebuilds the same bits anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import remembered_noise
from models import build, cut, loss_of, rows_for
from workers import Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist.replay import identity, replay
from zo_dist.trajectory import TrajectoryReader, TrajectoryWriter

PoolOf = Callable[[int], Pool]
ROWS, STEPS = 6, 20
ENGINES = [
    ("fsdp2", 1),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("replicated", 3),
    ("hsdp_2x2", 4),
    pytest.param("zero3_2x2", 4, marks=needs_deepspeed),
    ("fsdp2_offload", 2),
    *(
        pytest.param(*case, marks=needs_deepspeed)
        for case in (("zero3", 1), ("zero3", 2), ("zero3", 3), ("zero3_offload", 2), ("zero2", 2))
    ),
]


def rank_and_ranks() -> tuple[int, int]:
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def make(engine: str, **options: Any) -> zo_dist.ZeroOrder:
    settings: dict[str, Any] = {"sampler": "adalezo", "directions": 2, "lr": 0.03}
    settings.update(rule=zo_dist.SGD(weight_decay=0.01), self_check=False)
    # In 16 bits, with every kind of shard: uneven, empty, padded, scalar.
    model = wrap(engine, build("sequential", torch.bfloat16))
    return table.optimizer(model, **{**settings, **options})


def my_rows() -> dict[str, torch.Tensor]:
    rank, num_ranks = rank_and_ranks()
    batch = rows_for("sequential", ROWS, dtype=torch.bfloat16)
    return cut(batch, rank * ROWS // num_ranks, (rank + 1) * ROWS // num_ranks)


def run_and_log(engine: str, path: str, rounding: str) -> str:
    with remembered_noise():
        optimizer, rows = make(engine, rounding=rounding), my_rows()
        header = identity(optimizer)
        with optimizer.engine.jointly():
            log = TrajectoryWriter(path, header) if optimizer.engine.rank == 0 else None
        for _ in range(STEPS):
            optimizer.step_batch(rows, loss_of)
            if log is not None:
                log.append(optimizer.record)
        if log is not None:
            log.close()
        return digest(whole_weights(optimizer))


def rebuild(engine: str, path: str, rounding: str) -> tuple[str, str]:
    with remembered_noise():
        optimizer = make(engine, rounding=rounding)
        assert replay(optimizer, path) == STEPS
        return digest(whole_weights(optimizer)), repr(optimizer.sampler.state_dict())


@pytest.fixture(scope="module")
def logs(pool: PoolOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """By rounding: a log that two FSDP2 ranks wrote, and the digest of the weights they ended with."""
    folder = tmp_path_factory.mktemp("logs")
    made = {}
    for rounding in ("stochastic", "kahan"):
        path = str(folder / rounding)
        first, second = pool(2).run(run_and_log, "fsdp2", path, rounding)
        assert first == second
        made[rounding] = (path, first)
    return made


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
def test_a_log_rebuilds_the_same_bits_on_any_engine(
    pool: PoolOf, logs: dict[str, tuple[str, str]], engine: str, num_ranks: int, rounding: str
) -> None:
    path, expected = logs[rounding]
    results = pool(num_ranks).run(rebuild, engine, path, rounding)
    assert {weights for weights, _ in results} == {expected}
    assert len({state for _, state in results}) == 1


def rebuild_damaged(path: str) -> None:
    replay(make("fsdp2"), path)


def test_a_damaged_log_stops_every_rank(
    pool: PoolOf, logs: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    data = bytearray(Path(logs["stochastic"][0]).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "log").write_bytes(data)
    for error in pool(2).errors(rebuild_damaged, str(tmp_path / "log")):
        assert "TrajectoryError" in error
        assert "damaged at offset" in error
    assert len(list(TrajectoryReader(logs["stochastic"][0]))) == STEPS


# One rank is made to differ, in one number or one bit.


def come_apart(engine: str, what: str, odd: int, step: int) -> None:
    """Steps, with something changed on rank `odd` before step `step`; DesyncError is to name it there."""
    optimizer, rows = make(engine), my_rows()
    sampler: Any = optimizer.sampler
    for number in range(step + 1):
        if number == step:
            before = digest(whole_weights(optimizer))
            if optimizer.engine.rank == odd:
                if what == "lr":
                    optimizer.param_groups[0]["lr"] *= 1 + 2.0**-52
                if what == "arms":
                    sampler.probabilities = sampler.probabilities[::-1]
                    sampler.draw = lambda *_: zo_dist.Dense.draw(sampler, 0, 0)
                if what == "coefficient":
                    slopes = optimizer.record.slopes
                    changed = (slopes[0] * (1 + 2.0**-52), *slopes[1:])
                    optimizer.record = dataclasses.replace(optimizer.record, slopes=changed)
        try:
            optimizer.step_batch(rows, loss_of)
        except zo_dist.DesyncError:
            assert number == step
            if what != "arms":  # another rank's arms gather other weights here
                assert digest(whole_weights(optimizer)) == before, "nothing was written"
            raise


@pytest.mark.parametrize("what", ["lr", "arms", "coefficient"])
@pytest.mark.parametrize("engine", ["replicated", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_rank_that_differs_is_named_before_anything_is_written(
    pool: PoolOf, engine: str, what: str
) -> None:
    for odd, step in ((0, 1), (1, 3), (2, 2)):
        for error in pool(3).errors(come_apart, engine, what, odd, step):
            assert "DesyncError" in error
            assert f"rank {odd} differs from the 2 others" in error


def flip_a_bit(engine: str, odd: int, place: int) -> None:
    optimizer = make(engine)
    if optimizer.engine.rank == odd:
        spans = optimizer.engine.spans(optimizer.params)
        bits = spans[place % len(spans)].flat.view(torch.int16)
        bits[place % len(bits)] ^= 1 << place % 16
    optimizer.engine.fingerprints(optimizer.params)


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [("replicated", 3), ("hsdp_2x2", 4), pytest.param("zero3_2x2", 4, marks=needs_deepspeed)],
)
def test_a_flipped_bit_of_a_copy_is_found_and_named(pool: PoolOf, engine: str, num_ranks: int) -> None:
    for place in range(17):
        odd = place % num_ranks
        for error in pool(num_ranks).errors(flip_a_bit, engine, odd, place):
            assert "DesyncError" in error
            # Of a shard in groups there are two copies, so no majority.
            named = f"rank {odd} differs from the 2 others" if engine == "replicated" else "with no majority"
            assert named in error


def prints(engine: str) -> dict[str, int]:
    optimizer = make(engine)
    return optimizer.engine.fingerprints(optimizer.params)


def test_fingerprints_do_not_depend_on_the_engine(pool: PoolOf) -> None:
    (expected,) = pool(1).run(prints, "replicated")
    assert len(set(expected.values())) == len(expected)
    for engine, num_ranks in (("replicated", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp_2x2", 4)):
        assert pool(num_ranks).run(prints, engine) == [expected] * num_ranks
