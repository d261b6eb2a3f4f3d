"""The table of docs/planning.md: what fits, and what a step is computed to take. Nothing is measured.

    python -m benchmarks.plans [MODEL GPUS]...

Each line is `zo-dist plan MODEL --gpus GPUS train.rows=64 optimizer.perturb=module --json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from zo_dist.cli import main as zo_dist

SETTINGS = ["train.rows=64", "optimizer.perturb=module"]
CASES = [
    ("llama-2-7b", "2xRTX4090"),
    ("opt-13b", "2xA100-40G"),
    ("opt-13b", "8xRTX4090"),
    ("opt-30b", "4xA100-40G"),
    ("opt-30b", "8xRTX4090"),
    ("opt-66b", "4xA100-80G"),
    ("opt-66b", "8xA100-40G"),
    ("llama-3-70b", "2xRTX4090"),
    ("llama-3-70b", "8xA100-40G"),
    ("llama-3-70b", "64xH100-80G"),
]


def main() -> None:
    given = sys.argv[1:]
    cases = list(zip(given[::2], given[1::2], strict=True)) or CASES
    print(
        "| model | GPUs | fits | fastest of these | GiB per GPU | GB received per step | seconds per step |"
    )
    print("|---" * 7 + "|")
    for model, gpus in cases:
        print(line(model, gpus), flush=True)


def line(model: str, gpus: str) -> str:
    """A row of the table, in GitHub's form."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        failed = zo_dist(["plan", model, "--gpus", gpus, "--json", *SETTINGS])
    if failed:
        raise SystemExit(failed)
    plan: dict[str, Any] = json.loads(out.getvalue())
    fitting = [mode for mode in plan["modes"] if mode["fits"]]
    cells = [model, gpus, "; ".join(mode["name"] for mode in fitting) or "nothing"]
    if fitting:
        (best,) = [mode for mode in fitting if mode["name"] == plan["recommended"]["name"]]
        seconds, received = best["seconds"], best["traffic"]["received"]
        cells += [best["name"], f"{best['memory']['total'] / 2**30:.1f}", f"{received / 1e9:.0f}"]
        cells += [f"{seconds['hidden']:.1f} - {seconds['apart']:.1f}"]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
