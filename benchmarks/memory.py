"""The most memory a piece of work needed, on a CPU (Linux) or a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def settled() -> None:
    """Give back what is free, so that a peak is that of the work and not of what came before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    return _status("VmRSS")


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
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; the CPU figures need Linux")
