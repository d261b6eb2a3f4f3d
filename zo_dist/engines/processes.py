"""The processes that a launcher started: joining their group, leaving it, ending, taking turns."""

from __future__ import annotations

import atexit
import functools
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from zo_dist.memory import keep_freed

T = TypeVar("T")

_FIRST = "zo_dist/first"
# How long a rank waits for an answer before it looks whether another rank 0 is there now.
_LOOK = timedelta(seconds=0.5)

# What torch calls the threads that run gloo's collectives, and how long at most they are waited for, seconds.
_GLOO_THREADS = b"(pt_gloo_runloop)"
_GLOO_WAIT_S = 10.0


def initialize_process_group(timeout_s: float = 7200.0) -> torch.device:
    """Join the process group the launcher set up (torchrun, deepspeed, accelerate); returns the device.

    Without a launcher this is one process and no group is made. CPU tensors go over gloo, GPU
    tensors over NCCL. A rank that hangs makes the others fail after `timeout_s`, not wait for ever; where one
    dies the launcher ends them at once. It is long because they wait while rank 0 writes a whole model. On
    the CPU the C library is told to keep what is freed (`memory.keep_freed`).
    """
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed()
    if "RANK" in os.environ and not dist.is_initialized():
        backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, rank, num_ranks = next(rendezvous("env://", timeout=timeout))
            store = _keys_of_this_start(store, rank, num_ranks, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return device


def _keys_of_this_start(store: Store, rank: int, num_ranks: int, timeout: timedelta) -> Store:
    """A part of the store that no rank of an earlier start wrote to; the same one on every rank.

    torchrun keeps one store for all its restarts, in which a new rank would find the addresses of dead
    ones: torch's issue 135712. (Its count of restarts is no help: every node has its own.) So rank 0
    offers a name, and a rank believes it only once rank 0 has answered it, which a dead one does not.
    """
    store.set_timeout(timeout)
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set(_FIRST, mine)
        for other in range(1, num_ranks):
            theirs = store.get(f"{mine}/{other}").decode()
            store.set(f"{mine}/{theirs}", "seen")
        return PrefixStore(mine, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        first = store.get(_FIRST).decode()
        store.set(f"{first}/{rank}", mine)
        try:
            store.wait([f"{first}/{mine}"], _LOOK)
        except dist.DistStoreError:
            if time.monotonic() > deadline:
                raise
        else:
            return PrefixStore(first, store)


def leave_process_group() -> None:
    """Leave the process group, at the end of a run or after an error that every rank has."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def wait_for_gloo_at_exit() -> None:
    """Before the interpreter ends, let gloo's threads be done with their tensors; 20 ms where they are.

    Of collectives whose results are here: what still waits for another rank is not waited for. A thread that
    ran one drops its tensors after the caller has gone on, and takes the GIL for it. Python up to 3.13 ends a
    thread that asks for the GIL while the interpreter ends, and a destructor ended so is "terminate called
    without an active exception" to C++: the launcher reports a finished run as killed by SIGABRT. (torch's
    pull request 179291.) destroy_process_group is no help: torch's DeviceMesh keeps the group, and with it
    the threads.
    """
    atexit.register(_wait_for_gloo)


def _wait_for_gloo() -> None:
    deadline = time.monotonic() + _GLOO_WAIT_S
    # A thread that waits for the GIL looks idle, but not twice: it gets it while this one sleeps.
    idle = 0
    while idle < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        idle = 0 if _gloo_runs() else idle + 1


def _gloo_runs() -> bool:
    """Does a thread of gloo compute, or wait for its turn to? Linux says; elsewhere it is taken for idle."""
    for thread in Path("/proc/self/task").glob("*/stat"):
        try:
            _, name, state, *_ = thread.read_bytes().split()
        except OSError:
            continue
        if name == _GLOO_THREADS and state in (b"R", b"D"):
            return True
    return False


def first_of_node() -> bool:
    """Is this the first rank of its machine? Launchers say so; a process by itself is."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def on_each_node_first(job: Callable[[], T]) -> T:
    """Run `job` on the first rank of each node, then on the others: for downloads into a cache.

    If it raises on any rank, every rank raises: RuntimeError with the reason where it was another's.
    """
    if not dist.is_initialized():
        return job()
    first = first_of_node()
    error: Exception | None = None
    result: list[T] = []
    for turn in (True, False):
        if first == turn and error is None:
            try:
                result.append(job())
            except Exception as caught:
                error = caught
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, error and str(error))
        for rank, reason in enumerate(reasons):
            # Rank 0, which people read, may not be the one that failed.
            if reason is not None:
                raise error or RuntimeError(f"rank {rank} failed to prepare its files: {reason}")
    return result[0]
