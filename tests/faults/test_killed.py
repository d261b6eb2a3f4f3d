"""Kill a run anywhere and start it again: what it ends with is what it would have ended with.

    ZO_DIST_KILLS=100 python -m pytest tests/faults

kills -9 that many times; without the variable it is a few, as in CI.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from injected import files_no_longer_than
from tiny_run import environment, tiny_config, write_config
from workers import Pool, needs_deepspeed

from zo_dist import resume
from zo_dist import train as train_module
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.engines import Engine
from zo_dist.optimizer import ZeroOrder
from zo_dist.runlog import RunLog, read_metrics
from zo_dist.train import run_training
from zo_dist.trajectory import TrajectoryReader

KILLS = int(os.environ.get("ZO_DIST_KILLS", "4"))
ZERO3 = ["engine.kind=deepspeed", f"engine.deepspeed={Path(__file__).parents[2] / 'configs/ds_zero3.json'}"]
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16"},
    "optimizer": {"sampler": {"name": "adalezo", "ratio": 0.6}, "rounding": "kahan", "weight_decay": 0.01},
    "train": {"steps": 40, "eval_every": 5, "schedule": "cosine", "snapshot_every": 3},
}


def train(path: Path, overrides: list[str]) -> dict[str, Any]:
    ranks = Engine(torch.nn.Identity(), torch.device("cpu"))
    return run_training(load_config(path, overrides), ranks)


def left_by(run: Path) -> dict[str, bytes]:
    """The bytes of what a run ends with; of the log those after its header, which names the folder."""
    files = ("trajectory.zo", "last/model.safetensors", "best/model.safetensors")
    return {name: (run / name).read_bytes() for name in files[1:]} | {files[0]: left_by_log(run / files[0])}


def left_by_log(path: Path) -> bytes:
    return path.read_bytes()[TrajectoryReader(path).end :]


def replayed(folder: Path, run: Path) -> bytes:
    """The weights that the log of a run gives, by one process."""
    out, alone = run / "replayed", ["engine.kind=replicated", "engine.deepspeed=null"]
    log = str(run / "trajectory.zo")
    assert main(["replay", str(folder / "model"), log, "--to", str(out), *alone]) == 0
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run by two ranks that nothing disturbs, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(folder, **SETTINGS)
    pool(2).run(train, path, ["train.steps=1", f"train.output={folder / 'first'}"])  # what comes only once
    start = time.perf_counter()
    pool(2).run(train, path, [])
    return folder, time.perf_counter() - start


@pytest.mark.timeout(600 + 60 * KILLS)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(
    whole: tuple[Path, float], pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    folder, seconds = whole
    draw, kills, runs = random.Random(0), 0, 0
    expected = left_by(folder / "run")
    metrics = [e["step"] for e in read_metrics(folder / "run") if e["event"] == "eval"]
    while kills < KILLS:
        run = tmp_path / str(runs)
        # Some runs often, some late: also while weights are saved and the test is run.
        for _ in range(draw.randint(1, 5)):
            kills += pool(2).kill_during(
                draw.uniform(0, 1.1 * seconds), train, folder / "config.yaml", [f"train.output={run}"]
            )
        pool(2).run(train, folder / "config.yaml", [f"train.output={run}"])
        assert left_by(run) == expected
        assert [e["step"] for e in read_metrics(run) if e["event"] == "eval"] == metrics
        # Two whole ones. A kill while one is written costs that one; its step is not taken again.
        kept = sorted(path.name for path in (run / "snapshots").iterdir())
        assert len(kept) == 2
        assert set(kept) <= {f"step-{step:08}" for step in range(3, 40, 3)}
        assert main(["check", str(run)]) == 0
        runs += 1
        shutil.rmtree(run)
        print(f"{kills} kills in {runs} runs, each of which ended with the same bits")


@pytest.mark.parametrize(
    "places",
    [
        [(1, []), (3, ["engine.kind=fsdp2"]), (2, [])],
        pytest.param([(2, ZERO3), (2, []), (3, ZERO3)], marks=needs_deepspeed),
    ],
    ids=["ranks", "engines"],
)
def test_a_run_that_moves_between_engines_is_what_its_log_says(
    whole: tuple[Path, float],
    pool: Callable[[int], Pool],
    tmp_path: Path,
    places: list[tuple[int, list[str]]],
) -> None:
    """Losses are summed in another order there, so the bits are those of its own log, not of `whole`."""
    folder, seconds = whole
    draw, run = random.Random(1), tmp_path / "run"
    for num_ranks, overrides in places[:-1]:
        args = [*overrides, f"train.output={run}"]
        # Its first steps at the least.
        pool(num_ranks).run(train, folder / "config.yaml", [*args, "train.steps=5"])
        pool(num_ranks).kill_during(draw.uniform(0.3, 0.8) * seconds, train, folder / "config.yaml", args)
    num_ranks, overrides = places[-1]
    pool(num_ranks).run(train, folder / "config.yaml", [*overrides, f"train.output={run}"])
    records = list(TrajectoryReader(run / "trajectory.zo"))
    assert [record.step for record in records] == list(range(40))
    assert replayed(folder, run) == (run / "last" / "model.safetensors").read_bytes()
    expected = list(TrajectoryReader(folder / "run" / "trajectory.zo"))
    assert records[0].arms == expected[0].arms
    assert [record.lr for record in records][5:] == [record.lr for record in expected][5:]


def started(path: Path, run: Path, ranks: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "zo_dist"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "zo_dist"]
    command += ["train", str(path), f"train.output={run}"]
    # What torchrun gives the others to leave once a rank has failed; 30 s unless it is told.
    env = environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while sum(e["event"] == "step" for e in read_metrics(run)) < count:
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.slow
def test_the_others_stop_when_a_rank_dies_and_the_command_goes_on(
    whole: tuple[Path, float], tmp_path: Path
) -> None:
    folder, run = whole[0], tmp_path / "run"
    process = started(folder / "config.yaml", run, 2)
    wait_for_steps(process, run, 3)
    start = time.monotonic()
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    # torchrun looks every 0.1 s.
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    assert "rank      : 0" in errors
    assert "SIGKILL" in errors
    process = started(folder / "config.yaml", run, 2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    assert left_by(run) == left_by(folder / "run")
    assert [e["done"] >= 3 for e in read_metrics(run) if e["event"] == "run"] == [False, True]


def test_a_restart_by_a_launcher_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun counts its restarts in the environment; `replace` is for the first start."""
    path = write_config(tmp_path, train={"existing": "replace", "eval_every": 0})
    log = tmp_path / "run" / "trajectory.zo"
    assert main(["train", str(path)]) == 0
    before = left_by_log(log)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", str(path), "train.steps=5"]) == 0
    assert left_by_log(log).startswith(before)
    assert len(list(TrajectoryReader(log))) == 5


def test_a_folder_is_used_by_one_run_at_a_time(
    tmp_path: Path, pool: Callable[[int], Pool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = write_config(tmp_path, train={"steps": 100_000, "eval_every": 0, "snapshot_every": 0})
    process = started(path, run)
    try:
        wait_for_steps(process, run, 3)
        for existing in ("resume", "replace"):
            assert main(["train", str(path), f"train.existing={existing}", "train.steps=1"]) == 2
            assert f"another run is using train.output={run}: wait until" in capsys.readouterr().err
        for error in pool(2).errors(train, path, ["train.steps=1"]):
            assert "another run is using train.output" in error
        wait_for_steps(process, run, len(read_metrics(run)) + 3)  # it was not disturbed
    finally:
        process.kill()
        process.communicate()
    assert main(["train", str(path), "train.steps=1"]) == 0


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
