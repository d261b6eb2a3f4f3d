"""The estimate itself, measured: its mean against autograd's gradient, its variance against theory.

On a polynomial whose derivatives of any order are known, from the weights that a step leaves: with SGD
and lr 1 they are those before it less the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import table
import torch
from torch import Tensor, nn

import zo_dist
from zo_dist.params import Span
from zo_dist.probes import Batch
from zo_dist.samplers import Bandit, Sampler


class Part(nn.Module):
    """A layer: adds what its weights contribute to the loss, and can remember which weights it saw."""

    def __init__(self, arm: int, size: int, cubic: float, columns: int) -> None:
        super().__init__()
        numbers = torch.arange(1.0, size + 1)
        # Multiples of 1/16, below 2: with eps a power of two, shifts by +-eps are exact.
        weight = (numbers * (5 + 4 * arm) % 17 - 8) / 16
        self.weight = nn.Parameter(weight.view(-1, columns) if columns else weight)
        self.curvature = 0.25 * numbers
        self.linear = (numbers + arm) % 3 / 4 + 0.25
        self.cubic, self.zero = cubic, torch.zeros(())
        # Each forward's row numbers and weights, once this is a list.
        self.seen: list[tuple[tuple[int, ...], Tensor]] | None = None

    def forward(self, h: Tensor) -> Tensor:
        w = self.weight.flatten()
        if self.seen is not None:
            self.seen.append((tuple(h[:, 0].int().tolist()), w.detach().clone()))
        rest = torch.dot(w * w, self.curvature / 2 + self.cubic * w)
        return h + torch.stack([self.zero, torch.dot(self.linear, w), rest])


class Polynomial(nn.Module):
    """`line**2 / 2 + rest`: every weight meets every other in the Hessian; all rows are equal.

    One arm per part, whose weights are a vector, or a matrix of so many `columns`. Without `cubic` the
    two-sided slope is the gradient's, whatever eps is.
    """

    def __init__(self, arms: int, size: int, cubic: float = 0.0, columns: int = 0) -> None:
        super().__init__()
        self.each = [Part(arm, size, cubic, columns) for arm in range(arms)]
        self.parts = nn.ModuleList(self.each)

    def forward(self, row: Tensor) -> Tensor:
        zeros = torch.zeros_like(row, dtype=torch.float32)
        h = torch.stack([row.float(), zeros, zeros], dim=1)
        for part in self.each:
            h = part(h)
        return h[:, 1] ** 2 / 2 + h[:, 2]


def row_loss(model: nn.Module, batch: Batch) -> Tensor:
    losses = model(batch["row"])
    assert isinstance(losses, Tensor)
    return losses


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def derivatives(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Gradient `[d]` and Hessian `[d, d]`, by autograd."""
    params = list(model.parameters())
    first = torch.autograd.grad(model(torch.zeros(1)).sum(), params, create_graph=True)
    each = torch.cat([g.flatten() for g in first])
    second = [torch.autograd.grad(g, params, retain_graph=True) for g in each]
    return flat(first), torch.stack([flat(row) for row in second])


def optimizer_of(model: nn.Module, **options: Any) -> zo_dist.ZeroOrder:
    return zo_dist.ZeroOrder(model, **{"lr": 1.0, "eps": 0.25, "self_check": False, **options})


def estimates_of(optimizer: zo_dist.ZeroOrder, steps: int, each: Callable[[], None] = lambda: None) -> Tensor:
    """float64 `[steps, d]`: what each of so many steps took off the same weights. `each` runs before it."""
    params = [p.param for p in optimizer.params]
    start = [p.detach().clone() for p in params]
    rows = {"row": torch.arange(optimizer.directions)}
    taken = []
    for _ in range(steps):
        each()
        optimizer.step_batch(rows, row_loss)
        taken.append(flat(start) - flat(params))
        for param, value in zip(params, start, strict=True):
            param.data.copy_(value)
    return torch.stack(taken)


def noise_of(optimizer: zo_dist.ZeroOrder, steps: int) -> Tensor:
    """float64 `[steps, directions, d]`: z of every weight."""
    return torch.stack(
        [
            torch.stack(
                [
                    flat(optimizer.noise.values(p.name, step, d, 0, p.numel) for p in optimizer.params)
                    for d in range(optimizer.directions)
                ]
            )
            for step in range(steps)
        ]
    )


def expect_mean(samples: Tensor, expected: Tensor | float, where: str = "") -> Tensor:
    """Each column's mean is `expected`, within 5 of its deviations; returns these.

    A right one fails once in 1.7 million. 1e-5: the rounding of losses of some 10 in float32, some
    1e-6, over a distance of eps = 1/4, times a z of up to 5 and a weight of the update of up to 4.
    """
    deviation = samples.std(0) / math.sqrt(len(samples))
    error = (samples - expected).mean(0).abs()
    assert bool((error < 5 * deviation + 1e-5).all()), f"{where}: {error} against {deviation}"
    return deviation


# Of 8 arms: 2, and 1 in a direction of all others. Dense is with the variance below.
SAMPLED: dict[str, Callable[[], Sampler]] = {
    "uniform": lambda: zo_dist.Uniform(sparsity=0.75),
    "adalezo_unclipped": lambda: zo_dist.AdaLeZO(clip=math.inf),
    "adalezo": zo_dist.AdaLeZO,
    "adalezo_both": lambda: zo_dist.AdaLeZO(clip=math.inf, weigh="both"),
    "fitted_adalezo": zo_dist.FittedAdaLeZO,
}


@pytest.mark.parametrize(
    ("name", "law", "estimator", "mode"),
    table.all_pairs(tuple(SAMPLED), table.LAWS, tuple(table.ESTIMATORS), table.MODES),
)
def test_the_mean_estimate_is_the_gradient_times_what_the_sampler_says(
    name: str, law: str, estimator: str, mode: str
) -> None:
    estimator = table.estimator_for(name, estimator)
    model = Polynomial(arms=8, size=2)
    gradient, _ = derivatives(model)
    # An arm that is shifted alone, as far as all else, sees more of the curvature from one side.
    eps = 1 / 16 if name in table.WEIGH_BOTH else 1 / 4
    optimizer = optimizer_of(
        model, sampler=SAMPLED[name](), **table.estimating(estimator, smoothing=0.0), noise=law, perturb=mode,
        directions=8, eps=eps,
    )  # fmt: skip
    sampler = optimizer.sampler
    assert len(optimizer.arms) == 8
    shares: list[Tensor] = []

    def before() -> None:
        """The share of the gradient that each arm is to get, from what the bandit knows by then."""
        if isinstance(sampler, Bandit):
            mine = [min(1.0, sampler.clip * sampler.num_draws * p) for p in sampler.probabilities]
        else:
            mine = [0.25] * 8
        assert sampler.lr_factor == pytest.approx(sum(mine) / 8)
        shares.append(torch.tensor(mine, dtype=torch.float64).repeat_interleave(2))

    estimates = estimates_of(optimizer, 160, before)
    expected = torch.stack(shares) * gradient
    expect_mean(estimates - expected, 0.0, "weights")
    # The same along the gradient, where a wrong factor shows most. Wrong ones are: for uniform 4, for
    # an AdaLeZO that clips where it should not, or does not where it should, about 1/2 and 2.
    along = (estimates @ gradient) / (expected @ gradient)
    assert float(expect_mean(along, 1.0, "along the gradient")) < 0.5 / 5
    if name == "adalezo":
        assert 0.3 < float(torch.stack(shares).mean()) < 0.6


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize(("directions", "steps"), [(1, 2000), (2, 1200), (8, 500)])
def test_the_variance_is_that_of_theory_and_falls_with_directions(
    directions: int, steps: int, law: str
) -> None:
    """(d - 1) |g|^2 / D for signs, (d + 1) |g|^2 / D for normals; d = 4, so that these are 3 and 5."""
    model = Polynomial(arms=1, size=4)
    gradient, _ = derivatives(model)
    estimates = estimates_of(optimizer_of(model, noise=law, directions=directions), steps)
    expect_mean(estimates, gradient, "mean")
    theory = (3 if law == "rademacher" else 5) * float(gradient.square().sum()) / directions
    relative = (estimates - gradient).square().sum(1) / theory
    # 3 for 5, or 5 for 3, would be off by 0.4 or more.
    assert float(expect_mean(relative, 1.0, "variance")) < 0.3 / 5


def outcomes_of(sampler: Sampler, arms: int) -> list[tuple[float, list[float], list[float]]]:
    """Of one direction, by what may be drawn: the chance, and of each arm the length b and the weight c."""
    if isinstance(sampler, zo_dist.Uniform):
        number = round(arms * (1 - sampler.sparsity))
        drawn = [[float(arm in some) for arm in range(arms)] for some in combinations(range(arms), number)]
        return [(1 / len(drawn), some, some) for some in drawn]
    assert isinstance(sampler, Bandit)
    p, found = sampler.probabilities, []
    for some in product(range(arms), repeat=sampler.num_draws):
        counts = [some.count(arm) for arm in range(arms)]
        weights = [n * min(1 / (sampler.num_draws * q), sampler.clip) for n, q in zip(counts, p, strict=True)]
        lengths = [float(n > 0) for n in counts]
        if sampler.weigh == "both":
            weights = lengths = [math.sqrt(weight) for weight in weights]
        found.append((math.prod(p[arm] for arm in some), lengths, weights))
    return found


@pytest.mark.parametrize(
    ("law", "directions", "steps"), [("rademacher", 1, 1500), ("rademacher", 4, 600), ("gaussian", 4, 800)]
)
@pytest.mark.parametrize(
    "name", ["uniform", "adalezo_unclipped", "adalezo", "adalezo_both", "fitted_adalezo"]
)
def test_the_variance_of_drawn_arms_is_that_of_theory_and_falls_with_directions(
    name: str, directions: int, steps: int, law: str
) -> None:
    """By every outcome of a draw; the mean of `|c g z|^2` over the noise is `c_l^2 b_k^2 d_l v_k`, summed.

    For normals an arm has twice the square of its own gradient besides, as `E z^4` is 3.
    """
    arms, size = 4, 2
    make = {
        "uniform": lambda: zo_dist.Uniform(sparsity=0.5),
        "adalezo_unclipped": lambda: zo_dist.AdaLeZO(ratio=0.5, clip=math.inf),
        "adalezo": lambda: zo_dist.AdaLeZO(ratio=0.5, clip=1.5),
        "adalezo_both": lambda: zo_dist.AdaLeZO(ratio=0.5, clip=math.inf, weigh="both"),
        "fitted_adalezo": lambda: zo_dist.FittedAdaLeZO(draws=2),
    }
    model = Polynomial(arms=arms, size=size)
    gradient, _ = derivatives(model)
    squares = gradient.square().view(arms, size).sum(1).tolist()
    optimizer = optimizer_of(model, sampler=make[name](), noise=law, directions=directions)
    means, theory = [], []

    def before() -> None:
        """Of the step to come, by what the bandit knows by then: it learns from step to step."""
        square, mean = 0.0, [0.0] * arms
        for chance, lengths, weights in outcomes_of(optimizer.sampler, arms):
            of_arms = [b * b * v for b, v in zip(lengths, squares, strict=True)]
            own = 0 if law == "rademacher" else 2
            square += chance * sum(
                c * c * (size * sum(of_arms) + own * mine) for c, mine in zip(weights, of_arms, strict=True)
            )
            mean = [m + chance * c * b for m, c, b in zip(mean, weights, lengths, strict=True)]
        means.append(torch.tensor(mean).double().repeat_interleave(size) * gradient)
        theory.append((square - float(means[-1].square().sum())) / directions)

    estimates = estimates_of(optimizer, steps, before)
    relative = (estimates - torch.stack(means)).square().sum(1) / torch.tensor(theory).double()
    # Weights or lengths left out, or directions that share their noise, would be off by half or more.
    assert float(expect_mean(relative, 1.0, "variance")) < 0.4 / 5


@pytest.mark.parametrize(("directions", "per_row"), [(4, 1), (4, 4), (8, 2)])
def test_the_variance_of_rows_is_divided_by_pairs_of_row_and_direction(directions: int, per_row: int) -> None:
    """`((d - 1) m |G|^2 + (d + k - 1) s^2) / (R k)` for signs; s^2: how far rows' gradients scatter."""
    size, num_rows, steps = 6, 8, 1500
    model = nn.Linear(size, 1, bias=False)
    optimizer = optimizer_of(model, directions=directions, directions_per_row=per_row)
    mean, generator = torch.linspace(-1, 1, size), torch.Generator().manual_seed(0)
    # Of a linear loss a row is its own gradient.
    start = model.weight.detach().clone()
    taken = []
    for _ in range(steps):
        rows = mean + torch.randn(num_rows, size, generator=generator)
        optimizer.step_batch({"row": rows}, lambda module, batch: module(batch["row"])[:, 0])
        taken.append(flat([start]) - flat([model.weight]))
        model.weight.data.copy_(start)
    estimates, square = torch.stack(taken), float(mean.double().square().sum())
    expect_mean(estimates, mean.double(), "mean")
    m, scatter = num_rows * per_row / directions, float(size)
    theory = ((size - 1) * m * square + (size + per_row - 1) * scatter) / (num_rows * per_row)
    relative = (estimates - mean.double()).square().sum(1) / theory
    # Rows that do not scatter would leave a half to a quarter of it.
    assert float(expect_mean(relative, 1.0, "variance")) < 0.2 / 5


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize(("directions", "steps"), [(1, 1500), (8, 600)])
def test_flips_of_one_base_cost_normals_some_variance_and_signs_none(
    directions: int, steps: int, law: str
) -> None:
    """Between directions `E g_d g_e z_d.z_e` is `E U^4 |g|^2`, U being the base: 3 for normals, and not 1.

    So 2 (D - 1) / D |g|^2 is added to (d + 1) |g|^2 / D; d = 6.
    """
    model = Polynomial(arms=1, size=6, columns=3)
    gradient, _ = derivatives(model)
    optimizer = optimizer_of(model, noise=law, directions=directions, structure=zo_dist.Flipout())
    estimates = estimates_of(optimizer, steps)
    expect_mean(estimates, gradient, "mean")
    shares = 5 if law == "rademacher" else 7 + 2 * (directions - 1)
    theory = shares * float(gradient.square().sum()) / directions
    relative = (estimates - gradient).square().sum(1) / theory
    # With 8 directions 7 for 21, of normals of their own, would be off by 0.67; 5 for 7, or 7 for 5, by 0.28.
    assert float(expect_mean(relative, 1.0, "variance")) < (0.28 if directions == 1 else 0.6) / 5


@pytest.mark.parametrize("law", table.LAWS)
def test_slopes_are_those_of_autograd(law: str) -> None:
    """Two-sided g.z, one-sided g.z + eps/2 z.Hz, direction by direction; the latter's mean is eps/2 tr H.

    The curvature of three sides is |z.Hz| / 2.
    """
    model = Polynomial(arms=4, size=3)
    gradient, hessian = derivatives(model)
    for name in table.ESTIMATORS:
        optimizer = optimizer_of(model, lr=0.0, **table.estimating(name), noise=law, directions=8)
        slopes, bends = [], []
        for _ in range(100):
            optimizer.step_batch({"row": torch.arange(8)}, row_loss)
            slopes.append(optimizer.record.slopes)
            bends += [bend for bend, _ in optimizer.record.curvatures]
        z = noise_of(optimizer, 100).flatten(0, 1)
        bent = ((z @ hessian) * z).sum(1)
        curved = 0.125 * bent if name == "one_sided" else 0.0
        measured = torch.tensor(slopes, dtype=torch.float64).flatten()
        # Losses are some 30 at most where |z| is large: a few roundings of 2e-6, over 1/4.
        torch.testing.assert_close(measured, z @ gradient + curved, rtol=1e-5, atol=3e-5)
        expect_mean(measured, 0.125 * float(hessian.trace()) if name == "one_sided" else 0.0, name)
        assert len(bends) == (800 if name == "three_sided" else 0)
        if bends:
            # Four of these roundings, over 1/8.
            torch.testing.assert_close(torch.tensor(bends).double(), bent.abs() / 2, rtol=1e-5, atol=6e-5)
    assert float(hessian.trace()) > 1.0


def test_one_side_costs_variance() -> None:
    """d eps^2 / 4 E (z.Hz)^2 more, for signs: E (z.Hz)^2 = (tr H)^2 + 2 (sum of squares off the diagonal)."""
    model = Polynomial(arms=1, size=4)
    gradient, hessian = derivatives(model)
    eps, steps = 1.0, 2000
    optimizer = optimizer_of(model, eps=eps, estimator=zo_dist.OneSided())
    errors = (estimates_of(optimizer, steps) - gradient).square().sum(1)
    off = hessian - hessian.diag().diag()
    square = float(hessian.trace() ** 2 + 2 * off.square().sum())
    two_sided = 3 * float(gradient.square().sum())
    theory = two_sided + 4 * eps**2 / 4 * square
    assert float(expect_mean(errors / theory, 1.0)) < 0.2 / 5
    assert theory > 1.5 * two_sided


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("estimator", list(table.ESTIMATORS))
def test_the_bias_is_of_third_order(estimator: str, law: str) -> None:
    """For c w^3, c eps^2 E z^4: by the same for both estimators, and for normals three times as much."""
    model = Polynomial(arms=1, size=4, cubic=1.0)
    gradient, _ = derivatives(model)
    eps = 1.0
    how = table.estimating(estimator, smoothing=0.0)
    optimizer = optimizer_of(model, eps=eps, **how, noise=law, directions=8)
    bias = eps**2 * (1 if law == "rademacher" else 3)
    deviation = expect_mean(estimates_of(optimizer, 500), gradient + bias)
    # No bias, or that of the other law, would be off by 1 at least for signs, and for normals by 2.
    assert float(deviation.max()) * 5 < (0.5 if law == "rademacher" else 1.5)


PAIRS = table.all_pairs(
    tuple(table.RULES),
    tuple(table.COEFFICIENTS),
    tuple(table.SAMPLERS),
    table.DIRECTIONS,
    table.LAWS,
    table.MODES,
    tuple(table.ESTIMATORS),
)


@pytest.mark.parametrize(("rule", "coefficients", "sampler", "directions", "law", "mode", "estimator"), PAIRS)
def test_what_was_tested_is_what_is_updated(
    rule: str, coefficients: str, sampler: str, directions: int, law: str, mode: str, estimator: str
) -> None:
    """Each layer's direction, by the weights that it saw in its forwards, is what the rule's move is of.

    As far as an arm was shifted in the probe, it goes in the update, unless the sampler weighs that alone.
    With a curvature that is z / sqrt(H), and the move is made with the H that is learnt in between.
    """
    eps, lr = 0.25, 0.0625
    estimator = table.estimator_for(sampler, estimator)
    model = Polynomial(arms=4, size=3)
    optimizer = table.optimizer(
        model, lr=lr, eps=eps, sampler=sampler, estimator=estimator, coefficients=coefficients, rule=rule,
        directions=directions, noise=law, perturb=mode, self_check=False,
    )  # fmt: skip
    again = table.RULES[rule]()
    again.begin([Span(p.name, p.param.detach().view(-1), 0) for p in optimizer.params])
    moved, stayed = 0, 0
    for _ in range(5):
        before = [part.weight.detach().clone() for part in model.each]
        for part in model.each:
            part.seen = []
        draws = [optimizer.sampler.draw(optimizer.step_count, direction) for direction in range(directions)]
        bends = {key: h.clone() for key, h in optimizer.curvature.kept.items()}
        optimizer.step_batch({"row": torch.arange(directions)}, row_loss)
        terms = optimizer.record.terms
        lengths = [dict(zip(draw.arms, draw.lengths, strict=True)) for draw in draws]
        for draw in draws:
            assert draw.lengths == (draw.weights if sampler in table.WEIGH_BOTH else (1.0,) * len(draw.arms))
        for arm, part in enumerate(model.each):
            drawn_by = [direction for direction, _ in terms.get(arm, [])]
            seen, part.seen = part.seen or [], None
            for rows, weight in seen:
                if not set(rows) & set(drawn_by):
                    assert torch.equal(weight, before[arm])
            if not drawn_by:
                assert torch.equal(part.weight, before[arm])
                stayed += 1
                continue
            estimate = torch.zeros(3)
            for direction, scale in terms[arm]:
                # Row d tests direction d, first with its +, then with its other side; a side that shifts
                # nothing may run with others like it.
                first, second, *clean = (weight for rows, weight in seen if direction in rows)
                assert all(torch.equal(weight, before[arm]) for weight in clean)
                z = (first - second) / (eps if estimator == "one_sided" else 2 * eps)
                assert float(z.abs().min()) > 0
                estimate += scale * z / lengths[direction][arm]
            name = optimizer.arms[arm].params[0].name
            if bends:
                estimate *= (bends[name] / optimizer.curvature.kept[name]).sqrt()
            kept = [again.kept[key][name] for key in again.keeps]
            move = again.move(estimate, kept, optimizer.writes[arm])
            # Signs are seen to the bit, where no length makes them others; of a normal 1e-6, the rounding of
            # weights of up to 2 over eps, is lost, times a scale of up to 20 (and momentum, of up to 4 of
            # these in 5 steps) and lr.
            exact = (
                law == "rademacher"
                and not bends
                and all(length == 1.0 for of in lengths for length in of.values())
            )
            atol = 2.0**-22 if exact else 1e-6 * 80 * lr
            torch.testing.assert_close(part.weight.detach(), before[arm] - lr * move, rtol=0, atol=atol)
            # Signs of several directions can add up to nothing.
            moved += bool(move.any())
    assert moved
    assert stayed or sampler == "dense" or directions > 2


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("noise", [name for name, options in table.NOISES.items() if "structure" in options])
def test_the_structured_directions_that_were_tested_are_those_of_the_update(noise: str, mode: str) -> None:
    """As above, of matrices: every direction's z, from the weights that a layer saw of it."""
    eps, lr, directions = 0.25, 0.0625, 5
    model = Polynomial(arms=3, size=6, columns=3)
    optimizer = table.optimizer(
        model, lr=lr, eps=eps, directions=directions, noise=noise, perturb=mode, sampler="uniform",
        self_check=False,
    )  # fmt: skip
    for _ in range(4):
        before = [part.weight.detach().clone() for part in model.each]
        for part in model.each:
            part.seen = []
        optimizer.step_batch({"row": torch.arange(directions)}, row_loss)
        for arm, part in enumerate(model.each):
            seen, part.seen = part.seen or [], None
            estimate = torch.zeros(6, dtype=torch.float64)
            for direction, scale in optimizer.record.terms.get(arm, []):
                plus, minus = (weight for rows, weight in seen if direction in rows)
                estimate += scale * ((plus - minus) / (2 * eps)).double()
            expected = before[arm].double() - lr * estimate.view(2, 3)
            # The tolerance of the test above, with one rounding of weights of up to 2.
            atol = 2.0**-22 if noise in ("flipout", "orthogonal") else 1e-6 * 80 * lr
            torch.testing.assert_close(part.weight.detach().double(), expected, rtol=1e-6, atol=atol)


class Bowl(nn.Module):
    """`|w|**2 / 2`, the same for each row: its gradient is w."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, size + 1) / 8)

    def forward(self, row: Tensor) -> Tensor:
        return (self.weight.square().sum() / 2).expand(len(row))


@pytest.mark.parametrize(
    ("law", "directions", "steps"),
    [
        *(("rademacher", 1, 50), ("rademacher", 2, 600), ("rademacher", 4, 600), ("rademacher", 16, 300)),
        *(("gaussian", 1, 2000), ("gaussian", 2, 1500), ("gaussian", 4, 1000), ("gaussian", 16, 500)),
    ],
)
def test_the_best_learning_rate_is_d_over_d_and_the_weights(law: str, directions: int, steps: int) -> None:
    """In a bowl one step of lr takes off `lr e.w - lr**2 |e|**2 / 2`: most at `E e.w / E |e|**2`.

    That is `D / (D + d - 1)` for signs, and `D / (D + d + 1)` for normals.
    """
    size = 12
    model = Bowl(size)
    weight = flat([model.weight])
    taken = estimates_of(optimizer_of(model, directions=directions, noise=law), steps)
    along, length = taken @ weight, taken.square().sum(1)
    best = directions / (directions + size + (1 if law == "gaussian" else -1))
    # Where the numerator less `best` times the denominator has the mean 0.
    expect_mean((along - best * length).unsqueeze(1), 0.0)
    # And not for another number of directions.
    other = 2 * directions / (2 * directions + size - 1)
    off = along - other * length
    assert abs(float(off.mean())) > 5 * float(off.std()) / steps**0.5


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("name", [*SAMPLED, "sparsity 0"])
def test_samplers_that_draw_all_are_mezo(name: str, law: str) -> None:
    """One arm of all layers for each of them; more arms where none is left out."""

    def after(sampler: Sampler, arms: int) -> Tensor:
        model = Polynomial(arms=arms, size=3, cubic=1.0)
        optimizer = optimizer_of(model, lr=2.0**-6, sampler=sampler, noise=law, directions=3)
        assert len(optimizer.arms) == arms
        for _ in range(20):
            optimizer.step_batch({"row": torch.arange(3)}, row_loss)
        return flat(model.parameters())

    arms = 1 if name in SAMPLED else 4
    sampler = SAMPLED[name]() if name in SAMPLED else zo_dist.Uniform(sparsity=0.0)
    assert torch.equal(after(sampler, arms), after(zo_dist.Dense(), arms))
