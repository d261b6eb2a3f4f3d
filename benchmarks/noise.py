"""What noise costs: each use of it, as a ratio to one in-place pass over the same bfloat16 weights.

    python -m benchmarks.noise [--elements N] [--eager]

`update` is the whole write of a step: noise of so many directions, rule, stochastic rounding. All
figures come from one process and alternate, so that a slower moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from zo_dist.laws import LAWS
from zo_dist.noise import Noise
from zo_dist.params import Param, Runs, Span
from zo_dist.rounding import Rounding16
from zo_dist.rules import SGD
from zo_dist.runs import in_runs
from zo_dist.update import Terms, Write, update_span


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def jobs(noise: Noise, weight: torch.Tensor) -> dict[str, Callable[[], object]]:
    out, other, total = torch.empty_like(weight), torch.empty_like(weight), torch.zeros(weight.shape)
    timed: dict[str, Callable[[], object]] = {
        "shift": lambda: noise.shift([out], weight, "w", 0, 0, 0, [1e-3]),
        "shift to both sides": lambda: noise.shift([out, other], weight, "w", 0, 0, 0, [1e-3, -1e-3]),
        # What tensor parallelism leaves of rows of 2,048 elements: half of each.
        "shift of columns to both sides": lambda: in_runs(noise, 0, Runs(1024, 2048)).shift(
            [out, other], weight, "w", 0, 0, 0, [1e-3, -1e-3]
        ),
        "sum of 4": lambda: noise.accumulate(total, "w", 0, [(d, 1e-3) for d in range(4)], 0),
        "round": lambda: noise.round(out, total, "w", 0, 0),
    }
    matrix = torch.nn.Parameter(out.view(-1, 1), requires_grad=False)
    span, param = Span("w", out, 0), Param("w", matrix, matrix.shape, ())
    rounding = Rounding16("stochastic", noise)
    for count in (1, 2, 4, 16):
        terms, write = Terms([(d, 1e-6) for d in range(count)]), Write(SGD(), rounding, noise, 0, 1e-6)
        timed[f"update, directions: {count}"] = lambda terms=terms, write=write: update_span(  # type: ignore[misc]
            span, param, terms, write
        )
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=2**25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="the eager form too, which takes minutes")
    arguments = parser.parse_args()
    weight = torch.randn(arguments.elements).to(torch.bfloat16)
    timed: dict[str, Callable[[], object]] = {"in place": lambda: weight.mul_(1.0)}
    for law in LAWS:
        for form in ("compiled", "eager") if arguments.eager else ("compiled",):
            noise = Noise(law, compile=form == "compiled")  # type: ignore[arg-type]
            timed |= {f"{law} {use}, {form}": job for use, job in jobs(noise, weight).items()}
    for job in timed.values():
        job()
    runs = [{name: seconds(job) for name, job in timed.items()} for _ in range(arguments.repeats)]
    print(f"{arguments.elements} bfloat16 weights, {torch.get_num_threads()} threads, median of ratios")
    for name in timed:
        ratio = statistics.median(run[name] / run["in place"] for run in runs)
        nanoseconds = statistics.median(run[name] for run in runs) / arguments.elements * 1e9
        print(f"{name:40} {ratio:7.2f} x   {nanoseconds:7.2f} ns per element")


if __name__ == "__main__":
    main()
