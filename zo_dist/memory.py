"""How much memory this process needed so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch


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
