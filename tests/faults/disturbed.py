"""A run of a tiny model that tests disturb, and what it leaves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_run import environment

from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.engines import Engine
from zo_dist.runlog import read_metrics
from zo_dist.train import run_training
from zo_dist.trajectory import TrajectoryReader

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


def started(path: Path, run: Path, ranks: int = 1, *options: str) -> subprocess.Popen[str]:
    """`zo-dist train`, under torchrun with these options if there are to be several ranks."""
    command = [sys.executable, "-m", "zo_dist"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *options, "-m", "zo_dist"]
    command += ["train", str(path), f"train.output={run}"]
    # What torchrun gives the others to leave once a rank has failed; 30 s unless it is told.
    env = environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen[str], run: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while sum(e["event"] == "step" for e in read_metrics(run)) < count:
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]
