"""How a step's cost grows: with width, layers, rows, length, directions and ranks, one at a time.

    python -m benchmarks.growth [--axes ...] [--rounds N] [--json FILE]

Random Llama models. `mezo` draws every weight, `adalezo` a fifth of the layers; both in plain forwards
of the same rows, and in forwards of the stacked rows (`/ stacked`), which is what a step cannot
undercut without sharing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.step import measured

BASE = {"width": 512, "layers": 8, "rows": 16, "length": 48, "directions": 1, "ranks": 1}
AXES: dict[str, list[int]] = {
    "width": [256, 512, 1024, 2048],
    "layers": [4, 8, 16, 32],
    "rows": [4, 16, 64],
    "length": [16, 48, 192],
    "directions": [1, 2, 4, 8, 16],
    # Weights sharded by FSDP2, on one process too.
    "ranks": [1, 2],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for axis in arguments.axes:
        for value in AXES[axis]:
            at = BASE | {axis: value}
            cases = ["forward", "stacked_forward", f"mezo:{at['directions']}", f"adalezo:{at['directions']}"]
            measured_here = measured(
                at["ranks"],
                model=f"{at['width']}x{at['layers']}",
                engine="fsdp2" if axis == "ranks" else "replicated",
                rows=at["rows"],
                length=at["length"],
                rounds=arguments.rounds,
                dtype="bfloat16",
                cases=cases,
                noise="rademacher",
            )
            lines += [{"axis": axis, "value": value, **line} for line in measured_here]
    show(lines)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


def show(lines: list[dict[str, Any]]) -> None:
    """A table for people, in GitHub's form."""
    print("| axis | value | parameters | forward, s | mezo | / stacked | adalezo | / stacked | memory |")
    print("|---" * 9 + "|")
    for axis, value in dict.fromkeys((line["axis"], line["value"]) for line in lines):
        here = {line["method"]: line for line in lines if (line["axis"], line["value"]) == (axis, value)}
        stacked = here["stacked_forward"]["seconds"]
        cells = [axis, value, f"{here['forward']['params'] / 1e6:.1f} M", f"{here['forward']['seconds']:.3f}"]
        for method in ("mezo", "adalezo"):
            line = here[method]
            cells += [f"{line['forwards_per_step']:.2f}", f"{line['seconds'] / stacked:.2f}"]
        cells += [f"{here['adalezo']['peak_bytes'] / here['adalezo']['inference_peak_bytes']:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
