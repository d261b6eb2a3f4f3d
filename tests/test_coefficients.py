"""What becomes of slopes, and of rows that are clipped one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import table
import torch
from injected import Injected
from models import build, cut, loss_of, rows_for
from torch import Tensor, nn
from workers import HAVE_DEEPSPEED, Pool, digest, whole_weights, wrap

import zo_dist
from zo_dist.coefficients import Coefficients

SLOPES = [0.25, -3.0, 0.0, 1.5]


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [
        (zo_dist.Raw(), SLOPES),
        (zo_dist.SignOnly(), [1.0, -1.0, 0.0, 1.0]),
        (zo_dist.Clip(1.0), [0.25, -1.0, 0.0, 1.0]),
        (zo_dist.Clip(math.inf), SLOPES),
        # With nothing of earlier steps, the root of the mean of squares: (.0625 + 9 + 2.25) / 4.
        (zo_dist.RootMeanSquare(0.0), [x / math.sqrt(2.828125) for x in SLOPES]),
        # The mean is -.3125, the variance 11.3125 / 4 - .3125**2.
        (zo_dist.Standardise(), [x / math.sqrt(2.73046875) for x in SLOPES]),
        (zo_dist.Standardise(centre=True), [(x + 0.3125) / math.sqrt(2.73046875) for x in SLOPES]),
    ],
)
def test_coefficients_of_four_slopes(coefficients: Coefficients, expected: list[float]) -> None:
    # The floor of 1e-8 under a root near 1 moves the eighth digit.
    assert coefficients.of(SLOPES) == pytest.approx(expected, rel=2e-8)


@pytest.mark.parametrize("name", list(table.COEFFICIENTS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_no_number_is_never_made_one(name: str, bad: float) -> None:
    """The step is skipped by its slopes; but no form may raise, or call a NaN a number, on the way."""
    coefficients = table.COEFFICIENTS[name]()
    of = coefficients.of([1.0, bad, 2.0])
    assert len(of) == 3
    assert not math.isnan(bad) or math.isnan(of[1])


def test_equal_slopes_have_no_scores() -> None:
    assert zo_dist.Standardise().of([0.0, 0.0]) == [0.0, 0.0]
    assert zo_dist.Standardise(centre=True).of([2.0, 2.0]) == [0.0, 0.0]


def test_slopes_that_differ_by_a_rounding_are_equal() -> None:
    # Accuracies of three rows: 2/3 - 1/3 is not 1 - 2/3 in float64.
    slopes = [(2 / 3 - 1 / 3) / 2e-3, (1 - 2 / 3) / 2e-3]
    assert slopes[0] != slopes[1]
    for centre in (False, True):
        assert zo_dist.Standardise(centre=centre).of(slopes) == [0.0, 0.0]
        # A difference of a thousandth is one.
        assert any(zo_dist.Standardise(centre=centre).of([1.0, 1.001]))


def test_mean_squares_are_of_the_steps_before() -> None:
    coefficients = zo_dist.RootMeanSquare(beta=0.5, floor=1e-30)
    assert coefficients.of([4.0]) == [1.0]
    assert coefficients.of([4.0]) == [1.0]  # asking teaches nothing
    coefficients.observe([4.0])
    # (.5 * .5 * 16 + .5 * 1) / .75
    assert coefficients.of([1.0]) == pytest.approx([1.0 / math.sqrt(6.0)])
    again = zo_dist.RootMeanSquare(beta=0.5, floor=1e-30)
    again.load_state_dict(coefficients.state_dict())
    assert again.of([1.0]) == coefficients.of([1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo_dist.Clip(0.0), "limit is 0.0"),
        (lambda: zo_dist.Clip(math.nan), "limit is nan"),
        (lambda: zo_dist.RootMeanSquare(beta=1.0), "beta is 1.0"),
        (lambda: zo_dist.RootMeanSquare(floor=0.0), "floor is 0.0"),
        (lambda: zo_dist.TwoSided(clip_rows=0.0), "clip_rows is 0.0"),
        (lambda: zo_dist.Raw().load_state_dict({"mean": 1.0}), "keeps no state"),
        (lambda: zo_dist.RootMeanSquare().load_state_dict({"mean": 1.0}), "holds mean and steps"),
        (
            lambda: zo_dist.ZeroOrder(nn.Linear(2, 2), coefficients=zo_dist.Standardise()),
            "directions is 1; Standardise needs at least 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def weights_after(steps: int = 6, **options: Any) -> list[Tensor]:
    model = build("sequential")
    optimizer = table.optimizer(model, lr=0.01, eps=0.01, self_check=False, **options)
    for step in range(steps):
        optimizer.step_batch(rows_for("sequential", 6, seed=step), loss_of)
    return [p.detach() for p in model.parameters()]


def test_arms_are_learnt_from_slopes_and_not_from_coefficients() -> None:
    """FZOO's coefficients have the same size whatever the arms; the bandit would learn nothing from them."""
    optimizer = table.optimizer(
        build("sequential"), sampler="adalezo", coefficients="sign", directions=3, lr=0.0, self_check=False
    )
    optimizer.step_batch(rows_for("sequential", 6), loss_of)
    slopes = optimizer.record.slopes
    expected = [0.0] * len(optimizer.arms)
    for arms, slope in zip(optimizer.record.arms, slopes, strict=True):
        for arm in arms:
            expected[arm] = 0.9 * expected[arm] + 0.1 * abs(slope)
    assert optimizer.sampler.state_dict()["q"] == pytest.approx(expected)
    assert len({abs(slope) for slope in slopes}) == 3


# Rows, one by one


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("estimator", [zo_dist.TwoSided, zo_dist.OneSided])
@torch.no_grad()
def test_a_row_counts_for_no_more_than_its_limit(mode: Any, estimator: Any) -> None:
    """Against each row's own slope, from losses of whole copies of the model."""
    eps, limit, rows = 0.01, 0.75, rows_for("sequential", 8)
    model = build("sequential")
    optimizer = zo_dist.ZeroOrder(
        model, lr=0.0, eps=eps, estimator=estimator(limit), perturb=mode, self_check=False, directions=2
    )
    seen: list[Tensor] = []

    def losses(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        out = loss_of(module, batch)
        seen.append(torch.stack([out, torch.ones_like(out)]) if isinstance(out, Tensor) else torch.stack(out))
        return out

    # In micro-batches, which both forms have to keep apart.
    optimizer.step_batch([{k: v[a:b] for k, v in rows.items()} for a, b in ((0, 3), (3, 8))], losses)
    by_side: dict[tuple[int, int], list[Tensor]] = {(d, s): [] for d in (0, 1) for s in (0, 1)}
    # Of each forward: (direction, side, rows) in the order in which it holds them.
    if mode == "module":
        order = [[(0, 0, 3), (0, 1, 3)], [(0, 0, 1), (0, 1, 1), (1, 0, 4), (1, 1, 4)]]
    else:
        # The first micro-batch has no row of direction 1: a row runs there that does not count.
        order = [[(0, 0, 3)], [(0, 0, 1)], [(0, 1, 3)], [(0, 1, 1)], [], [(1, 0, 4)], [], [(1, 1, 4)]]
    for out, parts in zip(seen, order, strict=True):
        start = 0
        for direction, side, count in parts:
            by_side[direction, side].append(out[:, start : start + count])
            start += count
    for direction, slope in enumerate(optimizer.record.slopes):
        (first, weights), (second, _) = (torch.cat(by_side[direction, s], dim=1).double() for s in (0, 1))
        distance = eps * (2.0 if estimator is zo_dist.TwoSided else 1.0)
        of_rows = (first - second) / weights / distance
        assert bool((of_rows.abs() > limit).any()), "nothing was clipped"
        expected = (of_rows.clamp(-limit, limit) * weights).sum() / weights.sum()
        assert slope == pytest.approx(float(expected), rel=1e-9)


def test_an_endless_limit_leaves_the_bits() -> None:
    plain = weights_after()
    for a, b in zip(plain, weights_after(estimator=zo_dist.TwoSided(math.inf)), strict=True):
        assert torch.equal(a, b)
    different = weights_after(estimator=zo_dist.TwoSided(0.01))
    assert any(not torch.equal(a, b) for a, b in zip(plain, different, strict=True))


def clipped_on_rank(engine: str, estimator: Any, mode: str) -> tuple[str, list[float]]:
    """Whole weights, and the slopes of the last step, from given losses of this rank's rows."""
    import torch.distributed as dist

    # Of rows that differ by up to 4 over 2 eps: most are cut.
    optimizer = table.optimizer(
        wrap(engine, build("sequential")), lr=0.01, eps=0.01, directions=3, perturb=mode,
        estimator=estimator(40.0), sampler="adalezo", self_check=False,
    )  # fmt: skip
    edges = {1: (0, 8), 2: (0, 5, 8), 3: (0, 5, 5, 8)}[dist.get_world_size()]
    mine = cut(rows_for("sequential", 8), *edges[dist.get_rank() : dist.get_rank() + 2])
    name = "two_sided" if estimator is zo_dist.TwoSided else "one_sided"
    losses = Injected(mode, 3, estimator=name)
    for _ in range(20):
        optimizer.step_batch(mine, losses)
    return digest(whole_weights(optimizer)), list(optimizer.record.slopes)


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("estimator", [zo_dist.TwoSided, zo_dist.OneSided])
def test_clipped_rows_leave_the_same_bits_on_every_engine(
    pool: Callable[[int], Pool], estimator: Any, mode: str
) -> None:
    """Also on a rank without rows. The test above holds one process to copies of the model."""
    (expected,) = pool(1).run(clipped_on_rank, "replicated", estimator, mode)
    assert any(0.0 < abs(slope) <= 40.0 for slope in expected[1])
    for engine, ranks in (("fsdp2", 2), ("fsdp2", 3), *((("zero3", 2),) if HAVE_DEEPSPEED else ())):
        assert pool(ranks).run(clipped_on_rank, engine, estimator, mode) == [expected] * ranks


def test_clipped_rows_need_losses_of_rows() -> None:
    model = nn.Linear(2, 2)
    optimizer = zo_dist.ZeroOrder(model, estimator=zo_dist.TwoSided(1.0), self_check=False)
    with pytest.raises(ValueError, match=r"clip_rows is 1\.0"):
        optimizer.step(lambda: model(torch.ones(1, 2)).sum())


# Limits


@pytest.mark.parametrize("directions", [1, 3])
def test_one_sign_is_the_other_for_one_direction_of_rademacher_noise(directions: int) -> None:
    by_slope = weights_after(coefficients="sign", directions=directions)
    by_weight = weights_after(rule="sign", directions=directions)
    same = [torch.equal(a, b) for a, b in zip(by_slope, by_weight, strict=True)]
    assert all(same) if directions == 1 else not any(same)


@pytest.mark.parametrize("mode", table.MODES)
def test_a_direction_whose_rows_weigh_nothing_has_no_share(mode: Any) -> None:
    """As rows without labels: the step is that of the other directions, not skipped."""

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        weights = (batch["row"] != 2).to(torch.float32)
        out = loss_of(model, batch)
        assert isinstance(out, Tensor)
        return out * weights, weights

    optimizer = table.optimizer(build("sequential"), directions=4, perturb=mode, self_check=False, lr=0.1)
    before = [p.param.detach().clone() for p in optimizer.params]
    assert math.isfinite(optimizer.step_batch(rows_for("sequential", 4), loss))
    assert optimizer.skipped == 0
    assert optimizer.record.slopes[2] == 0.0
    assert all(optimizer.record.slopes[i] for i in (0, 1, 3))
    moved = zip(optimizer.params, before, strict=True)
    assert all(not torch.equal(p.param, old) for p, old in moved if p.numel > 1)
    # Where no row weighs anything there is no step.
    none = table.optimizer(build("sequential"), directions=2, perturb=mode, self_check=False)
    none.step_batch(rows_for("sequential", 4), lambda m, b: (0.0 * loss_of(m, b), torch.zeros(len(b["row"]))))
    assert none.skipped == 1
