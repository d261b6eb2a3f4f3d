"""The most memory a piece of work needed, on a CPU (Linux) or a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from zo_dist.memory import proc_status


def settled() -> None:
    """Give back what is free, so that a peak is that of the work and not of what came before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


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
