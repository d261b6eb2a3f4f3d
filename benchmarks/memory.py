"""The most memory a piece of work needed, on a CPU (Linux) or a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from zo_dist.memory import M_MMAP_THRESHOLD, proc_status


def settled() -> None:
    """Give back what is free, so that a peak is that of the work and not of what came before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def map_each_tensor() -> None:
    """From here on each piece of 1 MiB or more is memory of its own, on glibc; it costs a fault per page.

    Else glibc keeps what is freed in one heap, where pieces of other sizes leave holes: at 256 tokens up to a
    fifth of a step's peak, by the order in which sizes came. A GPU's peak has no holes either.
    """
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def resident_bytes() -> int:
    return proc_status("VmRSS")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The peak of the process (of the GPU's allocator, where there is one) while `work` runs."""
    settled()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        work()
        return int(torch.accelerator.max_memory_allocated(device))
    # 5 resets the high-water mark of resident memory (Linux, proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return proc_status("VmHWM")
