"""Draws: determinism, weights, unbiasedness, state."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest
import table
import torch
from injected import remembered_noise
from torch import nn

import zo_dist
from benchmarks.bandit import (
    QuickUniforms,
    best_probabilities,
    dense_variance,
    judged,
    learn_from_normals,
    log_normal_arms,
    whole_variance,
)
from zo_dist import AdaLeZO, FittedAdaLeZO, Uniform
from zo_dist.noise import Noise
from zo_dist.samplers import Bandit, Draw, Sampler, Weigh


def bound(sampler: Sampler, num_arms: int = 7, seed: int = 0) -> Sampler:
    sampler.bind([5] * num_arms, Noise("rademacher", seed))
    return sampler


# Of 7 arms, 3 draws. All are unbiased but where they clip.
BANDITS: dict[str, Callable[..., Bandit]] = {
    "adalezo": lambda clip=math.inf, **options: AdaLeZO(ratio=0.5, clip=clip, **options),
    "adalezo_correct": lambda clip=math.inf: AdaLeZO(ratio=0.5, clip=clip, correct=True),
    "adalezo_both": lambda clip=math.inf: AdaLeZO(ratio=0.5, clip=clip, weigh="both"),
    "fitted_adalezo": lambda: FittedAdaLeZO(draws=3),
}


def unit(*arms: int) -> Draw:
    """Arms that are perturbed alike; their weights are nothing to learn from."""
    return Draw(arms, (1.0,) * len(arms), (1.0,) * len(arms))


def taught(name: str = "adalezo", seed: int = 0, **options: float) -> Bandit:
    """A bandit whose arms have very different scores."""
    sampler = BANDITS[name](**options)
    sampler.bind([5] * 7, Noise("rademacher", seed))
    # Enough for a fit to be sure that the first arm does nothing.
    for _ in range(40 if name in ("adalezo_correct", "fitted_adalezo") else 1):
        sampler.observe([unit(arm) for arm in range(7)], [float(arm**2) for arm in range(7)])
    return sampler


@pytest.mark.parametrize("name", list(table.SAMPLERS))
def test_draws_are_ascending_unique_and_depend_on_seed_step_and_direction_alone(name: str) -> None:
    one, two = bound(table.SAMPLERS[name]()), bound(table.SAMPLERS[name]())
    other = bound(table.SAMPLERS[name](), seed=1)
    places = [(step, direction) for step in range(20) for direction in range(4)]
    draws = [one.draw(*place) for place in places]
    assert [two.draw(*place) for place in reversed(places)] == draws[::-1]
    for draw in draws:
        assert list(draw.arms) == sorted(set(draw.arms))
        assert len(draw.arms) == len(draw.weights) == len(draw.lengths) > 0
        assert all(0 <= arm < 7 for arm in draw.arms)
    if name != "dense":
        assert [other.draw(*place) for place in places] != draws
        assert len(set(draws)) > 10


def gains(draw: Draw) -> dict[int, float]:
    """What the arms' gradients are multiplied by, on their way through probe and update."""
    return {a: w * b for a, w, b in zip(draw.arms, draw.weights, draw.lengths, strict=True)}


@pytest.mark.parametrize("name", list(table.SAMPLERS))
def test_lr_factor_is_the_mean_weight_over_draws_and_arms(name: str) -> None:
    steps = 3000
    samplers = [bound(table.SAMPLERS[name]())]
    if name in BANDITS:
        samplers += [taught(name), *([] if name == "fitted_adalezo" else [taught(name, clip=1.5)])]
    for sampler in samplers:
        sampler.noise = QuickUniforms(0)
        means = [sum(gains(sampler.draw(step, 0)).values()) / 7 for step in range(steps)]
        spread = torch.tensor(means).double().std().item()
        assert sum(means) / steps == pytest.approx(
            sampler.lr_factor, abs=5 * spread / math.sqrt(steps) + 1e-9
        )


@pytest.mark.parametrize("name", list(BANDITS))
def test_a_bandit_without_clip_weighs_every_arm_1_on_average(name: str) -> None:
    sampler, steps = taught(name), 6000
    sampler.noise = QuickUniforms(0)
    totals = torch.zeros(steps, 7, dtype=torch.float64)
    for step in range(steps):
        drawn = gains(sampler.draw(step, 0))
        totals[step, list(drawn)] = torch.tensor(list(drawn.values()), dtype=torch.float64)
    # n of K draws is binomial: n / (K p) has mean 1 and variance (1 - p) / (K p).
    for arm, p in enumerate(sampler.probabilities):
        deviation = math.sqrt((1 - p) / (sampler.num_draws * p) / steps)
        assert abs(float(totals[:, arm].mean()) - 1) < 5 * deviation, arm
    assert max(sampler.probabilities) > 2 * min(sampler.probabilities)
    assert sampler.lr_factor == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(BANDITS))
def test_a_bandit_without_clip_steps_along_the_gradient_on_average(name: str) -> None:
    """Loss g . w over four arms: the mean write over many steps, divided by -lr, is g."""

    class Linear4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(1, 4, bias=False) for _ in range(4)])

        def forward(self) -> torch.Tensor:
            one = torch.ones(1, 1)
            return sum(((i + 1.0) * part(one)).sum() for i, part in enumerate(self.parts))  # type: ignore[return-value]

    model, directions, steps = Linear4(), 8, 300
    sampler = BANDITS[name](**({"alpha": 0.02} if name == "adalezo" else {}))
    lr = 2.0**-10
    optimizer = zo_dist.ZeroOrder(
        model, lr=lr, eps=0.5, sampler=sampler, directions=directions, self_check=False, perturb="shard"
    )
    assert len(optimizer.arms) == 4
    writes = []
    with remembered_noise():
        for _ in range(steps):
            before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            optimizer.step(lambda: model())
            after = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            writes.append((before - after) / lr)
    gradient = torch.arange(1.0, 5.0).repeat_interleave(4).double()
    error = torch.stack(writes).mean(0) - gradient
    deviation = torch.stack(writes).std(0) / math.sqrt(steps)
    # 16 elements at 4.5 deviations each: an unbiased estimate fails once in 9000; the deviation is
    # a tenth of the gradient or less, so a factor of 0.7 (clip = 4 with many arms) would show.
    assert bool((error.abs() < 4.5 * deviation + 1e-3).all())
    assert float((deviation / gradient).max()) < 0.3


def test_uniform_draws_without_replacement_and_every_arm_alike() -> None:
    sampler, steps = Uniform(sparsity=0.6), 4000
    sampler.bind([1] * 5, QuickUniforms(0))
    counts = [0] * 5
    for step in range(steps):
        arms = sampler.draw(step, 0).arms
        assert len(arms) == 2
        for arm in arms:
            counts[arm] += 1
    for count in counts:
        assert abs(count / steps - 0.4) < 5 * math.sqrt(0.4 * 0.6 / steps)


@pytest.mark.parametrize(
    ("num_arms", "sparsity", "kept"), [(1, 0.9, 1), (10, 0.75, 2), (4, 0.0, 4), (8, 0.75, 2)]
)
def test_uniform_keeps_at_least_one_arm(num_arms: int, sparsity: float, kept: int) -> None:
    sampler = Uniform(sparsity)
    sampler.bind([1] * num_arms, Noise())
    assert len(sampler.draw(0, 0).arms) == kept


def test_adalezo_scores_follow_the_published_rule() -> None:
    sampler = AdaLeZO(ratio=0.5, tau=0.6, gamma=0.1, alpha=0.1)
    sampler.bind([1] * 4, Noise())
    assert sampler.probabilities == pytest.approx([0.25] * 4)
    sampler.observe([unit(0, 2), unit(2)], [-3.0, 5.0])
    q = [0.3, 0.0, 0.9 * 0.3 + 0.5, 0.0]
    assert sampler.q == pytest.approx(q)
    exps = [math.exp(x / max(q) / 0.6) for x in q]
    assert sampler.probabilities == pytest.approx([0.9 * e / sum(exps) + 0.025 for e in exps])


def test_adalezo_is_bit_for_bit_what_it_was_as_published() -> None:
    """The rule of paper and code written out in the same order of operations, over 300 steps."""
    arms, count, numbers = 34, 6, random.Random(0)
    sampler = AdaLeZO()
    sampler.bind([1] * arms, Noise("rademacher", 3))
    q, p = [0.0] * arms, [0.9 * 1.0 / arms + 0.1 / arms] * arms
    for step in range(300):
        draws = [sampler.draw(step, direction) for direction in range(2)]
        for direction, draw in enumerate(draws):
            drawn: list[int] = []
            for left in sampler.noise.uniforms("zo_dist.sampler", step, direction, count):
                arm = 0
                while arm < arms - 1 and left >= p[arm]:
                    left -= p[arm]
                    arm += 1
                drawn.append(arm)
            weights = [drawn.count(arm) * min(1.0 / (count * p[arm]), 4.0) for arm in sorted(set(drawn))]
            assert draw == Draw(tuple(sorted(set(drawn))), tuple(weights), (1.0,) * len(weights))
        slopes = [numbers.gauss(0.0, 3.0) for _ in draws]
        sampler.observe(draws, slopes)
        for draw, slope in zip(draws, slopes, strict=True):
            for arm in draw.arms:
                q[arm] = (1.0 - 0.1) * q[arm] + 0.1 * abs(slope)
        scores = [x / max(q) for x in q]
        exps = [math.exp((x - max(scores)) / 0.6) for x in scores]
        p = [(1.0 - 0.1) * e / math.fsum(exps) + 0.1 / arms for e in exps]
        assert sampler.probabilities == p
    assert sampler.state_dict() == {"q": q}


def test_corrected_averages_do_not_favour_arms_drawn_early() -> None:
    """Equal slopes are equal scores, however often they came; what has not come yet is as the others."""
    for correct in (False, True):
        sampler = AdaLeZO(correct=correct)
        sampler.bind([1] * 4, Noise())
        for arm, times in enumerate((1, 5, 25)):
            for _ in range(times):
                sampler.observe([unit(arm)], [-3.0])
        if correct:
            assert sampler.scores == pytest.approx([3.0] * 4)
            assert sampler.probabilities == pytest.approx([0.25] * 4)
        else:
            assert sampler.probabilities[2] > 2 * sampler.probabilities[0]


# Each of this many slopes; a fit from one direction per step is as good as from sixteen.
SLOPES = {34: 640, 82: 1280}


@pytest.mark.parametrize(("arms", "directions"), [(34, 1), (34, 4), (34, 16), (82, 4), (82, 16)])
def test_a_fit_comes_nearer_to_the_truth_than_scores_and_to_less_variance_than_dense(
    arms: int, directions: int
) -> None:
    """After as many slopes of log-normal arms; means over 3 sets of arms. Variances are exact, over dense."""
    made: dict[str, Callable[[], Bandit]] = {
        "adalezo": lambda: AdaLeZO(clip=math.inf),
        "both": lambda: AdaLeZO(clip=math.inf, weigh="both"),
        "six": lambda: FittedAdaLeZO(draws=6),
        "one": FittedAdaLeZO,
    }
    norms, whole = {}, {}
    for name, make in made.items():
        found = []
        for seed in range(3):
            v, sizes, bandit = log_normal_arms(arms, random.Random(seed)), [10**6] * arms, make()
            bandit.bind(sizes, QuickUniforms(seed))
            learn_from_normals(bandit, v, directions, SLOPES[arms] // directions, random.Random(seed))
            found.append(judged(bandit, v, sizes))
        norms[name], whole[name] = (statistics.mean(one[key] for one in found) for key in ("norms", "whole"))
    assert norms["six"] > norms["adalezo"] + 0.1
    assert norms["one"] > norms["adalezo"] + 0.2
    assert whole["one"] < 0.9
    assert whole["one"] < whole["six"] < 1.0 < whole["adalezo"]
    assert whole["both"] < whole["adalezo"] - 0.05


@pytest.mark.parametrize("draws", [1, 6])
def test_fitted_probabilities_come_to_the_best(draws: int) -> None:
    """Arms of unlike sizes, normal slopes, no forgetting: near to the least variance."""
    numbers = random.Random(1)
    sizes = [numbers.choice((1, 2, 8)) * 10**6 for _ in range(34)]
    v = [x * size for x, size in zip(log_normal_arms(34, numbers), sizes, strict=True)]
    sampler = FittedAdaLeZO(draws=draws, gamma=0.0, memory=math.inf)
    sampler.bind(sizes, QuickUniforms(2))
    learn_from_normals(sampler, v, 16, 400, random.Random(3))
    best = best_probabilities(v, sizes)
    least, dense = whole_variance(v, best, draws, sizes, "both"), dense_variance(v, sizes)
    reached = whole_variance(v, sampler.probabilities, draws, sizes, "both")
    assert least < (0.85 if draws == 1 else 0.97) * dense
    # 6400 slopes: with one draw, an arm of 1/34 of them is known to 1.4 / sqrt(188) = 10% in v, 5% in p,
    # which costs 0.05^2 of the variance. A slope of six tells a sixth as much of its arms, and p counts
    # for a sixth as much. Of arms that are seldom drawn less is known: in all, not 1%.
    assert reached < least + 0.01 * dense


def test_a_fit_takes_account_of_how_far_each_arm_was_moved() -> None:
    """Slopes whose squares are as expected of equal weights leave p where it was, whatever lengths were."""
    numbers = random.Random(0)
    sizes = [numbers.choice((1, 2, 8)) * 100 for _ in range(12)]
    sampler = FittedAdaLeZO(draws=3, memory=math.inf)
    sampler.bind(sizes, QuickUniforms(0))
    for step in range(300):
        draw = sampler.draw(step, 0)
        lengths = tuple(b * numbers.uniform(0.1, 3.0) for b in draw.lengths)
        square = sum(b * b * sizes[arm] for arm, b in zip(draw.arms, lengths, strict=True))
        sampler.observe([Draw(draw.arms, lengths, lengths)], [math.sqrt(square)])
    share = [size / sum(sizes) for size in sizes]
    # The prior's pull: it is cut at 0, and is worth a slope or so of each arm's.
    assert sampler.probabilities == pytest.approx(share, rel=0.05)


def enumerated_variance(v: list[float], p: list[float], draws: int, sizes: list[int], weigh: str) -> float:
    """By every outcome of draws and signs, each with its chance: no formula but that of the estimate."""
    gradient = [[math.sqrt(x / size)] * size for x, size in zip(v, sizes, strict=True)]
    total = 0.0
    for outcome in itertools.product(range(len(v)), repeat=draws):
        a = [outcome.count(arm) / (draws * p[arm]) for arm in range(len(v))]
        lengths = [math.sqrt(x) if weigh == "both" else float(x > 0) for x in a]
        weights = [math.sqrt(x) if weigh == "both" else x for x in a]
        signs = list(itertools.product((-1.0, 1.0), repeat=sum(sizes)))
        for flat in signs:
            left = iter(flat)
            z = [[next(left) for _ in range(size)] for size in sizes]
            slope = sum(b * x * y for b, zs, gs in zip(lengths, z, gradient, strict=True)
                        for x, y in zip(zs, gs, strict=True))  # fmt: skip
            error = sum((w * slope * x - y) ** 2 for w, zs, gs in zip(weights, z, gradient, strict=True)
                        for x, y in zip(zs, gs, strict=True))  # fmt: skip
            total += math.prod(p[arm] for arm in outcome) / len(signs) * error
    return total


@pytest.mark.parametrize("weigh", ["update", "both"])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_variances_are_those_of_all_estimates(draws: int, weigh: Weigh) -> None:
    v, p, sizes = [4.0, 1.0, 0.25], [0.5, 0.3, 0.2], [1, 3, 2]
    expected = enumerated_variance(v, p, draws, sizes, weigh)
    assert whole_variance(v, p, draws, sizes, weigh) == pytest.approx(expected)


def test_which_p_is_best_depends_on_where_the_weights_are() -> None:
    v, sizes = [4.0, 1.0, 0.25], [1, 30, 5]
    # In both, nothing lies below p like the root of size times squared gradient; one draw is best.
    best = best_probabilities(v, sizes)
    numbers = random.Random(0)
    for draws in (1, 2, 6):
        least = whole_variance(v, best, draws, sizes, "both")
        assert least < dense_variance(v, sizes)
        for _ in range(200):
            other = [x * numbers.lognormvariate(0, 0.3) for x in best]
            other = [x / sum(other) for x in other]
            assert whole_variance(v, other, draws, sizes, "both") >= least
    alone = sum(math.sqrt(size * x) for size, x in zip(sizes, v, strict=True)) ** 2 - sum(v)
    assert whole_variance(v, best, 1, sizes, "both") == pytest.approx(alone)
    # One draw is weighed alike by both forms.
    assert whole_variance(v, best, 1, sizes, "update") == pytest.approx(alone)
    # In the update alone, drawing sensitive arms more often makes the whole worse.
    v = log_normal_arms(34, random.Random(0))
    norms, even, sizes = best_probabilities(v, [1] * 34), [1 / 34] * 34, [10**6] * 34
    assert whole_variance(v, norms, 6, sizes, "update") > 1.5 * whole_variance(v, even, 6, sizes, "update")
    assert whole_variance(v, norms, 6, sizes, "both") < 0.97 * whole_variance(v, even, 6, sizes, "both")
    assert whole_variance(v, even, 6, sizes, "both") == pytest.approx(dense_variance(v, sizes))


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_a_fit_does_not_know_the_unit_of_slopes(factor: float) -> None:
    one, other = FittedAdaLeZO(draws=2), FittedAdaLeZO(draws=2)
    numbers = random.Random(0)
    for sampler in (one, other):
        sampler.bind([1] * 34, Noise())
    for step in range(50):
        draws = [one.draw(step, direction) for direction in range(3)]
        slopes = [numbers.gauss(0.0, 1.0) for _ in draws]
        one.observe(draws, slopes)
        other.observe(draws, [factor * slope for slope in slopes])
        assert one.probabilities == other.probabilities


def test_one_odd_slope_does_not_decide_a_fit_and_slopes_of_0_are_none() -> None:
    v = log_normal_arms(34, random.Random(0))
    sampler = FittedAdaLeZO()
    sampler.bind([1] * 34, QuickUniforms(0))
    sampler.observe([unit(0, 1)], [0.0])
    assert sampler.probabilities == pytest.approx([1 / 34] * 34)
    learn_from_normals(sampler, v, 4, 100, random.Random(0))
    before = sampler.probabilities
    sampler.observe([unit(3, 5)], [1e9])
    # Cut to 3 deviations, which one slope in 370 has.
    assert all(0.5 < after / p < 2.0 for after, p in zip(sampler.probabilities, before, strict=True))


def test_a_fit_begins_with_draws_like_sizes_and_keeps_a_share_of_them() -> None:
    """There, the variance is that of `Dense`; and none is longer than its by more than 1 / sqrt(gamma)."""
    sizes, v = [1, 20, 400, 80], [3.0, 1.0, 0.5, 7.0]
    for draws in (1, 3):
        sampler = FittedAdaLeZO(draws=draws, gamma=0.25)
        sampler.bind(sizes, QuickUniforms(0))
        assert sampler.probabilities == pytest.approx([size / 501 for size in sizes])
        begun = whole_variance(v, sampler.probabilities, draws, sizes, "both")
        assert begun == pytest.approx(dense_variance(v, sizes))
        learn_from_normals(sampler, v, 4, 200, random.Random(0))
        assert whole_variance(v, sampler.probabilities, draws, sizes, "both") < 0.95 * begun
        assert min(p / size for p, size in zip(sampler.probabilities, sizes, strict=True)) > 0.25 / 501
        for step in range(200):
            draw = sampler.draw(step, 0)
            energy = sum(b * b * sizes[arm] for arm, b in zip(draw.arms, draw.lengths, strict=True))
            assert energy <= 501 / 0.25


@pytest.mark.parametrize("name", list(BANDITS))
def test_a_bandits_state_goes_on_where_it_was(name: str) -> None:
    one, two = taught(name), bound(BANDITS[name]())
    assert isinstance(two, Bandit)
    assert [one.draw(s, 0) for s in range(30)] != [two.draw(s, 0) for s in range(30)]
    two.load_state_dict(one.state_dict())
    for step in range(30):
        draws = [one.draw(step, 0)]
        assert [two.draw(step, 0)] == draws
        for sampler in (one, two):
            sampler.observe(draws, [float(step % 3)])
        assert one.probabilities == two.probabilities


@pytest.mark.parametrize("name", list(BANDITS))
@pytest.mark.parametrize("state", [{}, {"q": [1.0]}, {"q": [1.0] * 7, "p": [1.0]}, {"v": [1.0] * 7}])
def test_a_state_of_other_arms_is_refused(name: str, state: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="7 arms"):
        taught(name).load_state_dict(state)


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        *[(lambda v=v: AdaLeZO(ratio=v), "ratio") for v in (0.0, -0.1, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(tau=v), "tau") for v in (0.0, -1.0, NAN)],
        *[(lambda v=v: AdaLeZO(gamma=v), "gamma") for v in (-0.1, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(alpha=v), "alpha") for v in (0.0, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(clip=v), "clip") for v in (0.0, -1.0, NAN)],
        (lambda: AdaLeZO(weigh="probe"), "weigh is 'probe'; use one of update, both"),
        *[(lambda v=v: FittedAdaLeZO(draws=v), "draws is .* at least 1") for v in (0, -1)],
        *[(lambda v=v: FittedAdaLeZO(gamma=v), "gamma") for v in (-0.1, 1.1, NAN)],
        *[(lambda v=v: FittedAdaLeZO(memory=v), "memory is .* at least 1") for v in (0.9, -1.0, NAN)],
        *[(lambda v=v: FittedAdaLeZO(spread=v), "spread is .* above 0") for v in (0.0, -1.0, math.inf, NAN)],
        *[(lambda v=v: Uniform(sparsity=v), "sparsity") for v in (-0.1, 1.0, NAN)],
    ],
)
def test_bad_values_are_refused(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()  # type: ignore[operator]
