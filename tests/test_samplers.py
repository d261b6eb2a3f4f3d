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
    drawing_variance,
    learn_from_normals,
    learnt_norms,
    least_drawing_variance,
    log_normal_arms,
    whole_variance,
)
from zo_dist import AdaLeZO, FittedAdaLeZO, Uniform
from zo_dist.noise import Noise
from zo_dist.samplers import Bandit, Draw, Sampler


def bound(sampler: Sampler, num_arms: int = 7, seed: int = 0) -> Sampler:
    sampler.bind(num_arms, Noise("rademacher", seed))
    return sampler


BANDITS: dict[str, Callable[..., Bandit]] = {
    "adalezo": AdaLeZO,
    "adalezo_correct": lambda **options: AdaLeZO(correct=True, **options),
    "fitted_adalezo": FittedAdaLeZO,
}


def taught(name: str = "adalezo", ratio: float = 0.5, clip: float = math.inf, seed: int = 0) -> Bandit:
    """A bandit whose arms have very different scores."""
    sampler = BANDITS[name](ratio=ratio, clip=clip)
    sampler.bind(7, Noise("rademacher", seed))
    # Enough for a fit to be sure that the first arm does nothing.
    for _ in range(1 if name == "adalezo" else 40):
        sampler.observe([Draw((arm,), (1.0,)) for arm in range(7)], [float(arm**2) for arm in range(7)])
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
        assert len(draw.arms) == len(draw.weights) > 0
        assert all(0 <= arm < 7 for arm in draw.arms)
    if name != "dense":
        assert [other.draw(*place) for place in places] != draws
        assert len(set(draws)) > 10


@pytest.mark.parametrize("name", list(table.SAMPLERS))
def test_lr_factor_is_the_mean_weight_over_draws_and_arms(name: str) -> None:
    steps = 3000
    samplers = [bound(table.SAMPLERS[name]())]
    if name in BANDITS:
        samplers += [taught(name, clip=c) for c in (math.inf, 1.5)]
    for sampler in samplers:
        means = [sum(sampler.draw(step, 0).weights) / 7 for step in range(steps)]
        spread = torch.tensor(means).double().std().item()
        assert sum(means) / steps == pytest.approx(
            sampler.lr_factor, abs=5 * spread / math.sqrt(steps) + 1e-9
        )


@pytest.mark.parametrize("name", list(BANDITS))
def test_a_bandit_without_clip_weighs_every_arm_1_on_average(name: str) -> None:
    sampler, steps = taught(name), 6000
    totals = torch.zeros(steps, 7, dtype=torch.float64)
    for step in range(steps):
        draw = sampler.draw(step, 0)
        totals[step, list(draw.arms)] = torch.tensor(draw.weights, dtype=torch.float64)
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
    options = {} if name == "fitted_adalezo" else {"alpha": 0.02}
    sampler = BANDITS[name](ratio=0.5, clip=math.inf, **options)
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
    sampler.bind(5, Noise())
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
    sampler.bind(num_arms, Noise())
    assert len(sampler.draw(0, 0).arms) == kept


def test_adalezo_scores_follow_the_published_rule() -> None:
    sampler = AdaLeZO(ratio=0.5, tau=0.6, gamma=0.1, alpha=0.1)
    sampler.bind(4, Noise())
    assert sampler.probabilities == pytest.approx([0.25] * 4)
    sampler.observe([Draw((0, 2), (1.0, 1.0)), Draw((2,), (1.0,))], [-3.0, 5.0])
    q = [0.3, 0.0, 0.9 * 0.3 + 0.5, 0.0]
    assert sampler.q == pytest.approx(q)
    exps = [math.exp(x / max(q) / 0.6) for x in q]
    assert sampler.probabilities == pytest.approx([0.9 * e / sum(exps) + 0.025 for e in exps])


def test_adalezo_is_bit_for_bit_what_it_was_as_published() -> None:
    """The rule of paper and code written out in the same order of operations, over 300 steps."""
    arms, count, numbers = 34, 6, random.Random(0)
    sampler = AdaLeZO()
    sampler.bind(arms, Noise("rademacher", 3))
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
            assert draw == Draw(tuple(sorted(set(drawn))), tuple(weights))
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
        sampler.bind(4, Noise())
        for arm, times in enumerate((1, 5, 25)):
            for _ in range(times):
                sampler.observe([Draw((arm,), (1.0,))], [-3.0])
        if correct:
            assert sampler.scores == pytest.approx([3.0] * 4)
            assert sampler.probabilities == pytest.approx([0.25] * 4)
        else:
            assert sampler.probabilities[2] > 2 * sampler.probabilities[0]


# Each of this many slopes; a fit from one direction per step is as good as from sixteen.
SLOPES = {34: 640, 82: 1280}


@pytest.mark.parametrize("directions", [1, 4, 16])
@pytest.mark.parametrize("arms", [34, 82])
def test_fitted_norms_are_nearer_to_the_truth_than_scores_and_draws_nearer_to_the_best(
    arms: int, directions: int
) -> None:
    """After as many slopes of log-normal arms; means over 3 sets of arms. Variances are exact."""
    found: dict[str, list[tuple[float, float]]] = {"adalezo": [], "fitted_adalezo": []}
    uniform = []
    for seed, name in itertools.product(range(3), found):
        v = log_normal_arms(arms, random.Random(seed))
        bandit = BANDITS[name](ratio=0.2, clip=math.inf)
        bandit.bind(arms, Noise())
        learn_from_normals(bandit, v, directions, SLOPES[arms] // directions, random.Random(seed))
        least = least_drawing_variance(v, bandit.num_draws)
        correlation = statistics.correlation(learnt_norms(bandit), [math.sqrt(x) for x in v])
        variance = drawing_variance(v, bandit.probabilities, bandit.num_draws) / least
        found[name].append((correlation, variance))
        uniform.append(drawing_variance(v, [1 / arms] * arms, bandit.num_draws) / least)
    scored, fitted = (tuple(map(statistics.mean, zip(*found[name], strict=True))) for name in found)
    # As measured: .33 to .38 against .79 to .83 for 34 arms, .15 to .17 against .57 to .65 for 82.
    assert fitted[0] > scored[0] + 0.2
    assert fitted[1] < scored[1]
    assert fitted[1] < statistics.mean(uniform)


def test_fitted_probabilities_come_to_the_best() -> None:
    """Within what the draws can tell: the deviation that their own normal equations have, and the prior."""
    v = log_normal_arms(34, random.Random(1))
    sampler, numbers = FittedAdaLeZO(clip=math.inf, memory=math.inf), random.Random(2)
    sampler.bind(34, Noise())
    steps, directions = 200, 16
    information = torch.zeros(34, 34, dtype=torch.float64)
    total = drawn = 0.0
    original = sampler.observe

    def observe(draws: list[Draw], coefs: list[float]) -> None:
        nonlocal total, drawn
        for draw in draws:
            members = torch.zeros(34, dtype=torch.float64)
            members[list(draw.arms)] = 1.0
            mean = sum(v[arm] for arm in draw.arms)
            information.add_(torch.outer(members, members) / (2 * mean**2))
            total, drawn = total + mean, drawn + len(draw.arms)
        original(draws, coefs)

    sampler.observe = observe  # type: ignore[method-assign,assignment]
    learn_from_normals(sampler, v, directions, steps, numbers)
    size = total / drawn
    truth = torch.tensor(v, dtype=torch.float64)
    covariance = (information + torch.eye(34, dtype=torch.float64) / size**2).inverse()
    deviation = covariance.diagonal().sqrt()
    bias = (covariance @ (size * (1 - 2 / math.pi) - truth) / size**2).abs()
    # The mean of a normal cut at 0 is above the normal's own by at most this share of a deviation.
    tolerance = 5 * deviation + bias + math.sqrt(2 / math.pi) * deviation
    # The unit of v is the sampler's own, and p does not know it.
    learnt, roots = torch.tensor(sampler.v, dtype=torch.float64).sqrt(), truth.sqrt()
    learnt = learnt * roots.sum() / learnt.sum()
    # |a - b| <= |a^2 - b^2| / b for roots a, b.
    assert bool(((learnt - roots).abs() <= tolerance / roots).all())
    best = 0.9 * roots / roots.sum() + 0.1 / 34
    error = (torch.tensor(sampler.probabilities, dtype=torch.float64) - best).abs()
    assert bool((error <= 0.9 * tolerance / roots / roots.sum() + 1e-12).all())
    # That tolerance says something of the arms that count.
    large = truth > truth.median()
    assert float((tolerance / truth)[large].median()) < 1.5
    least = least_drawing_variance(v, sampler.num_draws)
    assert drawing_variance(v, sampler.probabilities, sampler.num_draws) < 1.1 * least
    assert drawing_variance(v, [1 / 34] * 34, sampler.num_draws) > 1.25 * least


def test_variances_are_those_of_estimates_made() -> None:
    """The formulas above, against weights n / (K p) and signs as drawn; and where sqrt(v) leads them."""
    v, p, draws, samples = [4.0, 1.0, 0.25], [0.5, 0.3, 0.2], 2, 40_000
    generator = torch.Generator().manual_seed(0)
    picks = torch.multinomial(torch.tensor(p), samples * draws, True, generator=generator)
    counts = nn.functional.one_hot(picks.view(samples, draws), 3).sum(1).double()
    weights = counts / (draws * torch.tensor(p, dtype=torch.float64))
    gradients = torch.tensor(v, dtype=torch.float64).sqrt()
    drawing = ((weights - 1) * gradients).square().sum(1)
    # Arms of 2 weights, the gradient on both alike.
    z = torch.randint(0, 2, (samples, 3, 2), generator=generator).double() * 2 - 1
    gradient = (gradients / math.sqrt(2))[None, :, None].expand_as(z)
    slopes = (z * gradient * (counts > 0)[:, :, None]).sum((1, 2))
    whole = (slopes[:, None, None] * weights[:, :, None] * z - gradient).square().sum((1, 2))
    for measured, theory in (
        (drawing, drawing_variance(v, p, draws)), (whole, whole_variance(v, p, draws, [2.0] * 3)),
    ):  # fmt: skip
        assert abs(float(measured.mean()) - theory) < 5 * float(measured.std()) / math.sqrt(samples)
    # What is gained in drawing is lost in the whole: a sensitive arm is noise to the others.
    v = log_normal_arms(34, random.Random(0))
    roots = [math.sqrt(x) for x in v]
    best, even = [root / sum(roots) for root in roots], [1 / 34] * 34
    assert drawing_variance(v, best, 6) < 0.8 * drawing_variance(v, even, 6)
    assert whole_variance(v, best, 6, [1.0] * 34) > 1.5 * whole_variance(v, even, 6, [1.0] * 34)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_a_fit_does_not_know_the_unit_of_slopes(factor: float) -> None:
    one, other = FittedAdaLeZO(), FittedAdaLeZO()
    numbers = random.Random(0)
    for sampler in (one, other):
        sampler.bind(34, Noise())
    for step in range(50):
        draws = [one.draw(step, direction) for direction in range(3)]
        slopes = [numbers.gauss(0.0, 1.0) for _ in draws]
        one.observe(draws, slopes)
        other.observe(draws, [factor * slope for slope in slopes])
        assert one.probabilities == other.probabilities


def test_one_odd_slope_does_not_decide_a_fit_and_slopes_of_0_are_none() -> None:
    v = log_normal_arms(34, random.Random(0))
    sampler = FittedAdaLeZO()
    sampler.bind(34, Noise())
    sampler.observe([Draw((0, 1), (1.0, 1.0))], [0.0])
    assert sampler.probabilities == pytest.approx([1 / 34] * 34)
    learn_from_normals(sampler, v, 4, 100, random.Random(0))
    before = sampler.probabilities
    sampler.observe([Draw((3, 5), (1.0, 1.0))], [1e9])
    # Cut to 3 deviations, which one slope in 370 has.
    assert all(0.5 < after / p < 2.0 for after, p in zip(sampler.probabilities, before, strict=True))


def test_cost_lowers_the_draws_of_early_arms() -> None:
    sampler = FittedAdaLeZO(gamma=0.0, prefix=0.75)
    sampler.bind(5, Noise())
    wanted = [1 / math.sqrt(1 - 0.75 * place / 4) for place in range(5)]
    assert sampler.probabilities == pytest.approx([w / sum(wanted) for w in wanted])
    assert sampler.probabilities[4] == pytest.approx(2 * sampler.probabilities[0])


@pytest.mark.parametrize("name", list(BANDITS))
def test_a_bandits_state_goes_on_where_it_was(name: str) -> None:
    one, two = taught(name), bound(BANDITS[name](ratio=0.5, clip=math.inf))
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
        *[(lambda v=v: FittedAdaLeZO(ratio=v), "ratio") for v in (0.0, 1.1, NAN)],
        *[(lambda v=v: FittedAdaLeZO(gamma=v), "gamma") for v in (-0.1, 1.1, NAN)],
        *[(lambda v=v: FittedAdaLeZO(clip=v), "clip") for v in (0.0, NAN)],
        *[(lambda v=v: FittedAdaLeZO(memory=v), "memory is .* at least 1") for v in (0.9, -1.0, NAN)],
        *[(lambda v=v: FittedAdaLeZO(spread=v), "spread is .* above 0") for v in (0.0, -1.0, math.inf, NAN)],
        *[(lambda v=v: FittedAdaLeZO(prefix=v), "prefix is .* lie in") for v in (-0.1, 1.0, NAN)],
        *[(lambda v=v: Uniform(sparsity=v), "sparsity") for v in (-0.1, 1.0, NAN)],
    ],
)
def test_bad_values_are_refused(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()  # type: ignore[operator]
