"""What a step costs, in plain forwards of the same rows; every method on the same model and batch.

    python -m benchmarks.step [--models smollm2 1b 3b] [--lengths 15 64 256] [--engines ...] [--json FILE]

Each line of the grid is one process group in which all methods take turns, so that a slower moment
of the machine hits all. AdaLeZO and LeZO are means over `--rounds` draws of arms. `forward` is one
forward of the rows, `two_forwards` the limit of a method that shares nothing, `stacked_forward` one
forward of twice the rows, and `mezo_published` MeZO's own loop, eager and in place.
"""

from __future__ import annotations

import argparse
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
]
ENGINES = ["replicated", "fsdp2", "deepspeed"]


def main() -> None:
    arguments = parse()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.jsonl"
        for model in arguments.models:
            for length in arguments.lengths:
                for engine in arguments.engines:
                    for ranks in arguments.ranks:
                        if (engine == "replicated") == (ranks > 1) and len(arguments.engines) > 1:
                            continue  # sharding over one process, and copies, are not what is asked
                        cases = [c for c in arguments.methods if c != "mezo_published" or ranks == 1]
                        run(
                            Setting(
                                model=model,
                                engine=engine,
                                rows=arguments.rows,
                                length=length,
                                rounds=arguments.rounds,
                                dtype=arguments.dtype,
                                cases=cases,
                                noise=arguments.noise,
                                out=str(out),
                            ),
                            ranks,
                            cores,
                        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
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


def run(setting: Setting, ranks: int, cores: int) -> None:
    print(f"{setting.model}, {setting.length} tokens, {setting.engine} x{ranks} ...", file=sys.stderr)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "benchmarks.measure", json.dumps(asdict(setting))]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)


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
