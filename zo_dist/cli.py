"""The command line: `zo-dist plan | train | ...`, the same as `python -m zo_dist`, under any launcher."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from zo_dist.config import Config, load_config
from zo_dist.engines import DesyncError, Engine, initialize_process_group, leave_process_group
from zo_dist.learn_scale import Learning
from zo_dist.optimizer import NonFiniteLossError
from zo_dist.planning.command import add_arguments, run_plan
from zo_dist.resume import LOG, Interrupted, check_run
from zo_dist.settings import apply_overrides, build, read_yaml
from zo_dist.trajectory import TrajectoryReader

_EXAMPLE = "torchrun --nproc-per-node 2 -m zo_dist train configs/quickstart.yaml optimizer.lr=5e-7"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0, 2 for a mistake in what was asked, 1 for a run that failed, 128 + n for one stopped by signal n.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    _configure_logging()
    try:
        if args.command == "plan":
            run_plan(args)
            return 0
        result = _run(args)
    except (ValueError, OSError, NonFiniteLossError, DesyncError, Interrupted) as error:
        # Every rank has the reason, rank 0 tells it; but of a disk or a network, one rank may have it alone.
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave_process_group()
        if isinstance(error, Interrupted):
            return 128 + error.signal
        return 2 if isinstance(error, ValueError) else 1
    leave_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"result: {json.dumps(result)}", flush=True)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zo-dist",
        description="Zeroth-order fine-tuning of language models on sharded processes.",
        epilog=f"example: {_EXAMPLE}",
    )
    # The deepspeed launcher adds it; what counts is the environment, which it sets as well.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="plan | train | eval | report | export | replay | check | learn-scale",
    )
    train = commands.add_parser("train", help="fine-tune a model as a config file says")
    train.add_argument("config", help="YAML file; every key is described in zo_dist/config.py")
    evaluate = commands.add_parser("eval", help="accuracy and loss on the test split")
    evaluate.add_argument(
        "model", help="a run's folder, a saved model, or any model source; replaces model.source"
    )
    evaluate.add_argument("config", nargs="?", help="YAML file; default: the config.yaml of the run")
    replay = commands.add_parser("replay", help="rebuild the weights of a run from its log, without data")
    replay.add_argument("base", help="the model that the run started from: a folder or any model source")
    replay.add_argument("log", help="the trajectory.zo of a run")
    export = commands.add_parser("export", help="the model of a run after any of its steps")
    export.add_argument("run", help="the folder of a run; its base model is what its log names")
    export.set_defaults(base=None)
    for command in (replay, export):
        command.add_argument("--to", required=True, metavar="FOLDER", help="where the model is saved")
        command.add_argument(
            "--step", type=int, metavar="N", help="stop after N steps; default: all that are logged"
        )
    check = commands.add_parser("check", help="read a run's folder and say whether all of it is whole")
    check.add_argument("run", help="the folder of a run, or of a saved model")
    check.set_defaults(overrides=[])
    report = commands.add_parser("report", help="an HTML page of one run, or of several compared")
    report.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    report.add_argument(
        "--out",
        metavar="FOLDER|FILE.html",
        help="a folder for the page and PNGs, or the page alone; default: the folder report in the first RUN",
    )
    report.set_defaults(overrides=[])
    learn = commands.add_parser(
        "learn-scale", help="how far each parameter is to be perturbed, learnt once for a base model"
    )
    learn.add_argument("config", help="YAML file: its model, data and train.rows are used")
    learn.add_argument("--to", required=True, metavar="FILE", help="what optimizer.scale.path then names")
    for field in fields(Learning):
        option = "--" + field.name.replace("_", "-")
        learn.add_argument(option, type=type(field.default), default=field.default, metavar="X")
    plan = commands.add_parser(
        "plan", help="memory, traffic and seconds per step of a model on a cluster, and what fits"
    )
    add_arguments(plan)
    for command in (train, evaluate, replay, export, learn, plan):
        command.add_argument(
            "--deepspeed", metavar="DS_JSON", help="short for engine.kind=deepspeed engine.deepspeed=DS_JSON"
        )
        command.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    args, rest = parser.parse_known_args(argv)
    args.argv = list(argv)[1:]
    # argparse does not take up positional arguments again after an option.
    args.overrides += [arg for arg in rest if not arg.startswith("-") and "=" in arg]
    wrong = [arg for arg in rest if arg not in args.overrides]
    if wrong:
        parser.error(f"unrecognised: {' '.join(wrong)}")
    if args.command == "export":
        args.log = str(Path(args.run) / LOG)
    if args.command == "eval" and args.config is not None and "=" in args.config:
        args.overrides, args.config = [args.config, *args.overrides], None
    return args


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.command == "check":
        return check_run(Path(args.run))
    if args.command == "report":
        # Slow to import, and needed here alone.
        from zo_dist.report import write_report

        return write_report(args.runs, args.out)
    ranks = Engine(nn.Identity(), initialize_process_group())
    with ranks.jointly():
        config = _config(args)
    # Imports transformers: `--help` and a mistake in the config need not wait for it.
    from transformers.utils.logging import disable_progress_bar

    from zo_dist.train import run_evaluation, run_learning, run_replay, run_training

    # Of files that are read and written, once, and where somebody watches.
    if ranks.rank or not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.command in ("replay", "export"):
        from_snapshot = args.command == "export"
        paths = Path(args.log), Path(args.to)
        return run_replay(config, *paths, args.step, ranks, from_snapshot=from_snapshot)
    if args.command == "learn-scale":
        with ranks.jointly():
            learning = Learning(**{field.name: getattr(args, field.name) for field in fields(Learning)})
        return run_learning(config, learning, Path(args.to), ranks)
    return run_training(config, ranks) if args.command == "train" else run_evaluation(config, ranks)


def _config(args: argparse.Namespace) -> Config:
    overrides = list(args.overrides)
    if args.deepspeed is not None:
        overrides += ["engine.kind=deepspeed", f"engine.deepspeed={json.dumps(args.deepspeed)}"]
    if args.command in ("train", "learn-scale"):
        return load_config(args.config, overrides)
    if args.command in ("replay", "export"):
        return _replayed(args, overrides)
    model, path = Path(args.model), args.config
    if (model / "config.yaml").is_file():
        path = path or model / "config.yaml"
        found = [model / name for name in ("best", "last") if (model / name).is_dir()]
        if not found:
            raise ValueError(f"the run {args.model!r} has saved no model: neither best/ nor last/ is there")
        model = found[0]
    if path is None:
        raise ValueError(f"{args.model!r} is no run's folder (no config.yaml in it): name a config file too")
    return _of_run(read_yaml(Path(path)), overrides, str(model) if model.exists() else args.model)


def _replayed(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The config of the run that wrote the log, with the base model and what was overridden."""
    if args.step is not None and args.step < 0:
        raise ValueError(f"--step is {args.step}; it must be at least 0")
    settings = TrajectoryReader(args.log).header.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"{args.log} was not written by zo-dist train: replay it with zo_dist.replay.replay")
    return _of_run(settings, overrides, args.base)


def _of_run(settings: dict[str, Any], overrides: list[str], source: str | None) -> Config:
    """The config of a run that was, with another model if one is given."""
    # Any engine gives the same bits: unless one is named, it is what fits the processes here.
    settings["engine"] = {}
    model = [] if source is None else [f"model.source={json.dumps(source)}"]
    apply_overrides(settings, [*overrides, *model])
    return build(Config, settings)


def _configure_logging() -> None:
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    # What concerns one rank alone is raised; what concerns all is told once.
    logging.getLogger("zo_dist").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of torch, about a name of its own that engines use.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
