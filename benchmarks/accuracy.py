"""Loss and accuracy against training time, on the quickstart's model and sentences, or others.

    python -m benchmarks.accuracy [--seeds 0 1 2] [--methods ...] [--json FILE] [--plot FILE] [KEY=VALUE ...]
    torchrun --nproc-per-node 2 -m benchmarks.accuracy --methods adalezo adalezo:4 adalezo:16 ...

The runs of a seed take turns, the one with the least time on its clock next, so that a slower moment of
the machine hits all. A clock runs during steps only, not while loading, compiling or evaluating. MeZO
as published runs for `--published-steps` and in one process, the others for `--seconds`; the table says when
each of them came to the test loss that MeZO as published ended with, if that ran. KEY=VALUE overrides the
config of every run: another task, or another model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.published import PublishedMeZO
from zo_dist import ZeroOrder
from zo_dist.config import Config, load_config
from zo_dist.engines import Engine, initialize_process_group, select
from zo_dist.evaluate import evaluate
from zo_dist.learn_scale import row_loss_mean
from zo_dist.loop import ROW_LOSSES, build_batches, build_row_loss
from zo_dist.schedule import make_scheduler
from zo_dist.train import Prepared, build_optimizer, prepare

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"

ALL_WEIGHTS = ["model.parameters=null", "data.length_pool=1", "train.rows=16"]
ALL_WEIGHTS += ["train.schedule=constant", "train.final_fraction=0"]
ALL_WEIGHTS += ["optimizer.eps=1e-3", "optimizer.rounding=stochastic"]

# What each run changes of configs/quickstart.yaml.
METHODS = {
    # float32 weights and bfloat16 products: the best of the learning rates tried for it.
    "mezo_published": [*ALL_WEIGHTS, "model.dtype=float32", "optimizer.lr=8e-6"],
    "mezo": [*ALL_WEIGHTS, "optimizer.lr=8e-6", "optimizer.directions=1", "optimizer.sampler={name: dense}"],
    "lezo": [
        *(*ALL_WEIGHTS, "optimizer.lr=2e-5", "optimizer.directions=1"),
        "optimizer.sampler={name: uniform, sparsity: 0.75}",
    ],
    **{
        name: [
            *(*ALL_WEIGHTS, f"optimizer.lr={lr}", f"optimizer.directions={directions}"),
            "optimizer.sampler={name: adalezo, ratio: 0.2}",
        ]
        for name, directions, lr in (("adalezo", 1, 2e-5), ("adalezo:4", 4, 4e-5), ("adalezo:16", 16, 8e-5))
    },
    "quickstart": [],
    # Fewer directions have a rate by the root of their number; for more of them twice the rate diverges.
    "quickstart:1": ["optimizer.directions=1", "optimizer.lr=1.8e-3"],
    "quickstart:32": ["optimizer.directions=32"],
    # Slopes are about 4 there, which the learning rates make up for.
    "quickstart:rms": ["optimizer.coefficients={name: rms}", "optimizer.lr=2e-2"],
    "quickstart:z_scores": ["optimizer.coefficients={name: standardise, centre: true}", "optimizer.lr=2e-2"],
    "quickstart:momentum": ["optimizer.rule={name: momentum}", "optimizer.lr=5e-4"],
    # One direction; 14 steps of it are added up, or with a beta of .93 as many.
    "quickstart:pseuzo": [
        *("optimizer.directions=1", "optimizer.lr=3.6e-4", "optimizer.jacobian={window: 14, decay: 1.0}")
    ],
    "quickstart:momentum:1": [
        *("optimizer.directions=1", "optimizer.lr=3.6e-4", "optimizer.rule={name: momentum, beta: 0.93}")
    ],
    "quickstart:adam": ["optimizer.rule={name: adam}", "optimizer.lr=1e-2"],
}
FOUR = [*ALL_WEIGHTS, "optimizer.directions=4"]
# All weights in 4 directions, the arms drawn by each sampler. The mean update is 2e-5 of the gradient: LeZO's
# is a quarter of its rate, that of AdaLeZO as published .7 to .8, all others are without bias.
METHODS |= {
    f"sampler:{name}": [*FOUR, f"optimizer.lr={lr}", f"optimizer.sampler={{{sampler}}}"]
    for name, lr, sampler in (
        ("dense", 2e-5, "name: dense"),
        ("uniform", 8e-5, "name: uniform, sparsity: 0.75"),
        ("adalezo", 2.9e-5, "name: adalezo, ratio: 0.2"),
        ("adalezo_both", 2e-5, "name: adalezo, ratio: 0.2, clip: .inf, weigh: both"),
        ("fitted_adalezo", 2e-5, "name: fitted_adalezo"),
    )
}
# One direction in a fifth of the arms, and with 14 steps of it added up.
METHODS["adapzo"] = [
    *METHODS["adalezo"],
    "optimizer.lr=1.4e-6",
    "optimizer.jacobian={window: 14, decay: 1.0}",
]
# How far each parameter is to be perturbed: `sampler:dense` and `sampler:adalezo` are without. The file is
# what `zo-dist learn-scale ... --to scale.safetensors` writes; a running scale wants arms that are drawn.
METHODS |= {
    "scale:learned": [*METHODS["sampler:dense"], "optimizer.scale={name: learned, path: scale.safetensors}"],
    "scale:running": [*METHODS["sampler:adalezo"], "optimizer.scale={name: running}"],
}
# What the table of the README has.
USUAL = ["mezo_published", "mezo", "lezo", "adalezo", "adalezo:4", "quickstart"]


class Run:
    """One method and seed: its weights, its clock, and what it scored when."""

    def __init__(self, method: str, seed: int, arguments: argparse.Namespace, engine: Engine) -> None:
        self.method, self.seed = method, seed
        self.seconds, self.steps = 0.0, 0
        self.records: list[dict[str, Any]] = []
        config = load_config(
            QUICKSTART,
            [
                *METHODS[method],
                *("engine.kind=replicated", f"optimizer.seed={seed}", f"data.seed={seed}"),
                *(f"data.test={arguments.test}", *arguments.overrides),
            ],
        )
        published = method == "mezo_published"
        if published and engine.num_ranks > 1:
            raise ValueError("mezo_published runs in one process: leave it out, or start one")
        self._ranks = engine
        self._lr = config.optimizer.lr * (1.0 if published else arguments.lr_times)
        settings = dataclasses.replace(config.optimizer, lr=self._lr)
        config = dataclasses.replace(config, optimizer=settings)
        self.prepared = prepare(config, engine)
        self._max_steps = arguments.published_steps if published else float("inf")
        self._max_seconds = float("inf") if published else arguments.seconds
        self._eval_seconds = arguments.published_eval_seconds if published else arguments.eval_seconds
        self._step = published_step(config, self.prepared) if published else our_step(config, self.prepared)
        self._score()

    @property
    def over(self) -> bool:
        return self.steps >= self._max_steps or self.seconds >= self._max_seconds

    def advance(self) -> None:
        """One step, and a score when it is due."""
        start = time.perf_counter()
        self._step(self.steps)
        # One clock for all ranks, which have to agree on whose turn it is.
        spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        self.seconds += float(self._ranks.reduce(spent)) / self._ranks.num_ranks
        self.steps += 1
        if self.over or self.seconds >= self._next_score:
            self._score()

    def _score(self) -> None:
        self._next_score = self.seconds + self._eval_seconds
        data = self.prepared.data
        engine = select(self.prepared.model)
        # Texts would take a forward per token: of a task that has them, the loss alone.
        metrics = () if data.generate else data.task.metrics
        score = evaluate(
            engine, data.test, micro_rows=64, pad_id=data.pad_id, fast=data.fast, metrics=metrics
        )
        record = {"method": self.method, "seed": self.seed, "step": self.steps, "seconds": self.seconds}
        record.update(score.metrics, loss=score.loss, lr=self._lr)
        self.records.append(record)
        if engine.rank == 0:
            print(json.dumps(record), flush=True)


def our_step(config: Config, prepared: Prepared) -> Callable[[int], object]:
    optimizer: ZeroOrder = build_optimizer(config, prepared.model)
    scheduler = make_scheduler(optimizer, config.train)
    batches = build_batches(config, prepared.data, optimizer.engine)
    row_loss = build_row_loss(config, prepared.data)
    optimizer.prepare(batches[0][0], row_loss)

    def step(number: int) -> None:
        optimizer.step_batch(batches[number], row_loss)
        scheduler.step()

    return step


def published_step(config: Config, prepared: Prepared) -> Callable[[int], object]:
    model: nn.Module = prepared.model.eval()
    settings, row_loss = config.optimizer, ROW_LOSSES[prepared.data.task.loss]
    published = PublishedMeZO(model, settings.lr, settings.eps, settings.seed)
    engine = select(model)
    batches = build_batches(config, prepared.data, engine)

    def step(number: int) -> None:
        (batch,) = batches[number]

        def loss() -> float:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return float(row_loss_mean(row_loss, engine, batch))

        published.step(loss)

    return step


def time_to(loss: float, records: list[dict[str, Any]]) -> float | None:
    """Seconds to the first score of at most `loss`, on a straight line from the one before."""
    before = records[0]
    for record in records[1:]:
        if record["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - record["loss"])
            return float(before["seconds"] + share * (record["seconds"] - before["seconds"]))
        before = record
    return None


def main() -> None:
    arguments = parse()
    engine = Engine(nn.Identity(), initialize_process_group())
    records = [record for seed in arguments.seeds for record in run_seed(seed, arguments, engine)]
    if engine.rank:
        return
    show(records)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(r) + "\n" for r in records))
    if arguments.plot:
        plot(records, Path(arguments.plot))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=USUAL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=240.0, help="of steps, for each run of ours")
    parser.add_argument(
        "--lr-times", type=float, default=1.0, help="of each method's own rate, the published one's excepted"
    )
    parser.add_argument("--published-steps", type=int, default=200)
    parser.add_argument("--test", type=int, default=500, help="test sentences per score")
    parser.add_argument("--eval-seconds", type=float, default=20.0, help="of steps, between scores")
    parser.add_argument("--published-eval-seconds", type=float, default=240.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config, for all runs")
    return parser.parse_intermixed_args()


def run_seed(seed: int, arguments: argparse.Namespace, engine: Engine) -> Iterator[dict[str, Any]]:
    runs = [Run(method, seed, arguments, engine) for method in arguments.methods]
    while waiting := [run for run in runs if not run.over]:
        min(waiting, key=lambda run: run.seconds).advance()
    for run in runs:
        yield from run.records


def show(records: list[dict[str, Any]]) -> None:
    """A table for people, in GitHub's form; means over the seeds."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["method"], record["seed"]), []).append(record)
    targets = {seed: run[-1] for (method, seed), run in runs.items() if method == "mezo_published"}
    print(
        "| method | seeds | steps | seconds | accuracy | cross-entropy | seconds to the published | times |"
    )
    print("|---" * 8 + "|")
    for method in dict.fromkeys(record["method"] for record in records):
        of_seed = {seed: run for (name, seed), run in runs.items() if name == method}
        ends = [run[-1] for run in of_seed.values()]
        cells = [f"{method}, lr {ends[0]['lr']:g}", str(len(ends))]
        cells += [f"{statistics.mean(e[key] for e in ends):.0f}" for key in ("step", "seconds")]
        for key in ("accuracy", "loss"):
            cells.append(f"{statistics.mean(e[key] for e in ends):.3f}" if key in ends[0] else "")
        reached = {
            seed: time_to(targets[seed]["loss"], run) for seed, run in of_seed.items() if seed in targets
        }
        times = {seed: t for seed, t in reached.items() if t}
        if times and len(times) == len(reached):
            cells += [f"{statistics.mean(times.values()):.0f}"]
            cells += [f"1/{statistics.mean(targets[seed]['seconds'] / t for seed, t in times.items()):.1f}"]
        else:
            cells += [f"{len(times)} of {len(reached)} came there" if reached else "", ""]
        print("| " + " | ".join(cells) + " |")


def plot(records: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = [key for key in ("loss", "accuracy") if key in records[0]]
    figure = Figure(figsize=(4.5 * len(keys), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(keys), squeeze=False)
    methods = list(dict.fromkeys(record["method"] for record in records))
    for axis, key in zip(axes[0], keys, strict=True):
        for color, method in enumerate(methods):
            for seed in dict.fromkeys(r["seed"] for r in records if r["method"] == method):
                run = [r for r in records if (r["method"], r["seed"]) == (method, seed)]
                first = seed == min(r["seed"] for r in records if r["method"] == method)
                label = method if first else None
                values = [r[key] for r in run]
                axis.plot(
                    [r["seconds"] for r in run], values, "o-", ms=2, lw=1, color=f"C{color}", label=label
                )
        # MeZO as published takes many times as long as the others.
        xscale = "symlog" if "mezo_published" in methods else "linear"
        axis.set(xlabel="training seconds", ylabel="test " + key, xscale=xscale)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
