"""What a run finds in its folder, and what it cannot write there."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disturbed import left_by, started, train, wait_for_steps
from injected import files_no_longer_than
from tiny_run import tiny_config, write_config
from workers import Pool

from zo_dist import resume
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.runlog import RunLog, read_metrics
from zo_dist.trajectory import TrajectoryReader


def test_a_folder_is_used_by_one_run_at_a_time(
    tmp_path: Path, pool: Callable[[int], Pool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = write_config(tmp_path, train={"steps": 100_000, "eval_every": 0, "snapshot_every": 0})
    process = started(path, run)
    holder = f"another run, process {process.pid} on {socket.gethostname()}, is using train.output={run}"
    try:
        wait_for_steps(process, run, 3)
        for existing in ("resume", "replace"):
            assert main(["train", str(path), f"train.existing={existing}", "train.steps=1"]) == 2
            assert f"error: {holder}: wait until" in capsys.readouterr().err
        for error in pool(2).errors(train, path, ["train.steps=1"]):
            assert holder in error
        wait_for_steps(process, run, len(read_metrics(run)) + 3)  # it was not disturbed
    finally:
        process.kill()
        process.communicate()
    assert main(["train", str(path), "train.steps=1"]) == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    run = tmp_path / "file" / "run"
    assert main(["train", str(write_config(tmp_path)), f"train.output={run}"]) == 1
    assert f"error: [Errno {errno.ENOTDIR}] Not a directory: '{run}'" in capsys.readouterr().err


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    # Others lock files too.
    names = {"flock": flock, "LOCK_EX": fcntl.LOCK_EX, "LOCK_NB": fcntl.LOCK_NB}
    monkeypatch.setattr(resume, "fcntl", SimpleNamespace(**names))
    assert main(["train", str(write_config(tmp_path, train={"steps": 1, "eval_every": 0}))]) == 0
    assert "run cannot be locked (No locks available): let no other run use it" in caplog.text


# What is wrong in a folder is said before anything is written.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"lr": 2e-3}}, "optimizer.lr is 0.002, was 0.001"),
        ({"train": {"rows": 5}}, "train.rows is 5, was 4"),
        ({"optimizer": {"seed": 3}}, "optimizer.seed is 3, was 0"),
        ({"data": {"seed": 3}}, "data.seed is 3, was 0"),
    ],
    ids=["lr", "rows", "seed", "data"],
)
def test_a_changed_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    assert main(["train", str(write_config(tmp_path))]) == 0
    before = (tmp_path / "run" / "trajectory.zo").read_bytes()
    assert main(["train", str(write_config(tmp_path, **change))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "train.existing=replace" in error
    assert (tmp_path / "run" / "trajectory.zo").read_bytes() == before


def test_changed_rows_another_base_and_damage_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log = write_config(tmp_path), tmp_path / "run" / "trajectory.zo"
    assert main(["train", str(path)]) == 0
    rows, whole = tmp_path / "rows.jsonl", log.read_bytes()
    text = rows.read_text()
    rows.write_text(text.replace("lovely", "bright"))
    assert main(["train", str(path), "train.steps=5"]) == 2
    assert "other training rows" in capsys.readouterr().err
    rows.write_text(text)
    last = str(tmp_path / "run" / "last")
    assert main(["train", str(path), "train.steps=5", f"model.source={last}"]) == 2
    assert "not those that the run started from" in capsys.readouterr().err
    log.write_bytes(whole[:-9] + bytes([whole[-9] ^ 16]) + whole[-8:])
    assert main(["train", str(path), "train.steps=5"]) == 2
    assert "damaged at offset" in capsys.readouterr().err
    log.write_bytes(whole)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("{" + metrics.read_text())
    assert main(["train", str(path), "train.steps=5"]) == 2
    assert "metrics.jsonl, line 1, is damaged" in capsys.readouterr().err
    metrics.unlink()
    assert main(["train", str(path), "train.steps=5"]) == 2
    assert "metrics.jsonl lacks the start of the run" in capsys.readouterr().err


def test_a_finished_run_can_be_extended_or_replaced(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    run, log = tmp_path / "run", tmp_path / "run" / "trajectory.zo"
    assert main(["train", str(path)]) == 0
    first = left_by(run)
    assert main(["train", str(path)]) == 0
    assert left_by(run) == first
    assert main(["train", str(path), "train.steps=7"]) == 0
    assert len(list(TrajectoryReader(log))) == 7
    assert left_by(run)["trajectory.zo"].startswith(first["trajectory.zo"])
    assert main(["train", str(path), "train.existing=replace", "optimizer.lr=2e-3"]) == 0
    assert len(list(TrajectoryReader(log))) == 3
    assert load_config(run / "config.yaml").train.existing == "resume"
    settings = tiny_config(tmp_path)["optimizer"]
    assert [record.lr for record in TrajectoryReader(log)] == [2 * settings["lr"]] * 3


def test_the_evaluation_of_the_last_step_is_made_up_for(tmp_path: Path) -> None:
    """A process that is killed after the last step is logged and before it is evaluated."""
    path = write_config(tmp_path, train={"steps": 7, "eval_every": 3})
    assert main(["train", str(path)]) == 0
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    events, best = read_metrics(run), left_by(run)["best/model.safetensors"]
    lines = metrics.read_text().splitlines(keepends=True)
    kept = [i for i, e in enumerate(events) if e["event"] != "eval" or e["step"] < 7]
    metrics.write_text("".join(lines[i] for i in kept))
    shutil.rmtree(run / "best")
    assert main(["train", str(path)]) == 0
    evals = [(e["step"], e["split"]) for e in read_metrics(run) if e["event"] == "eval"]
    assert evals == [(e["step"], e["split"]) for e in events if e["event"] == "eval"]
    validation = [e["loss"] for e in events if e["event"] == "eval" and e["split"] == "validation"]
    if min(validation) == validation[-1]:
        assert left_by(run)["best/model.safetensors"] == best


def test_losses_over_other_rows_are_not_compared(tmp_path: Path) -> None:
    path, run = write_config(tmp_path, train={"steps": 2, "eval_rows": 1}), tmp_path / "run"
    assert main(["train", str(path)]) == 0
    metrics, best = run / "metrics.jsonl", run / "best" / "model.safetensors"
    # A row that happens to be easy.
    events = [{**e, "loss": 0.001} if e.get("split") == "validation" else e for e in read_metrics(run)]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    before = best.read_bytes()
    assert main(["train", str(path), "train.steps=4"]) == 0
    assert best.read_bytes() == before
    assert main(["train", str(path), "train.steps=6", "train.eval_rows=9"]) == 0
    assert best.read_bytes() != before
    assert [e["rows"] for e in read_metrics(run) if e["event"] == "eval"] == [21, 1, 1, 9, 21]


def test_snapshots_of_steps_that_the_log_lost_are_deleted(tmp_path: Path) -> None:
    """As a machine that fails may lose the end of the log and keep what was written after it."""
    path = write_config(
        tmp_path, train={"steps": 6, "snapshot_every": 2, "eval_every": 0, "keep_snapshots": 3}
    )
    assert main(["train", str(path)]) == 0
    run = tmp_path / "run"
    reader = TrajectoryReader(run / "trajectory.zo")
    ends = [reader.end for _ in reader]
    os.truncate(reader.path, ends[2])
    assert main(["train", str(path), "train.steps=3"]) == 0
    assert [snapshot.name for snapshot in (run / "snapshots").iterdir()] == ["step-00000002"]


def test_a_snapshot_that_a_kill_left_unfinished_is_deleted(tmp_path: Path) -> None:
    """Also by a resume that takes no step, nor a snapshot, any more."""
    path = write_config(tmp_path, train={"steps": 3, "snapshot_every": 2, "eval_every": 0})
    assert main(["train", str(path)]) == 0
    snapshots = tmp_path / "run" / "snapshots"
    shutil.copytree(snapshots / "step-00000002", snapshots / ".step-00000003.partial")
    (snapshots / ".step-00000001.removed").mkdir()
    assert main(["train", str(path)]) == 0
    assert [snapshot.name for snapshot in snapshots.iterdir()] == ["step-00000002"]


def test_a_run_whose_time_is_up_takes_no_further_step(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"steps": 10_000, "max_seconds": 0.3, "eval_every": 0})
    assert main(["train", str(path)]) == 0
    steps = len(list(TrajectoryReader(tmp_path / "run" / "trajectory.zo")))
    assert main(["train", str(path)]) == 0
    assert len(list(TrajectoryReader(tmp_path / "run" / "trajectory.zo"))) == steps


def train_on_a_full_disk(path: Path, overrides: list[str], event: str, call: int) -> None:
    """Training in which the disk takes no more when `event` is written for the `call`th time."""
    write, calls = RunLog.write, itertools.count(1)

    def on_a_full_disk(self: Any, name: str, *args: Any, **values: Any) -> None:
        file = self._file
        if file is None or name != event or next(calls) != call:
            return write(self, name, *args, **values)
        with files_no_longer_than(os.fstat(file.fileno()).st_size + 10):
            write(self, name, *args, **values)

    RunLog.write = on_a_full_disk  # type: ignore[method-assign]
    try:
        train(path, overrides)
    finally:
        RunLog.write = write  # type: ignore[method-assign]


@pytest.mark.parametrize(("event", "call"), [("run", 1), ("eval", 1), ("step", 3), ("eval", 2), ("eval", 3)])
def test_every_rank_learns_that_the_metrics_cannot_be_written(
    pool: Callable[[int], Pool], tmp_path: Path, event: str, call: int
) -> None:
    path, run = write_config(tmp_path, train={"steps": 4, "eval_every": 4}), tmp_path / "run"
    for error in pool(2).errors(train_on_a_full_disk, path, [], event, call):
        assert "metrics.jsonl" in error
        assert "could be written" in error
    events = read_metrics(run)
    assert sum(e["event"] == event for e in events) == call - 1
    assert run.joinpath("metrics.jsonl").read_bytes().endswith(b"\n") or not events
    pool(2).run(train, path, [])
    assert len(list(TrajectoryReader(run / "trajectory.zo"))) == 4
    assert (run / "result.json").exists()


def test_every_rank_learns_which_file_of_the_end_cannot_be_written(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    path, run = write_config(tmp_path, train={"steps": 1, "eval_every": 0}), tmp_path / "run"
    pool(2).run(train, path, [])
    for name in ("tensorboard", "run.png", "result.json"):
        in_its_place = run / name
        in_its_place.unlink(missing_ok=True)
        if name == "tensorboard":
            in_its_place.write_text("no folder")
        else:
            in_its_place.mkdir()
        for error in pool(2).errors(train, path, ["train.tensorboard=true"]):
            assert name in error
        in_its_place.unlink() if name == "tensorboard" else in_its_place.rmdir()
    pool(2).run(train, path, ["train.tensorboard=true"])
