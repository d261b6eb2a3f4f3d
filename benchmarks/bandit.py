"""What samplers learn of the arms, and what it is worth, against the truth.

    python -m benchmarks.bandit [--arms 34 82] [--directions 1 4 16] [--json FILE]
    python -m benchmarks.bandit --model smollm2 [--steps 60] [--directions 8] [--json FILE]

The first is a simulation: arms with log-normal gradient norms, slopes that are normal with the sum of the
drawn arms' squared norms as variance; no model. The second takes the quickstart's model and sentences, at
the starting weights (lr 0): what each bandit has learnt by its own draws, against the squared gradient of
each arm by autograd, on held-out rows in batches as large as a direction's. Columns:

* `norms`: correlation of what was learnt with the arms' true gradient norms.
* `drawing`: the variance that drawing arms brings into an unbiased update (clip .inf), `sum of v (1 - p) /
  (K p)`, over its least value, that of p like sqrt(v). Exact, from p and the true v.
* `whole`: the variance of one direction's whole estimate, noise of the other arms in it and all, over that
  of uniform p. Exact for signs; arms of equal size in the simulation.

LeZO's updates are weighted up by arms / kept here, to be unbiased too.
"""

from __future__ import annotations

import argparse
import json
import math
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
from zo_dist.samplers import Bandit, Draw
from zo_dist.tasks import choice_loss
from zo_dist.train import Prepared, build_optimizer, prepare

RATIO = 0.2
MARKS = (50, 200, 1000)
BANDITS: dict[str, Callable[[], Bandit]] = {
    "adalezo": lambda: AdaLeZO(RATIO, clip=math.inf),
    # Not published: the averages last ten times as long, and are corrected for having begun at 0.
    "adalezo, alpha .01, correct": lambda: AdaLeZO(RATIO, clip=math.inf, alpha=0.01, correct=True),
    "fitted_adalezo": lambda: FittedAdaLeZO(RATIO, clip=math.inf),
}


def drawing_variance(v: Sequence[float], p: Sequence[float], draws: int) -> float:
    """Of `sum of (n / (K p)) gradient`, n counting K draws with replacement, around the gradient."""
    return math.fsum(x * (1.0 - q) / (draws * q) for x, q in zip(v, p, strict=True))


def least_drawing_variance(v: Sequence[float], draws: int) -> float:
    roots = [math.sqrt(x) for x in v]
    return drawing_variance(v, [root / math.fsum(roots) for root in roots], draws)


def whole_variance(v: Sequence[float], p: Sequence[float], draws: int, sizes: Sequence[float]) -> float:
    """Of one direction's estimate with signs as noise, no clip, around the gradient.

    Arm l moves by `(n / (K p)) g z`, g being the slope along all drawn arms, so by
    `size_l sum over arms k of E[(n_l / (K p_l))^2; k drawn] v_k` in the mean of its square.
    """

    def square(chance: float) -> float:
        return draws * chance * (1.0 - chance) + (draws * chance) ** 2

    total = -math.fsum(v)
    for arm, size in enumerate(sizes):
        for other, x in enumerate(v):
            drawn = square(p[arm])
            if other != arm:
                drawn -= (1.0 - p[other]) ** draws * square(p[arm] / (1.0 - p[other]))
            total += size * x * drawn / (draws * p[arm]) ** 2
    return total


def dense_variance(v: Sequence[float], sizes: Sequence[float]) -> float:
    return (math.fsum(sizes) - 1.0) * math.fsum(v)


def uniform_variances(v: Sequence[float], kept: int, sizes: Sequence[float]) -> tuple[float, float]:
    """LeZO's drawing and whole variance: without replacement, each update times arms / kept."""
    arms, total = len(v), math.fsum(v)
    share = kept / arms
    pair = share * (kept - 1) / (arms - 1)
    own = math.fsum(size * x * (share - pair) for size, x in zip(sizes, v, strict=True))
    whole = (own + pair * math.fsum(sizes) * total) / share**2 - total
    return total * (1.0 / share - 1.0), whole


def learnt_norms(bandit: Bandit) -> list[float]:
    """In some unit: what the bandit thinks the gradient norms are."""
    if isinstance(bandit, FittedAdaLeZO):
        return [math.sqrt(x) for x in bandit.v]
    assert isinstance(bandit, AdaLeZO)
    return bandit.scores


def judged(bandit: Bandit, v: Sequence[float], sizes: Sequence[float]) -> dict[str, float]:
    norms, learnt = [math.sqrt(x) for x in v], learnt_norms(bandit)
    p, draws = bandit.probabilities, bandit.num_draws
    even = [1.0 / len(v)] * len(v)
    return {
        "norms": statistics.correlation(learnt, norms) if len(set(learnt)) > 1 else 0.0,
        "drawing": drawing_variance(v, p, draws) / least_drawing_variance(v, draws),
        "whole": whole_variance(v, p, draws, sizes) / whole_variance(v, even, draws, sizes),
    }


def unlearnt(v: Sequence[float], sizes: Sequence[float]) -> Iterator[tuple[str, dict[str, float]]]:
    """Dense, LeZO, and the probabilities that the bandits seek."""
    draws = max(1, int(RATIO * len(v)))
    least, even = least_drawing_variance(v, draws), [1.0 / len(v)] * len(v)
    of_even = whole_variance(v, even, draws, sizes)
    yield "dense", {"drawing": 0.0, "whole": dense_variance(v, sizes) / of_even}
    drawing, whole = uniform_variances(v, draws, sizes)
    yield "uniform", {"drawing": drawing / least, "whole": whole / of_even}
    roots = [math.sqrt(x) for x in v]
    best = [root / math.fsum(roots) for root in roots]
    yield "p like sqrt(v)", {"drawing": 1.0, "whole": whole_variance(v, best, draws, sizes) / of_even}


def learn_from_normals(
    bandit: Bandit, v: Sequence[float], directions: int, steps: int, numbers: random.Random
) -> None:
    """So many steps of a bandit that is bound already: slopes are normal, with v of the drawn arms."""
    arms = range(len(v))
    for _ in range(steps):
        draws, slopes = [], []
        for _ in range(directions):
            drawn = sorted(set(numbers.choices(arms, bandit.probabilities, k=bandit.num_draws)))
            # Weights are nothing to learn from.
            draws.append(Draw(tuple(drawn), (1.0,) * len(drawn)))
            slopes.append(numbers.gauss(0.0, math.sqrt(math.fsum(v[arm] for arm in drawn))))
        bandit.observe(draws, slopes)


def log_normal_arms(arms: int, numbers: random.Random) -> list[float]:
    """Squared gradient norms: one arm in twenty has ten times the norm of another in twenty."""
    return [numbers.lognormvariate(0.0, 0.7) ** 2 for _ in range(arms)]


def simulated(arms: int, directions: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Means over seeds, which draw other arms and slopes."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(seeds):
        numbers = random.Random(seed)
        v, sizes = log_normal_arms(arms, numbers), [1.0] * arms
        for name, figures in unlearnt(v, sizes):
            found.setdefault((name, 0), []).append(figures)
        for name, make in BANDITS.items():
            bandit, done = make(), 0
            bandit.bind(arms, Noise())
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
    sizes = [float(arm.numel) for arm in optimizer.arms]
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
        bandit.bind(len(v), optimizer.noise)
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
    columns = ("arms", "directions", "sampler", "steps", "norms", "drawing", "whole")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for line in lines:
        cells = [f"{line['arms']}", f"{line['directions']}", line["sampler"], f"{line['steps'] or ''}"]
        cells += [f"{line[key]:.2f}" if key in line else "" for key in ("norms", "drawing", "whole")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
