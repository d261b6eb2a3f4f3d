"""What samplers learn of the arms, and what it is worth, against the truth.

    python -m benchmarks.bandit [--arms 34 82] [--directions 1 4 16] [--json FILE]
    python -m benchmarks.bandit --model smollm2 [--steps 60] [--directions 8] [--json FILE]

The first is a simulation: equal arms with log-normal gradient norms, slopes that are normal with the sum of
the drawn arms' squared norms, as they are weighted in the probe, as variance; no model. The second takes
the quickstart's model and sentences, at the starting weights (lr 0): what each bandit has learnt by its own
draws, against the squared gradient of each arm by autograd, on held-out rows in batches as large as a
direction's. Columns:

* `norms`: correlation of what was learnt with the arms' true gradient norms (for the fit, times their sizes).
* `whole`: the variance of one direction's whole estimate, noise of the other arms in it and all, over that of
  `dense`, which takes as many forwards. Computed from p and the true norms, not sampled; exact for signs. (In
  the last row of what is not learnt, where late arms are cheaper, times the time of the row above it.)

No weight is clipped, and LeZO's updates are weighted up by arms / kept, so that all are unbiased.
docs/methods.md derives the formulas.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import ALL_WEIGHTS, QUICKSTART
from zo_dist import AdaLeZO, FittedAdaLeZO
from zo_dist.batches import StepBatches
from zo_dist.config import load_config
from zo_dist.engines import Engine, initialize_process_group
from zo_dist.loop import build_batches
from zo_dist.noise import Noise
from zo_dist.samplers import Bandit, Weigh
from zo_dist.tasks import choice_loss
from zo_dist.train import Prepared, build_optimizer, prepare

RATIO = 0.2
MARKS = (50, 200, 1000)
# Weights in an arm of the simulation: many, as in a layer.
SIZE = 1_000_000
BANDITS: dict[str, Callable[[], Bandit]] = {
    "adalezo": lambda: AdaLeZO(RATIO, clip=math.inf),
    # Not published: the averages last ten times as long, and are corrected for having begun at 0.
    "adalezo, alpha .01, correct": lambda: AdaLeZO(RATIO, clip=math.inf, alpha=0.01, correct=True),
    "adalezo, weigh both": lambda: AdaLeZO(RATIO, clip=math.inf, weigh="both"),
    "fitted_adalezo, draws 6": lambda: FittedAdaLeZO(draws=6),
    "fitted_adalezo": FittedAdaLeZO,
}


def whole_variance(
    v: Sequence[float], p: Sequence[float], draws: int, sizes: Sequence[float], weigh: Weigh
) -> float:
    """Of one direction's estimate with signs as noise, no clip, around the gradient.

    `v`: squared gradients of the arms. Arm l moves by `c_l g z_l`, g being the slope along `b_k z_k` of
    all arms k, so by `size_l sum over k of E[c_l^2 b_k^2] v_k` in the mean of its square, with `c = a`, b = 1
    where drawn, or both the root of a.
    """
    moment = _moment_of_updates if weigh == "update" else _moment_of_both
    total = -math.fsum(v)
    for arm, size in enumerate(sizes):
        total += size * math.fsum(x * moment(p, draws, arm, other) for other, x in enumerate(v))
    return total


def _moment_of_both(p: Sequence[float], draws: int, arm: int, other: int) -> float:
    """`E[a_l a_k]`, the counts of draws being multinomial."""
    own = 1.0 / (draws * p[arm]) if arm == other else 0.0
    return 1.0 - 1.0 / draws + own


def _moment_of_updates(p: Sequence[float], draws: int, arm: int, other: int) -> float:
    """`E[a_l^2; k drawn]`."""

    def square(chance: float) -> float:
        return draws * chance * (1.0 - chance) + (draws * chance) ** 2

    drawn = square(p[arm])
    if other != arm:
        drawn -= (1.0 - p[other]) ** draws * square(p[arm] / (1.0 - p[other]))
    return drawn / (draws * p[arm]) ** 2


def dense_variance(v: Sequence[float], sizes: Sequence[float]) -> float:
    return (math.fsum(sizes) - 1.0) * math.fsum(v)


def uniform_variance(v: Sequence[float], kept: int, sizes: Sequence[float]) -> float:
    """LeZO's: without replacement, each update times arms / kept."""
    arms, total = len(v), math.fsum(v)
    share = kept / arms
    pair = share * (kept - 1) / (arms - 1)
    own = math.fsum(size * x * (share - pair) for size, x in zip(sizes, v, strict=True))
    return (own + pair * math.fsum(sizes) * total) / share**2 - total


def best_probabilities(v: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Of weights in both: like the root of size times squared gradient."""
    roots = [math.sqrt(size * x) for size, x in zip(sizes, v, strict=True)]
    return [root / math.fsum(roots) for root in roots]


def learnt_roots(bandit: Bandit) -> list[float]:
    """In some unit: the gradient norms that the bandit believes in; for the fit, over the root of sizes."""
    if isinstance(bandit, FittedAdaLeZO):
        return [math.sqrt(x) for x in bandit.v]
    assert isinstance(bandit, AdaLeZO)
    return bandit.scores


def judged(bandit: Bandit, v: Sequence[float], sizes: Sequence[float]) -> dict[str, float]:
    learnt = learnt_roots(bandit)
    if isinstance(bandit, FittedAdaLeZO):
        learnt = [x * math.sqrt(size) for x, size in zip(learnt, sizes, strict=True)]
    norms = [math.sqrt(x) for x in v]
    p, draws = bandit.probabilities, bandit.num_draws
    return {
        "norms": statistics.correlation(learnt, norms) if len(set(learnt)) > 1 else 0.0,
        "whole": whole_variance(v, p, draws, sizes, bandit.weigh) / dense_variance(v, sizes),
    }


def unlearnt(v: Sequence[float], sizes: Sequence[float]) -> Iterator[tuple[str, dict[str, float]]]:
    """LeZO, and the probabilities that bandits seek."""
    draws, dense = max(1, int(RATIO * len(v))), dense_variance(v, sizes)
    yield "uniform", {"whole": uniform_variance(v, draws, sizes) / dense}
    norms, best = best_probabilities(v, [1.0] * len(v)), best_probabilities(v, sizes)
    told: list[tuple[str, list[float], int, Weigh]] = [
        (f"p like norms, update, {draws} draws", norms, draws, "update"),
        (f"p like norms, both, {draws} draws", norms, draws, "both"),
        (f"best p, both, {draws} draws", best, draws, "both"),
        ("best p, 1 draw", best, 1, "both"),
    ]
    for name, p, count, weigh in told:
        yield name, {"whole": whole_variance(v, p, count, sizes, weigh) / dense}
    # A step of one direction runs the layers before its arm once, and those after it twice.
    times = [2.0 - arm / (len(v) - 1) for arm in range(len(v))]
    quick = best_probabilities(v, [size / time for size, time in zip(sizes, times, strict=True)])
    slower = math.fsum(map(operator.mul, quick, times)) / math.fsum(map(operator.mul, best, times))
    yield "the same by cost too", {"whole": slower * whole_variance(v, quick, 1, sizes, "both") / dense}


class QuickUniforms(Noise):
    """The numbers of draws from Python's generator: some 100 times as fast, and nothing else is used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._numbers = random.Random(seed)

    def uniforms(self, name: str, step: int, direction: int, numel: int) -> list[float]:
        return [self._numbers.random() for _ in range(numel)]


def learn_from_normals(
    bandit: Bandit, v: Sequence[float], directions: int, steps: int, numbers: random.Random
) -> None:
    """So many steps of a bandit that is bound already: slopes are normal, with v of the drawn arms."""
    for step in range(steps):
        draws = [bandit.draw(step, direction) for direction in range(directions)]
        squares = [sum(b * b * v[arm] for arm, b in zip(d.arms, d.lengths, strict=True)) for d in draws]
        bandit.observe(draws, [numbers.gauss(0.0, math.sqrt(square)) for square in squares])


def log_normal_arms(arms: int, numbers: random.Random) -> list[float]:
    """Squared gradient norms: one arm in twenty has ten times the norm of another in twenty."""
    return [numbers.lognormvariate(0.0, 0.7) ** 2 for _ in range(arms)]


def simulated(arms: int, directions: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Means over seeds, which draw other arms and slopes."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(seeds):
        numbers = random.Random(seed)
        v, sizes = log_normal_arms(arms, numbers), [SIZE] * arms
        for name, figures in unlearnt(v, sizes):
            found.setdefault((name, 0), []).append(figures)
        for name, make in BANDITS.items():
            bandit, done = make(), 0
            bandit.bind(sizes, QuickUniforms(seed))
            for mark in MARKS:
                learn_from_normals(bandit, v, directions, mark - done, numbers)
                done = mark
                found.setdefault((name, mark), []).append(judged(bandit, v, sizes))
    for (name, mark), many in found.items():
        means = {key: statistics.mean(one[key] for one in many) for key in many[0]}
        yield {"arms": arms, "directions": directions, "sampler": name, "steps": mark, **means}


def on_model(arguments: argparse.Namespace, engine: Engine) -> Iterator[dict[str, Any]]:
    (directions,) = arguments.directions
    overrides = [*ALL_WEIGHTS, "engine.kind=replicated", f"optimizer.directions={directions}"]
    overrides += [f"train.rows={arguments.rows}", f"model.dtype={arguments.dtype}"]
    config = load_config(QUICKSTART, [*overrides, "optimizer.self_check=false"])
    prepared = prepare(config, engine)
    optimizer = build_optimizer(config, prepared.model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    arms = [[p.name for p in arm.params] for arm in optimizer.arms]
    sizes = [arm.numel for arm in optimizer.arms]
    exact = prepare(load_config(QUICKSTART, [*overrides, "model.dtype=float32"]), engine)
    v = true_squares(exact, arms, arguments.rows // directions, arguments.truth_batches)
    del exact
    deviation = statistics.pstdev(v) / statistics.mean(v)
    print(
        f"{arguments.model}: {len(v)} arms, squared norms {min(v):.3g} to {max(v):.3g}, "
        f"deviation over mean {deviation:.2f}",
        flush=True,
    )
    place = {"arms": len(v), "directions": directions}
    for name, figures in unlearnt(v, sizes):
        yield {**place, "sampler": name, "steps": 0, **figures}
    batches = build_batches(config, prepared.data, optimizer.engine)
    for name, make in BANDITS.items():
        bandit = make()
        bandit.bind(sizes, optimizer.noise)
        # The weights are where they were, so each bandit meets the same steps.
        optimizer.sampler, optimizer.step_count = bandit, 0
        for step in range(arguments.steps):
            optimizer.step_batch(batches[step], choice_loss)
            if step + 1 in (arguments.steps // 4, arguments.steps // 2, arguments.steps):
                yield {**place, "sampler": name, "steps": step + 1, **judged(bandit, v, sizes)}


def true_squares(prepared: Prepared, arms: list[list[str]], rows: int, batches: int) -> list[float]:
    """The mean squared gradient of each arm over batches of so many held-out rows."""
    data, model = prepared.data, prepared.model
    held_out = StepBatches(
        data.validation, rows_per_step=rows, micro_rows=None, length_pool=1, seed=0, rank=0, num_ranks=1,
        pad_id=data.pad_id, fast=data.fast, device=torch.device("cpu"),
    )  # fmt: skip
    params: dict[str, nn.Parameter] = dict(model.named_parameters())
    squares = [0.0] * len(arms)
    for batch in range(batches):
        loss = choice_loss(model, held_out[batch][0]).mean()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        for arm, names in enumerate(arms):
            squares[arm] += sum(float(grads[name].double().square().sum()) for name in names) / batches
    return squares


def main() -> None:
    arguments = parse()
    lines: list[dict[str, Any]] = []
    if arguments.model:
        engine = Engine(nn.Identity(), initialize_process_group())
        for line in on_model(arguments, engine):
            # A run takes minutes; what it has found by then is not to be lost with it.
            print(json.dumps(line), flush=True)
            lines.append(line)
    else:
        for arms in arguments.arms:
            for directions in arguments.directions:
                lines += simulated(arms, directions, arguments.seeds)
    show(lines)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", nargs="+", type=int, default=[34, 82])
    parser.add_argument("--directions", nargs="+", type=int, help="1 4 16; with --model one of them, 8")
    parser.add_argument("--seeds", type=int, default=3, help="of the simulation")
    parser.add_argument("--model", choices=["smollm2"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=60, help="with --model")
    parser.add_argument("--rows", type=int, default=16, help="with --model, per step")
    parser.add_argument("--truth-batches", type=int, default=48, help="held-out batches of rows / directions")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    arguments.directions = arguments.directions or ([8] if arguments.model else [1, 4, 16])
    return arguments


def show(lines: list[dict[str, Any]]) -> None:
    """A table for people, in GitHub's form."""
    columns = ("arms", "directions", "sampler", "steps", "norms", "whole")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for line in lines:
        cells = [f"{line['arms']}", f"{line['directions']}", line["sampler"], f"{line['steps'] or ''}"]
        cells += [f"{line[key]:.2f}" if key in line else "" for key in ("norms", "whole")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
