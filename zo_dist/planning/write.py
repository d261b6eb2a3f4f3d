"""The config of a planned run, as a file for `zo-dist train`."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

from zo_dist.config import EngineConfig
from zo_dist.planning.plan import Plan, Planned
from zo_dist.planning.sharding import ZERO3


def write_config(plan: Plan, planned: Planned, path: Path, ds_path: str | None, command: str) -> list[Path]:
    """Write the run's config in this mode to `path`, for `zo-dist train`; returns the files written.

    `ds_path`: the ds_config.json that a ZeRO-3 run names; None writes one beside `path`. `command`: what
    was asked, for a comment.
    """
    mode, written = planned.mode, [path]
    shard_ranks = mode.ranks if mode.ranks < plan.cluster.count else None
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode.engine == "zero3":
        if ds_path is None:
            beside = path.with_suffix(".ds.json")
            content = copy.deepcopy(ZERO3)
            if mode.offload:
                offload = {"device": "cpu", "pin_memory": True}
                content["zero_optimization"]["offload_param"] = offload
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            written.append(beside)
            ds_path = str(beside)
        engine = EngineConfig(kind="deepspeed", deepspeed=ds_path, shard_ranks=shard_ranks)
    elif mode.engine == "fsdp2":
        engine = EngineConfig(
            kind="fsdp2",
            shard_ranks=shard_ranks,
            offload_to_cpu=mode.offload,
            compute_dtype=plan.config.engine.compute_dtype,
        )
    else:
        engine = EngineConfig(kind="replicated")
    optimizer = dataclasses.replace(plan.config.optimizer, perturb=mode.perturb)
    config = dataclasses.replace(plan.config, engine=engine, optimizer=optimizer)
    gib = 0.0 if planned.memory is None else planned.memory.total / 2**30
    gpus = f"{plan.cluster.count}x{plan.cluster.kind}"
    path.write_text(
        f"# Written by: {command}\n# {planned.name} on {gpus}: {gib:.1f} GiB on each GPU, computed, not "
        f"measured.\n{config.to_yaml()}",
        encoding="utf-8",
    )
    return written
