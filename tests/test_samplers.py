"""Draws: determinism, weights, unbiasedness, state."""

from __future__ import annotations

import math

import pytest
import table
import torch
from injected import remembered_noise
from torch import nn

import zo_dist
from zo_dist import AdaLeZO, Uniform
from zo_dist.noise import Noise
from zo_dist.samplers import Draw, Sampler


def bound(sampler: Sampler, num_arms: int = 7, seed: int = 0) -> Sampler:
    sampler.bind(num_arms, Noise("rademacher", seed))
    return sampler


def taught(ratio: float = 0.5, clip: float = math.inf, seed: int = 0) -> AdaLeZO:
    """An AdaLeZO whose arms have very different scores."""
    sampler = AdaLeZO(ratio=ratio, clip=clip)
    sampler.bind(7, Noise("rademacher", seed))
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
    if name == "adalezo":
        samplers += [taught(clip=c) for c in (math.inf, 1.5)]
    for sampler in samplers:
        means = [sum(sampler.draw(step, 0).weights) / 7 for step in range(steps)]
        spread = torch.tensor(means).double().std().item()
        assert sum(means) / steps == pytest.approx(
            sampler.lr_factor, abs=5 * spread / math.sqrt(steps) + 1e-9
        )


def test_adalezo_without_clip_weighs_every_arm_1_on_average() -> None:
    sampler, steps = taught(), 6000
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


def test_adalezo_without_clip_steps_along_the_gradient_on_average() -> None:
    """Loss g . w over four arms: the mean write over many steps, divided by -lr, is g."""

    class Linear4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(1, 4, bias=False) for _ in range(4)])

        def forward(self) -> torch.Tensor:
            one = torch.ones(1, 1)
            return sum(((i + 1.0) * part(one)).sum() for i, part in enumerate(self.parts))  # type: ignore[return-value]

    model, directions, steps = Linear4(), 8, 200
    sampler = AdaLeZO(ratio=0.5, clip=math.inf, alpha=0.02)
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


def test_adalezo_state_goes_on_where_it_was() -> None:
    one, two = taught(), bound(AdaLeZO(ratio=0.5, clip=math.inf))
    assert [one.draw(s, 0) for s in range(30)] != [two.draw(s, 0) for s in range(30)]
    two.load_state_dict(one.state_dict())
    assert [one.draw(s, 0) for s in range(30)] == [two.draw(s, 0) for s in range(30)]


@pytest.mark.parametrize("state", [{}, {"q": [1.0]}, {"q": [1.0] * 7, "p": [1.0]}])
def test_a_state_of_other_arms_is_refused(state: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="7 arms"):
        taught().load_state_dict(state)


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        *[(lambda v=v: AdaLeZO(ratio=v), "ratio") for v in (0.0, -0.1, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(tau=v), "tau") for v in (0.0, -1.0, NAN)],
        *[(lambda v=v: AdaLeZO(gamma=v), "gamma") for v in (-0.1, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(alpha=v), "alpha") for v in (0.0, 1.1, NAN)],
        *[(lambda v=v: AdaLeZO(clip=v), "clip") for v in (0.0, -1.0, NAN)],
        *[(lambda v=v: Uniform(sparsity=v), "sparsity") for v in (-0.1, 1.0, NAN)],
    ],
)
def test_bad_values_are_refused(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()  # type: ignore[operator]
