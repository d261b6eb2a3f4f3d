"""A profile of AdaLeZO's step on two processes with sharded weights, as text (torch.profiler, rank 0).

    python -m benchmarks.profile [--engines fsdp2 deepspeed] [--steps 3] [--folder docs/profiles]

Writes one file for each engine. `launch` starts this module again on each process.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from torch.profiler import profile

from benchmarks.measure import Bench, Setting
from benchmarks.step import launch
from zo_dist.engines import leave_process_group

CASES = ["stacked_forward", "adalezo"]


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work(Setting(**json.loads(sys.argv[1])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--engines", nargs="+", choices=["fsdp2", "deepspeed"], default=["fsdp2", "deepspeed"]
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("docs/profiles"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for engine in arguments.engines:
        setting = Setting(
            model="smollm2",
            engine=engine,
            rows=16,
            length=48,
            rounds=arguments.steps,
            dtype="bfloat16",
            cases=CASES,
            noise="rademacher",
            out=str(arguments.folder / f"{engine}.txt"),
        )
        launch("benchmarks.profile", 2, setting)


def work(setting: Setting) -> None:
    bench = Bench(setting)
    texts = [f"{setting.model}, {setting.rows} rows of {setting.length} tokens, {setting.dtype}; rank 0 of 2"]
    for subject in bench.subjects:
        with profile() as profiled:
            for _ in range(setting.rounds):
                subject.run()
        averages = profiled.key_averages()
        reads = sum(e.count for e in averages if e.key == "aten::_local_scalar_dense")
        gathers = sum(e.count for e in averages if "allgather" in e.key)
        texts.append(
            f"{subject.method}: {setting.rounds} times; each read {reads / setting.rounds:.0f} scalars "
            f"from the device and made {gathers / setting.rounds:.0f} gathers\n"
            + averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48)
        )
    if bench.engine.rank == 0:
        Path(setting.out).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    leave_process_group()


if __name__ == "__main__":
    main()
