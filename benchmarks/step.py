"""What a step costs, in plain forwards of the same rows; every method on the same model and batch.

    python -m benchmarks.step [--models smollm2 1b 3b] [--lengths 15 64 256] [--engines ...] [--json FILE]

Each line of the grid is one process group in which all methods take turns, so that a slower moment
of the machine hits all; methods of more directions than `--rows` are left out. AdaLeZO and LeZO are
means over `--rounds` draws of arms. `forward` is one forward of the rows, `two_forwards` the limit of a
method that shares nothing, `stacked_forward` one forward of twice the rows, and `mezo_published` MeZO's
own loop, eager and in place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Setting
from benchmarks.subjects import MODELS

CASES = [
    *("forward", "two_forwards", "stacked_forward", "mezo_published"),
    *("mezo", "lezo", "adalezo", "adalezo:4", "adalezo:16"),
    *("lozo", "lozo:16", "adalozo:16"),
    *("mezo:16", "flipout:16", "adaflipout:16"),
]
ENGINES = ["replicated", "fsdp2", "deepspeed"]


def main() -> None:
    arguments = parse()
    lines: list[dict[str, Any]] = []
    for model, length, engine, ranks in itertools.product(
        arguments.models, arguments.lengths, arguments.engines, arguments.ranks
    ):
        if (engine == "replicated") == (ranks > 1) and len(arguments.engines) > 1:
            continue  # sharding over one process, and copies, are not what is asked
        cases = [c for c in arguments.methods if c != "mezo_published" or ranks == 1]
        # Each direction takes a row.
        cases = [c for c in cases if int(c.partition(":")[2] or 1) <= arguments.rows]
        lines += measured(
            ranks,
            model=model,
            engine=engine,
            rows=arguments.rows,
            length=length,
            rounds=arguments.rounds,
            dtype=arguments.dtype,
            cases=cases,
            noise=arguments.noise,
        )
    show(lines)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[48])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--methods", nargs="+", default=CASES, metavar="METHOD[:DIRECTIONS]")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--noise", choices=["rademacher", "gaussian"], default="rademacher")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def measured(ranks: int, **setting: Any) -> list[dict[str, Any]]:
    """One line for each case of a `Setting`, measured by so many processes."""
    print(f"{setting['model']}, {setting['engine']}, {ranks} processes ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.jsonl"
        launch("benchmarks.measure", ranks, Setting(**setting, out=str(out)))
        return [json.loads(line) for line in out.read_text().splitlines()]


def launch(module: str, ranks: int, setting: Setting) -> None:
    """Run a module on so many processes that share the cores, with the setting as its argument."""
    command, environment = torchrun(ranks, module)
    subprocess.run([*command, json.dumps(asdict(setting))], env=environment, check=True, stdout=sys.stderr)


def torchrun(ranks: int, module: str) -> tuple[list[str], dict[str, str]]:
    """The command and environment of a module on so many processes that share the cores."""
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", module]
    return command, os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}


def show(lines: list[dict[str, Any]]) -> None:
    """A table for people, in GitHub's form."""
    columns = ("model", "length", "engine", "method", "directions", "forwards", "seconds")
    columns += ("perturb", "forward", "update", "memory", "gathers", "scalar bytes")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for line in lines:
        cells = [line["model"], line["length"], f"{line['engine']} x{line['ranks']}", line["method"]]
        cells += [line["directions"] or "", f"{line['forwards_per_step']:.2f}", f"{line['seconds']:.3f}"]
        cells += [f"{line[key]:.3f}" for key in ("perturb_s", "forward_s", "update_s")]
        cells += [f"{line['peak_bytes'] / line['inference_peak_bytes']:.2f}"]
        cells += [f"{line['gathers_per_weight']:.2f}", line["scalar_bytes"]]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
