"""Charts of what a run learnt, and from what: losses, slopes, arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from zo_dist.report.chart import Bars, Chart, Heat, Line, Style, bins, mean, thinned
from zo_dist.report.history import History, line
from zo_dist.tasks import get_task

# What is named in the texts: above these a chart says so.
_LARGEST, _HALF, _COLLAPSED = 0.01, 0.5, 0.5
_ZEROS = 0.1
# Of a float32: the step from 1 to the next number.
_FLOAT32 = 2.0**-23


def loss(runs: Sequence[History]) -> Chart:
    marks: list[Line] = []
    found = []
    for number, run in enumerate(runs):
        steps = [r.step + 1.0 for r in run.records]
        losses = [mean(r.losses) for r in run.records]
        marks.append(line(run, number, "steps", steps, losses, "faint"))
        if len(losses) >= 120:
            smooth = thinned(steps, 60), thinned(losses, 60)
            marks.append(line(run, number, "steps, mean", *smooth))
        marks += _evaluations(run, number, "loss")
        scores = [e["loss"] for e in run.evals("test")]
        if len(scores) > 1 and None not in scores and scores[-1] > scores[0]:
            found.append(
                f"{run.name}: the loss of the test rows rose from {scores[0]:.4f} to {scores[-1]:.4f}."
            )
    return Chart(
        key="loss",
        title="Loss",
        y="mean loss",
        marks=marks,
        found=found,
        shows="The loss of each step's rows (mean of both sides of their directions), and of the "
        "evaluations.",
        worrying="a loss of evaluations that does not fall while that of the steps does: the rows are "
        "learnt by heart; or one that rises: lower lr.",
    )


def metrics(runs: Sequence[History]) -> Chart:
    """What the task counts: the share of right answers, or how well texts match. None for instructions."""
    marks = [
        line
        for number, run in enumerate(runs)
        for metric in get_task(run.config.data.task).metrics
        for line in _evaluations(run, number, metric)
    ]
    return Chart(
        key="metrics",
        title="Metrics",
        y="mean over rows, %",
        marks=marks,
        shows="Each metric of the task in each evaluation: the share of rows that are answered right, or the "
        "mean F1 or the share of exact matches of texts.",
        worrying="differences below one standard error, 50% / sqrt(rows): of 500 rows, 2.2 points.",
    )


def learning_rate(runs: Sequence[History]) -> Chart:
    marks = []
    for number, run in enumerate(runs):
        steps = [r.step + 1.0 for r in run.records]
        marks.append(line(run, number, "lr", steps, [r.lr for r in run.records]))
        told = [e for e in run.of("step") if e["lr_factor"] not in (None, 1.0) and e["lr"] is not None]
        if told:
            scaled = [e["lr"] * e["lr_factor"] for e in told]
            marks.append(
                line(run, number, "lr x lr_factor", [float(e["step"]) for e in told], scaled, "dashes")
            )
    return Chart(
        key="learning-rate",
        title="Learning rate",
        y="lr",
        marks=marks,
        shows="What the schedule gave; dashed, where the sampler thins or clips, what an arm gets of it on "
        "average.",
        worrying="a dashed line far below the other: the run learns more slowly than lr says.",
    )


def slopes(runs: Sequence[History]) -> Chart:
    marks: list[Line] = []
    for number, run in enumerate(runs):
        x, typical, largest = [], [], []
        for a, b in bins(len(run.records), 100):
            sizes = sorted(abs(s) for record in run.records[a:b] for s in record.slopes)
            if sizes:
                x.append((a + 1 + b) / 2.0)
                typical.append(sizes[len(sizes) // 2])
                largest.append(sizes[-1])
        marks.append(line(run, number, "median", x, typical))
        marks.append(line(run, number, "largest", x, largest, "faint"))
    return Chart(
        key="slopes",
        title="Size of the coefficients",
        y="|slope|, loss per parameter unit",
        log_y=True,
        marks=marks,
        shows="The slopes of the loss along the directions, of which coefficients are made: in each stretch "
        "of steps, the median and the largest.",
        worrying="a largest far above the median at single steps: odd batches move the weights; or a median "
        "that grows: the run diverges.",
    )


def distribution(runs: Sequence[History]) -> Chart:
    edges = [-6.0 + 0.25 * i for i in range(49)]
    middles = [a + 0.125 for a in edges[:-1]]
    marks: list[Line] = []
    found = []
    for number, run in enumerate(runs):
        sizes = standardised(run)
        if not sizes:
            continue
        counts = [0] * len(middles)
        for size in sizes:
            counts[min(max(int((size + 6.0) // 0.25), 0), len(counts) - 1)] += 1
        share = [count / len(sizes) / 0.25 for count in counts]
        marks.append(Line(name=run.name, x=middles, y=share, run=number))
        few = max(1, round(_LARGEST * len(sizes)))
        squares = sorted((size * size for size in sizes), reverse=True)
        carried = math.fsum(squares[:few]) / (math.fsum(squares) or 1.0)
        if len(sizes) >= 200 and carried > _HALF:
            found.append(f"{run.name}: the largest 1% of the slopes carry {carried:.0%} of their squares.")
    normal = [math.exp(-m * m / 2.0) / math.sqrt(2.0 * math.pi) for m in middles]
    marks.append(Line(name="normal law", x=middles, y=normal, run=None, style="dashes"))
    return Chart(
        key="distribution",
        title="Distribution of the coefficients",
        x="slope / root mean square of the steps around it",
        y="density",
        marks=marks,
        found=found,
        shows="How the slopes are spread; those beyond 6 are in the outermost points.",
        worrying="long tails: of a normal law the largest 1% carry 8% of the squares. Where they carry "
        "half, few rows move the weights: see clip_rows, or coefficients sign or clip.",
    )


def standardised(run: History) -> list[float]:
    """All slopes over the root mean square of some 200 or more around them, which falls as the loss does."""
    count = sum(len(record.slopes) for record in run.records)
    result: list[float] = []
    for a, b in bins(len(run.records), max(1, min(20, count // 200))):
        mine = [s for record in run.records[a:b] for s in record.slopes]
        root = math.sqrt(math.fsum(s * s for s in mine) / max(len(mine), 1))
        result += [s / root for s in mine if root]
    return result


def sides(runs: Sequence[History]) -> Chart:
    marks: list[Line] = []
    found = []
    for number, run in enumerate(runs):
        settings = run.config.optimizer
        distance = settings.build_estimator().distance(settings.eps)
        written = [r for r in run.records if r.slopes]
        x, y = [], []
        for a, b in bins(len(written), 200):
            pairs = [(abs(s) * distance, abs(mean(r.losses))) for r in written[a:b] for s in r.slopes]
            ratios = sorted(difference / whole for difference, whole in pairs if difference and whole)
            if ratios:
                x.append(mean([r.step + 1.0 for r in written[a:b]]))
                y.append(ratios[len(ratios) // 2])
        marks.append(line(run, number, "median", x, y))
        all_slopes = [s for r in written for s in r.slopes]
        zeros = sum(s == 0.0 for s in all_slopes) / max(len(all_slopes), 1)
        if zeros > _ZEROS:
            found.append(
                f"{run.name}: both sides of {zeros:.0%} of the directions have the same loss: raise eps."
            )
        elif y and sorted(y)[len(y) // 2] < 8.0 * _FLOAT32:
            found.append(
                f"{run.name}: the two losses differ by a few units of a float32's rounding: raise eps."
            )
    last = max((len(run.records) for run in runs), default=1)
    marks.append(
        Line(name="rounding of a float32", x=[1.0, last], y=[_FLOAT32] * 2, run=None, style="dashes")
    )
    return Chart(
        key="sides",
        title="Difference of the two losses",
        y="|difference| / loss",
        log_y=True,
        marks=marks,
        found=found,
        shows="How far apart the losses at the two sides of a direction are, relative to the loss; median "
        "of each stretch of steps. Sides of equal loss are left out of the line.",
        worrying="values near the dashed line, or many equal losses: eps is too small for the precision, "
        "and slopes are rounding. A 16-bit model rounds far more coarsely than the line: there, repeat a "
        "run with another eps, which should move this line by the same factor.",
    )


def probabilities(run: History, number: int) -> Chart:
    """The heat map of one run, the `number`th. Raises what `History.probabilities` does."""
    settings = run.config.optimizer.sampler
    seen = run.probabilities
    found = []
    marks = []
    if seen:
        pieces = bins(len(seen), 400)
        x = [mean([float(i + 1) for i in range(a, b)]) for a, b in pieces]
        z = [[mean([seen[i][arm] for i in range(a, b)]) for a, b in pieces] for arm in range(len(run.arms))]
        times = [run.seconds_at(step) for step in x]
        marks = [Heat(rows=run.arms, x=x, z=z, seconds=times)]
        top = max(range(len(run.arms)), key=lambda arm: seen[-1][arm])
        first, last = seen[0][top], seen[-1][top]
        if len(run.arms) >= 4 and last > max(_COLLAPSED, 2.0 * first):
            found.append(f"{run.name}: {run.arms[top]} has the probability {last:.2f}, at first {first:.2f}.")
    what = f"p of each arm (layer) that the sampler {settings.name} drew by, rebuilt from the log."
    none = f"The sampler {settings.name} has no probabilities that change: see how often each arm was drawn."
    return Chart(
        key=f"probabilities-{number}",
        title=f"Probabilities of the arms, {run.name}",
        y="arm",
        marks=marks,
        found=found,
        shows=what if seen else none,
        worrying="one row that takes all: the bandit has collapsed onto an arm; raise tau or gamma, or use "
        "correct: true. No structure after many steps: slopes do not tell the arms apart.",
    )


def draws(runs: Sequence[History]) -> Chart:
    marks = []
    found = []
    for number, run in enumerate(runs):
        counts, total = [0] * len(run.arms), 0
        for record in run.records:
            total += len(record.arms)
            for arms in record.arms:
                for arm in arms:
                    counts[arm] += 1
        values = [100.0 * count / max(total, 1) for count in counts]
        marks.append(Bars(name=run.name, labels=run.arms, values=values, run=number))
        never = [arm for arm, count in zip(run.arms, counts, strict=True) if not count]
        if never and total >= 10 * len(run.arms):
            found.append(f"{run.name}: never drawn in {total} directions: {', '.join(never)}.")
    return Chart(
        key="draws",
        title="How often each arm was drawn",
        x="arm",
        y="% of the directions",
        marks=marks,
        found=found,
        shows="In how many of the directions each layer was perturbed and written.",
        worrying="arms that are hardly ever drawn: they are not trained.",
    )


def _evaluations(run: History, number: int, key: str) -> list[Line]:
    lines = []
    styles: dict[str, Style] = {"validation": "points", "test": "squares"}
    for split, style in styles.items():
        evals = [e for e in run.evals(split) if e[key] is not None]
        times = 1.0 if key == "loss" else 100.0
        lines.append(
            Line(
                name=f"{run.name}: {split}" if key == "loss" else f"{run.name}: {key}, {split}",
                x=[float(e["step"]) for e in evals],
                y=[times * e[key] for e in evals],
                seconds=[float(e["seconds"]) for e in evals],
                run=number,
                style=style,
            )
        )
    return [line for line in lines if len(line.x)]
