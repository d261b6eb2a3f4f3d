"""Kill a run anywhere and start it again: what it ends with is what it would have ended with.

    ZO_DIST_KILLS=100 python -m pytest tests/faults/test_killed.py -k killed_at_any -s

kills -9 that many times; without the variable it is a few, as in CI.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import left_by, replayed, train
from workers import HAVE_DEEPSPEED, Pool

from zo_dist.cli import main
from zo_dist.optimizer import ZeroOrder
from zo_dist.runlog import read_metrics
from zo_dist.trajectory import TrajectoryReader

KILLS = int(os.environ.get("ZO_DIST_KILLS", "4"))

# Where a run is started: on how many ranks, of which engine.
Place = tuple[int, list[str]]
HOME: Place = (2, [])
ZERO3 = ["engine.kind=deepspeed", f"engine.deepspeed={Path(__file__).parents[2] / 'configs/ds_zero3.json'}"]
ELSEWHERE: list[Place] = [(1, []), (3, ["engine.kind=fsdp2"]), (2, ["engine.kind=replicated"])]
ELSEWHERE += [(3, ZERO3), (2, ZERO3)] if HAVE_DEEPSPEED else []


def routes(draw: random.Random) -> Iterator[list[Place]]:
    """For each run, where it is started each time: at home and anywhere, in turns."""
    yield [HOME] * 3
    yield [HOME, *ELSEWHERE]
    while True:
        # Some are killed often.
        yield [HOME] * (1 + draw.randint(1, 5))
        yield draw.choices([HOME, *ELSEWHERE], k=1 + draw.randint(1, 5))


def unfinished(run: Path) -> set[tuple[str, int]]:
    """The folders of a run that a process had not done with: their names, and when they were made."""
    folders = [*run.glob("snapshots/.step-*"), *run.glob(".best.*"), *run.glob(".last.*")]
    return {(folder.name, folder.stat().st_mtime_ns) for folder in folders}


@pytest.mark.timeout(600 + 60 * KILLS)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(
    whole: tuple[Path, float], pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    """At home: those of the undisturbed run. Elsewhere losses are summed in another order: the bits are
    those of its own log, and that is the undisturbed run's up to the first step elsewhere.
    """
    folder, seconds = whole
    draw, kills, moves, inside = random.Random(0), 0, 0, 0
    expected = left_by(folder / "run")
    steps = list(TrajectoryReader(folder / "run" / "trajectory.zo"))
    evals = [e["step"] for e in read_metrics(folder / "run") if e["event"] == "eval"]
    for number, route in enumerate(routes(draw)):
        if number > 1 and kills >= KILLS:
            break
        run, at_home = tmp_path / str(number), len(steps)
        log, args = run / "trajectory.zo", [f"train.output={run}"]
        for i, (ranks, engine) in enumerate(route):
            if (ranks, engine) != HOME and at_home == len(steps):
                at_home = len(list(TrajectoryReader(log))) if log.exists() else 0
            moves += i > 0 and (ranks, engine) != route[i - 1]
            if i + 1 == len(route):
                pool(ranks).run(train, folder / "config.yaml", [*args, *engine], timeout=400)
                break
            # Some late: also while weights are saved and the test is run.
            moment, before = draw.uniform(0, 1.1 * seconds), unfinished(run)
            kills += pool(ranks).kill_during(moment, train, folder / "config.yaml", [*args, *engine])
            inside += bool(unfinished(run) - before)
        records = list(TrajectoryReader(log))
        assert records[:at_home] == steps[:at_home]
        assert [(r.step, r.lr) for r in records] == [(r.step, r.lr) for r in steps]
        assert replayed(folder, run) == (run / "last" / "model.safetensors").read_bytes()
        if at_home == len(steps):
            assert left_by(run) == expected
        assert [e["step"] for e in read_metrics(run) if e["event"] == "eval"] == evals
        # Two whole ones. A kill while one is written costs that one; its step is not taken again.
        kept = sorted(path.name for path in (run / "snapshots").iterdir())
        assert len(kept) == 2
        assert set(kept) <= {f"step-{step:08}" for step in range(3, 40, 3)}
        assert main(["check", str(run)]) == 0
        assert unfinished(run) == set()
        shutil.rmtree(run)
        print(f"{kills} kills of {number + 1} runs, {inside} inside a save, {moves} moves: all the same bits")


def train_with_a_bit_that_flips(path: Path, overrides: list[str], odd: int, at: int) -> None:
    """Training in which one bit of rank `odd`'s copy changes before step `at`, as bad memory does."""
    steps = ZeroOrder.step_batch

    def step_batch(self: Any, *args: Any) -> float:
        if self.step_count == at and self.engine.rank == odd:
            self.params[3].param.data.view(-1).view(torch.int16)[5] ^= 1
        return steps(self, *args)

    ZeroOrder.step_batch = step_batch  # type: ignore[method-assign]
    try:
        train(path, overrides)
    finally:
        ZeroOrder.step_batch = steps  # type: ignore[method-assign]


def test_a_copy_that_changes_during_a_run_is_named(
    whole: tuple[Path, float], pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    overrides = ["engine.kind=replicated", "train.verify_every=4", f"train.output={tmp_path / 'run'}"]
    overrides.append("train.snapshot_every=0")  # which compares copies too
    for error in pool(3).errors(
        train_with_a_bit_that_flips, whole[0] / "config.yaml", overrides, 1, 5, timeout=100
    ):
        assert "DesyncError" in error
        assert "rank 1 differs from the 2 others" in error
    assert len(list(TrajectoryReader(tmp_path / "run" / "trajectory.zo"))) == 8
