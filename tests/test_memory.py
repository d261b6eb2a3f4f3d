"""What a process that computes on the CPU frees is used again, and not fetched from the system anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from tiny_run import environment

# As a step: many tensors at a time, of which none is left.
ROUNDS = """
import resource, torch
from zo_dist.engines import initialize_process_group
initialize_process_group()
def work():
    return len([torch.ones(2_500_000) for _ in range(12)])
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_what_is_freed_is_used_again() -> None:
    faults = {}
    # One that its environment tells otherwise. (One alone is no measure: it gives memory back or not by what
    # happens to lie behind it.)
    for how, told in (("joined", {}), ("told", {"MALLOC_MMAP_THRESHOLD_": "1048576"})):
        command, settings = [sys.executable, "-c", ROUNDS], environment() | told
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout.split()[-1])
    # 5 times 12 tensors of 10 MB, in pages of 4 KiB, or of 2 MiB where the system gives those.
    assert faults["told"] > 10 * max(1, faults["joined"])
