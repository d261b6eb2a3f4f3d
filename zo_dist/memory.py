"""How much memory this process needed so far, and what of it the C library keeps."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

# mallopt(3), and the highest threshold there is for memory of its own.
_M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
_REUSED, _KEPT, _AT_ONCE = 1 << 25, 1 << 28, 1 << 16

# The C library, once it was told to keep what is freed.
_keeping: list[ctypes.CDLL] = []


def keep_freed() -> None:
    """Have glibc reuse what is freed of up to 32 MiB, and keep 256 MiB of it: where the CPU computes.

    Else it gives activations back to the system and gets them again page by page, in each step anew: a sixth
    of a step's time at 32 rows of 48 tokens and 135M weights. Left as they are: another C library, and what
    the environment sets (`MALLOC_MMAP_THRESHOLD_` and the like, `GLIBC_TUNABLES`).
    """
    told = any(key.startswith("MALLOC_") for key in os.environ) or "GLIBC_TUNABLES" in os.environ
    if platform.libc_ver()[0] == "glibc" and not told:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, _REUSED)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        _keeping.append(libc)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, what is freed goes back to the system, as before `keep_freed`: for what is done once.

    Buffers between memory that stays would leave holes, too small for the next, of which the steps that come
    after fill each in turn.
    """
    if not _keeping:
        yield
        return
    _keeping[-1].mallopt(M_MMAP_THRESHOLD, _AT_ONCE)
    try:
        yield
    finally:
        _keeping[-1].mallopt(M_MMAP_THRESHOLD, _REUSED)


def peaks(device: torch.device) -> tuple[float, float]:
    """Bytes: the most that was resident on the host, and that the accelerator's allocator had given out.

    Both since the process began (or whoever reset them). nan for what is not there: the first where the
    system has no /proc (it is Linux's), the second where the model computes on the CPU.
    """
    try:
        host = float(proc_status("VmHWM"))
    except OSError:
        host = math.nan
    allocated = math.nan if device.type == "cpu" else float(torch.accelerator.max_memory_allocated(device))
    return host, allocated


def proc_status(key: str, pid: int | Literal["self"] = "self") -> int:
    """Bytes that a process has of `key`: VmRSS, VmHWM, RssAnon (proc(5)).

    OSError where there is no such process, or no /proc; RuntimeError where it has ended, but is not waited
    for.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {key}")
