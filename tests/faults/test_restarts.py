"""A rank that dies: the others stop, and the run goes on, also by `torchrun --max-restarts`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from disturbed import left_by, left_by_log, ranks_of, started, wait_for_steps
from tiny_run import write_config
from workers import Pool, environment

from zo_dist.cli import main
from zo_dist.engines import initialize_process_group
from zo_dist.runlog import read_metrics
from zo_dist.trajectory import TrajectoryReader


def join(rank: int, num_ranks: int, port: int, late: float, pipe: Any) -> None:
    """One rank of one start; it tells what all ranks add up to, and stays."""
    os.environ.update(environment())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    time.sleep(late)
    initialize_process_group(timeout_s=60)
    # A second group takes its keys from the same store.
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total, group=dist.new_group())
    pipe.send(total.item())
    time.sleep(600)


@pytest.mark.parametrize("late", [0, 2], ids=["rank 0 is late", "rank 2 is late"])
def test_a_rank_does_not_call_those_that_were_killed(pool: Callable[[int], Pool], late: int) -> None:
    """torchrun keeps one store: a rank that is early finds in it what the last start's ranks wrote."""
    pool(1).run(os.getpid)  # starts the server that processes are forked from
    context, num_ranks = multiprocessing.get_context("forkserver"), 3
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(3):
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            args = rank, num_ranks, store.port, float(start > 0 and rank == late), theirs
            processes.append(context.Process(target=join, args=args, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            for pipe in pipes:
                assert pipe.poll(60)
                assert pipe.recv() == 6.0
        finally:
            for process in processes:
                process.kill()
                process.join()


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


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_ranks_are_killed(whole: tuple[Path, float], tmp_path: Path) -> None:
    """One rank, then the other: both times it goes on, and ends with the bits of the undisturbed run."""
    folder, run = whole[0], tmp_path / "run"
    process = started(folder / "config.yaml", run, 2, "--max-restarts=2")
    try:
        for restarts, steps in enumerate((3, 12)):
            wait_for_steps(process, run, steps)
            os.kill(ranks_of(process)[restarts], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert left_by(run) == left_by(folder / "run")
    done = [e["done"] for e in read_metrics(run) if e["event"] == "run"]
    assert [begun >= at for begun, at in zip(done, (0, 3, 12), strict=True)] == [True] * 3


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
