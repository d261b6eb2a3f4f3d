"""SIGTERM and SIGINT end a run after a whole step, on every rank."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import left_by, started, train, wait_for_steps
from tiny_run import write_config
from workers import Pool

from zo_dist import train as train_module
from zo_dist.cli import main
from zo_dist.trajectory import TrajectoryReader


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_a_whole_step(tmp_path: Path, number: signal.Signals) -> None:
    # The model's own start takes longer than many of its steps.
    path = write_config(tmp_path, train={"steps": 400, "eval_every": 0}, optimizer={"rounding": "kahan"})
    process = started(path, tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors[-2000:]
    steps = len(list(TrajectoryReader(tmp_path / "run" / "trajectory.zo")))
    assert 3 <= steps < 400
    assert f"stopped by {number.name} after step {steps}; the same command goes on after it" in errors
    assert not (tmp_path / "run" / "last").exists()
    assert main(["train", str(path), f"train.steps={steps + 3}"]) == 0
    assert main(["train", str(path), f"train.steps={steps + 3}", f"train.output={tmp_path / 'other'}"]) == 0
    for name in ("trajectory.zo", "last/model.safetensors"):
        mine, other = (path.parent / folder / name for folder in ("run", "other"))
        if name == "trajectory.zo":
            assert list(TrajectoryReader(mine)) == list(TrajectoryReader(other))
        else:
            assert mine.read_bytes() == other.read_bytes()


def sends(number: int, times: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which this process is sent a signal."""

    def during(*args: Any) -> Any:
        for _ in range(times):
            os.kill(os.getpid(), number)
        return function(*args)

    return during


@pytest.mark.parametrize(
    ("place", "steps", "left"),
    [
        ("zo_dist.train.score", 0, []),
        ("zo_dist.loop.score", 2, []),
        ("zo_dist.loop.save_model", 3, ["best"]),
        ("zo_dist.train.save_model", 4, ["best", "last"]),
    ],
    ids=["the test before", "an evaluation", "a save", "the last save"],
)
def test_a_signal_outside_of_steps_is_heeded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, steps: int, left: list[str]
) -> None:
    path, run = write_config(tmp_path, train={"steps": 4}), tmp_path / "run"
    assert main(["train", str(path), f"train.output={tmp_path / 'other'}"]) == 0
    module, _, name = place.rpartition(".")
    function = getattr(sys.modules[module], name)
    with monkeypatch.context() as context:
        context.setattr(place, sends(signal.SIGTERM, 1, function))
        assert main(["train", str(path)]) == 128 + signal.SIGTERM
    assert len(list(TrajectoryReader(run / "trajectory.zo"))) == steps
    assert [name for name in ("best", "last") if (run / name).exists()] == left
    assert not (run / "result.json").exists()
    assert main(["train", str(path)]) == 0
    assert left_by(run) == left_by(tmp_path / "other")


def test_a_signal_during_the_last_evaluation_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, function = write_config(tmp_path), train_module.score
    assert main(["train", str(path)]) == 0
    (tmp_path / "run" / "result.json").unlink()
    # Of a run that is over, the test after training is all that is made again.
    monkeypatch.setattr(train_module, "score", sends(signal.SIGINT, 1, function))
    assert main(["train", str(path), "train.save_last=false"]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_second_signal_is_not_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "score", sends(signal.SIGINT, 2, train_module.score))
    # A shell starts what it runs in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            main(["train", str(write_config(tmp_path))])
    finally:
        signal.signal(signal.SIGINT, before)


def train_where_rank_1_is_told_to_stop(path: Path) -> None:
    score = train_module.score
    if torch.distributed.get_rank() == 1:
        train_module.score = sends(signal.SIGTERM, 1, score)
    try:
        train(path, [])
    finally:
        train_module.score = score


def test_a_signal_to_one_rank_ends_all(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for error in pool(2).errors(train_where_rank_1_is_told_to_stop, write_config(tmp_path)):
        assert "Interrupted: stopped by SIGTERM after step 0" in error
