"""Noise of low rank: what it is, that no cut shows, and how long its sides last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import KINDS, assert_both_modes_see_the_same_losses
from torch import Tensor, nn

import zo_dist
from zo_dist import thin
from zo_dist.lowrank import LowRankNoise
from zo_dist.noise import Noise
from zo_dist.params import Param, Span
from zo_dist.rounding import Rounding16
from zo_dist.thin import SquareSum, Thin
from zo_dist.update import Terms, Write, update_span

SHAPES = {"w": torch.Size((30, 21)), "conv": torch.Size((12, 5, 3)), "v": torch.Size((30,))}


def noise_of(law: Any = "gaussian", **options: Any) -> LowRankNoise:
    return LowRankNoise(law, 5, False, zo_dist.LowRank(**options), SHAPES)


def z_of(noise: Noise, name: str, step: int = 0, direction: int = 0) -> Tensor:
    shape = SHAPES[name]
    return noise.values(name, step, direction, 0, shape.numel()).view(shape[0], -1)


def spaces_agree(a: Tensor, b: Tensor, rank: int) -> bool:
    """Do the rows of both lie in one space of that many dimensions?"""
    values = torch.linalg.svdvals(torch.cat([a, b]).double())
    return bool(values[rank] < 1e-5 * values[0])


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", ["w", "conv"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_has_the_rank_and_a_vector_what_it_had(law: str, name: str, rank: int) -> None:
    noise = noise_of(law, rank=rank)
    values = torch.linalg.svdvals(z_of(noise, name).double())
    assert values[rank - 1] > 1e-2 * values[0]
    assert values[rank] < 1e-5 * values[0]
    plain = Noise(law, 5)  # type: ignore[arg-type]
    assert torch.equal(noise.values("v", 3, 1, 0, 30), plain.values("v", 3, 1, 0, 30))


def test_all_ranks_of_orthonormal_sides_are_dense_normals() -> None:
    """U and V are square then, and turn normals into normals: fourth moments too, which no lower rank has."""
    draws, shapes = 2000, {"w": torch.Size((3, 4))}
    options = zo_dist.LowRank(rank=4, refresh=1000, orthonormal=True)
    noise = LowRankNoise("gaussian", 5, False, options, shapes)
    # All in one subspace, so that it is no mean over many.
    all_z = torch.stack([noise.values("w", 0, direction, 0, 12) for direction in range(draws)])
    second = all_z.T @ all_z / draws
    # Squares of normals have a variance of 2, products 1; five deviations.
    torch.testing.assert_close(second, torch.eye(12), rtol=0, atol=5 * (2 / draws) ** 0.5)
    # Fourth powers have the mean 3 and the variance 105 - 9.
    fourth = float(all_z.pow(4).mean())
    assert fourth == pytest.approx(3.0, abs=5 * (96 / draws / 12) ** 0.5)


@pytest.mark.parametrize("fixed", [False, True])
def test_elements_have_mean_0_and_variance_1_and_do_not_go_together(fixed: bool) -> None:
    # With fixed sides over runs, else over steps, each with its right side.
    options = zo_dist.LowRank(rank=2, fixed=True) if fixed else zo_dist.LowRank(rank=2, refresh=1)
    draws, shapes = 2000, {"w": torch.Size((3, 4))}
    all_z = torch.stack(
        [LowRankNoise("gaussian", i, False, options, shapes).values("w", i, 0, 0, 12) for i in range(draws)]
    )
    second = all_z.T @ all_z / draws
    # A product of three independent normals has E z^4 = 3**3, so a mean of z_i z_j over the draws has a
    # deviation of at most sqrt(27 / 2000) = 0.12; five of these, and of 144 of them the mean.
    torch.testing.assert_close(second, torch.eye(12), rtol=0, atol=0.6)
    assert float((second - torch.eye(12)).abs().mean()) < 0.12
    assert float(all_z.mean(0).abs().max()) < 5 / draws**0.5


FORMS: dict[str, dict[str, Any]] = {"lozo": {}, "tezo": {"fixed": True}, "subzero": {"orthonormal": True}}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", ["w", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_cut_shows(name: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, numel = noise_of(rank=3, **FORMS[form]), SHAPES[name].numel()
    weight = torch.linspace(-1, 1, numel).to(dtype)
    whole = [torch.empty_like(weight) for _ in range(2)]
    noise.shift(whole, weight, name, 4, 1, 0, [0.5, -0.25])
    total = torch.zeros(numel)
    noise.accumulate(total, name, 4, [(0, 0.3), (2, -1.0)], 0)
    monkeypatch.setattr(thin, "_CHUNK", 64)
    monkeypatch.setattr(thin, "_ROWS", 1)
    for edges in ((0, numel), (0, 1, 2, 50, 51, 100, 177, numel)):
        for a, b in itertools.pairwise(edges):
            outs = [torch.empty(b - a, dtype=dtype) for _ in range(2)]
            noise.shift(outs, weight[a:b], name, 4, 1, a, [0.5, -0.25])
            for out, expected in zip(outs, whole, strict=True):
                assert torch.equal(out, expected[a:b])
            part = torch.zeros(b - a)
            noise.accumulate(part, name, 4, [(0, 0.3), (2, -1.0)], a)
            assert torch.equal(part, total[a:b])


@pytest.mark.parametrize("form", list(FORMS))
def test_rows_that_are_looked_up_are_those_of_the_whole(form: str) -> None:
    noise, table = noise_of(rank=2, **FORMS[form]), torch.linspace(-1, 1, 630).view(30, 21)
    whole = torch.empty(630)
    noise.shift([whole], table.reshape(-1), "w", 2, 3, 0, [0.125])
    rows = torch.tensor([7, 0, 29, 7])
    assert torch.equal(noise.shift_rows(table, rows, "w", 2, 3, 0.125), whole.view(30, 21)[rows])


def test_the_right_side_lasts_and_the_left_does_not() -> None:
    noise = noise_of(rank=2, refresh=3)
    steps = [z_of(noise, "w", step) for step in range(4)]
    assert spaces_agree(steps[0], steps[2], 2)
    assert not spaces_agree(steps[2], steps[3], 2)
    assert not spaces_agree(steps[0].T, steps[2].T, 2)
    # Directions of a step share the right side, and nothing else.
    other = z_of(noise, "w", 0, direction=1)
    assert spaces_agree(steps[0], other, 2)
    assert not torch.equal(steps[0], other)
    # Matrices share nothing, and neither do seeds.
    assert not torch.equal(z_of(noise, "conv")[:12, :15], steps[0][:12, :15])


def test_fixed_sides_last_for_the_run() -> None:
    noise = noise_of(rank=2, fixed=True)
    first, later = z_of(noise, "w", 0), z_of(noise, "w", 1000)
    assert spaces_agree(first, later, 2)
    assert spaces_agree(first.T, later.T, 2)
    assert not torch.equal(first, later)


@pytest.mark.parametrize("rank", [1, 4, 25])
@pytest.mark.parametrize("name", ["w", "conv"])
def test_orthonormal_sides_are_those_of_a_qr(name: str, rank: int) -> None:
    """Of what is drawn for them; the core between them is drawn too. 25: more than columns, or than rows."""
    noise, plain = noise_of(rank=rank, orthonormal=True), Noise("gaussian", 5)
    rows, columns = SHAPES[name][0], SHAPES[name][1:].numel()
    step, direction, sides = 1007, 2, []
    for side, length in (("left", rows), ("right", columns)):
        width = min(rank, length)
        drawn = plain.values(f"{name}\0{side}", step // 1000, 0, 0, length * width).view(length, width)
        q, r = torch.linalg.qr(drawn.double())
        sides.append(q * r.diagonal().sign())
    (u, v), shape = sides, (sides[0].shape[1], sides[1].shape[1])
    core = plain.values(f"{name}\0core", step, direction, 0, shape[0] * shape[1]).view(shape).double()
    expected = u @ core @ v.T * (rows * columns / (shape[0] * shape[1])) ** 0.5
    # Some roundings of float32, of sums of up to 25 numbers of a size of 1 to 3, times the condition of a
    # square matrix of normals, some tens.
    z = z_of(noise, name, step, direction)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-4 if rank == 25 else 1e-5)


def test_orthonormal_sides_last_and_are_refreshed() -> None:
    noise = noise_of(rank=2, refresh=3, orthonormal=True)
    steps = [z_of(noise, "w", step) for step in range(4)]
    other = z_of(noise, "w", 0, direction=1)
    for mine in (steps[2], other):
        assert spaces_agree(steps[0], mine, 2)
        assert spaces_agree(steps[0].T, mine.T, 2)
        assert not torch.equal(steps[0], mine)
    assert not spaces_agree(steps[2], steps[3], 2)
    assert not spaces_agree(steps[2].T, steps[3].T, 2)
    # What is kept of a refresh is no part of what z is: asked in any order, it is the same.
    assert torch.equal(z_of(noise, "w", 0), steps[0])


def test_orthonormal_directions_keep_the_size_and_have_the_mean_of_a_gradient() -> None:
    """E |z|^2 is the number of elements, and E <g, z> z = g over refreshes; a subspace sees its part of g."""
    draws, shapes = 2000, {"w": torch.Size((3, 4))}
    options = zo_dist.LowRank(rank=2, refresh=1, orthonormal=True)
    noise = LowRankNoise("gaussian", 1, True, options, shapes)
    all_z = torch.stack([noise.values("w", step, 0, 0, 12) for step in range(draws)]).double()
    # |z|^2 is 12 / 4 of a sum of 4 squares: of a mean of 12 and a variance of 9 * 8.
    sizes = all_z.square().sum(1)
    assert abs(float(sizes.mean()) - 12) < 5 * (72 / draws) ** 0.5
    gradient = torch.linspace(-1, 1, 12, dtype=torch.float64)
    taken = (all_z @ gradient).unsqueeze(1) * all_z
    error, deviation = (taken.mean(0) - gradient).abs(), taken.std(0) / draws**0.5
    assert bool((error < 5 * deviation).all())
    assert float(deviation.max()) < 0.2
    # Within one subspace of 2 x 2 of the 3 x 4 dimensions, 12 / 4 times the part of the gradient in it.
    noise = LowRankNoise("gaussian", 1, True, zo_dist.LowRank(rank=2, orthonormal=True), shapes)
    within = torch.stack([noise.values("w", step, 0, 0, 12) for step in range(1000)]).double()
    taken = (within @ gradient).unsqueeze(1) * within
    q, _ = torch.linalg.qr(within[:4].T)
    error, deviation = (taken.mean(0) - 3 * q @ (q.T @ gradient)).abs(), taken.std(0) / 1000**0.5
    assert bool((error < 5 * deviation + 1e-6).all())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"refresh": 0}, "refresh is 0"),
        ({"fixed": True, "refresh": 50}, "refresh is 50"),
        ({"fixed": True, "orthonormal": True}, "fixed is true and so is orthonormal"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        zo_dist.LowRank(**options)


def test_orthonormal_sides_of_signs_are_refused() -> None:
    with pytest.raises(ValueError, match="set noise to gaussian"):
        zo_dist.ZeroOrder(nn.Linear(2, 2), structure=zo_dist.LowRank(orthonormal=True))


@pytest.mark.parametrize("inner", [1, 2, 24, 1000])
def test_a_thin_product_is_exact_in_any_order(inner: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    sizes = 10.0 ** torch.arange(-20, 20, 4)
    left = torch.randn(10, inner, generator=generator) * sizes.unsqueeze(1)
    right = torch.randn(inner, 7, generator=generator)
    left[3] = 0.0
    expected = thin.product(left, right)
    order = torch.randperm(inner, generator=generator)
    assert torch.equal(thin.product(left[:, order], right[order]), expected)
    assert torch.equal(thin.product(left[4:5], right[:, 2:3]), expected[4:5, 2:3])
    # Each number is off by 2**-bits / 2 of the largest of its row or column, and so is each of the products.
    bits = {1: 26, 2: 26, 24: 24, 1000: 21}[inner]
    largest = left.abs().amax(1, keepdim=True).double() * right.abs().amax(0, keepdim=True)
    error = (expected - left.double() @ right.double()).abs()
    assert bool((error <= 2 * inner * 2.0**-bits * largest + 1e-12 * largest).all())


def test_a_write_of_many_directions_is_that_of_their_sum() -> None:
    """One product in place of one per direction: up to roundings, the sum of what each would add."""
    for form in FORMS.values():
        noise, terms = noise_of(rank=3, **form), [(d, 0.5 - 0.2 * d) for d in range(6)]
        total = torch.zeros(630)
        noise.accumulate(total, "w", 4, terms, 0)
        apart = sum(noise.values("w", 4, d, 0, 630).double() * scale for d, scale in terms)
        # 6 terms of a size of some 3, each with a few roundings to 24 bits.
        torch.testing.assert_close(total.double(), apart, rtol=0, atol=6 * 3 * 4 * 2.0**-24)


# LOZO-M: momentum in the left side.


def trained(steps: int, **options: Any) -> tuple[zo_dist.ZeroOrder, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(9, 7)
    optimizer = zo_dist.ZeroOrder(model, lr=2.0**-6, noise="gaussian", self_check=False, **options)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.step_batch({"x": x}, lambda m, batch: m(batch["x"]).square().sum(1))
    return optimizer, model


@pytest.mark.parametrize("form", list(FORMS))
def test_while_sides_last_factored_momentum_is_momentum(form: str) -> None:
    structure = zo_dist.LowRank(rank=2, **FORMS[form])
    moved = []
    for factored in (False, True):
        rule = zo_dist.Momentum(0.5, weight_decay=0.01, factored=factored)
        optimizer, model = trained(8, structure=structure, rule=rule, directions=2)
        moved.append(model)
    # The same losses but for roundings: of some 10 they are off by 1e-6, slopes by that over 2e-3, and a
    # weight in each of 8 steps by lr |z| / (1 - beta) of it, with a |z| of up to 5.
    torch.testing.assert_close(moved[0].weight, moved[1].weight, rtol=0, atol=1e-3)
    torch.testing.assert_close(moved[0].bias, moved[1].bias, rtol=0, atol=1e-3)
    _, start = trained(0)
    assert float((moved[0].weight - start.weight).detach().abs().max()) > 0.1
    # 2 numbers for each of 7 rows, or of fixed sides 2 in all, and one for each bias.
    assert {name: len(t) for name, t in optimizer.beside["factored_momentum"].items()} == {
        "weight": 2 if form == "tezo" else 14,
        "bias": 7,
    }


def test_a_new_right_side_takes_over_the_nearest_momentum() -> None:
    """With orthonormal sides the least-squares one, with LOZO's the paper's N V_old^T V_new / n."""
    left = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    for form in ("subzero", "lozo"):
        noise = noise_of(rank=3, refresh=10, **FORMS[form])
        cpu, terms = torch.device("cpu"), [(0, 1.0)]
        old, new = (noise.sides("w", step, terms, cpu)[1].double() for step in (9, 10))
        carried = left.flatten().clone()
        noise.carry("w", carried, 5, 9)
        assert torch.equal(carried, left.flatten())
        noise.carry("w", carried, -1, 10)
        assert torch.equal(carried, left.flatten())
        noise.carry("w", carried, 9, 10)
        before = left.double() @ old
        nearest = torch.linalg.lstsq(new.T, before.T).solution.T
        expected = nearest if form == "subzero" else before @ new.T / 21
        torch.testing.assert_close(carried.view(30, 3).double(), expected, rtol=0, atol=1e-5)
        # Rows are carried by themselves: ranks that share one agree.
        part = left[4:6].flatten().clone()
        noise.carry("w", part, 9, 10)
        assert torch.equal(part, carried.view(30, 3)[4:6].flatten())
        # And nearest it is, of LOZO's roughly: the product of the new side with itself is 21 times 1, off by
        # some sqrt(21).
        off = (before - carried.view(30, 3).double() @ new).norm() / (before - nearest @ new).norm()
        assert float(off) < (1.0 + 1e-6 if form == "subzero" else 1.5)


# TeZO-Adam: both moments of the numbers that weigh fixed products.


def moves_of_adam(rank: int, terms: list[list[tuple[int, float]]], **options: Any) -> list[Tensor]:
    """What is written to a matrix of zeros in each step, with lr 1."""
    noise, shape = noise_of(rank=rank, fixed=True), SHAPES["w"]
    rule, rounding = zo_dist.Adam(0.8, 0.95, **options), Rounding16("nearest", noise)
    moves = []
    span = Span("w", torch.zeros(shape.numel()), 0)
    rule.begin([noise.factor_span(span) if rule.factored else span])
    param = Param("w", nn.Parameter(torch.zeros(shape)), shape, ())
    for step, of_step in enumerate(terms):
        span.flat.zero_()
        update_span(span, param, Terms(of_step, step + 1, step - 1), Write(rule, rounding, noise, step, 1.0))
        moves.append(-span.flat.clone())
    return moves


def test_of_one_product_the_moves_are_those_of_adam() -> None:
    """Which has no products with each other to leave out."""
    terms = [[(0, 0.5), (1, -2.0)], [(0, 1.0)], [(1, -3.0)], [(0, 0.25), (2, 1.0)]]
    pairs = zip(*(moves_of_adam(1, terms, factored=on) for on in (True, False)), strict=True)
    for ours, theirs in pairs:
        # Quotients of at most 1 / (1 - .8), but for a few roundings and eps.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert float(ours.abs().max()) > 0.1


def test_moments_of_adam_are_as_the_products_say() -> None:
    """`m / (sqrt(v) + eps)`, m and v made of r numbers each, in float64."""
    rank, eps = 3, 1e-3
    terms = [[(0, 0.5), (1, -2.0)], [(0, 1.0)], [(1, -3.0)]]
    noise, cpu = noise_of(rank=rank, fixed=True), torch.device("cpu")
    left, right = (side.double() for side in noise.sides_of("w", 0, torch.ones(rank)))
    first, second = torch.zeros(2, rank, dtype=torch.float64)
    for step, (of_step, move) in enumerate(
        zip(terms, moves_of_adam(rank, terms, factored=True, eps=eps), strict=True)
    ):
        new = noise.factor("w", step, of_step, cpu).double()
        first, second = 0.8 * first + 0.2 * new, 0.95 * second + 0.05 * new**2
        m = (left * first / (1 - 0.8 ** (step + 1))) @ right
        v = (left**2 * second / (1 - 0.95 ** (step + 1))) @ right**2
        expected = (m / (v.sqrt() + eps)).flatten()
        torch.testing.assert_close(move.double(), expected, rtol=1e-4, atol=1e-4)


def test_no_element_moves_far_for_want_of_a_second_moment() -> None:
    """|sum of a_k| <= sqrt(rank sum of a_k^2), whatever the sizes of the sides' numbers, and with no eps."""
    rank = 2
    noise = LowRankNoise(
        "gaussian", 5, False, zo_dist.LowRank(rank=rank, fixed=True), {"w": torch.Size((600, 500))}
    )
    left, right = noise.sides_of("w", 0, torch.ones(rank))
    # Squares of 1e-8 of the others in their row or column: of these a cut, as products have, leaves nothing.
    left[::2, 0] *= 1e-4
    right[1, ::2] *= 1e-4
    adam = zo_dist.Adam(eps=0.0)
    for (_, m), (_, v) in zip(
        Thin(left, right).pieces(0, 300_000), SquareSum(left, right).pieces(0, 300_000), strict=True
    ):
        # The first moment is cut: it may be off by 2**-25 of the largest, beside numbers of 1e-6 of that.
        assert float(adam.quotient(m, v).abs().max()) < 2**0.5 * (1 + 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": {"factored": True}}, "give structure"),
        ({"rule": {"factored": True}, "structure": zo_dist.LowRank()}, "set fixed of structure"),
    ],
)
def test_factored_adam_needs_fixed_sides(options: dict[str, Any], message: str) -> None:
    rule = zo_dist.Adam(**options.pop("rule"))
    with pytest.raises(ValueError, match=f"factored is true.*{message}"):
        zo_dist.ZeroOrder(nn.Linear(2, 2), rule=rule, **options)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"second": "momentum"}])
def test_factored_adam_is_adam_alone(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="factored is true, but amsgrad is"):
        zo_dist.Adam(factored=True, **options)


def test_factored_momentum_of_noise_of_full_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factored is true.*give structure"):
        zo_dist.ZeroOrder(nn.Linear(2, 2), rule=zo_dist.Momentum(factored=True))


def test_a_span_within_rows_keeps_the_rows_it_touches() -> None:
    noise = noise_of(rank=2)
    # Elements 20 ... 64 of rows of 21 are in rows 0 to 3.
    span = noise.factor_span(Span("w", torch.empty(45), 20))
    assert (span.offset, len(span.flat)) == (0, 8)
    span = noise.factor_span(Span("w", torch.empty(42), 21))
    assert (span.offset, len(span.flat)) == (2, 4)
    vector = Span("v", torch.empty(5), 3)
    assert noise.factor_span(vector) is vector


def test_a_step_moves_a_matrix_within_the_rank() -> None:
    model = nn.Linear(9, 7, bias=False)
    before = model.weight.detach().clone()
    optimizer = zo_dist.ZeroOrder(
        model, lr=0.1, structure=zo_dist.LowRank(rank=2), noise="gaussian", self_check=False
    )
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        optimizer.step_batch({"x": x}, lambda m, batch: m(batch["x"]).square().sum(1))
    # Ten steps with one right side: the change has rank 2, in the space of its columns.
    values = torch.linalg.svdvals((model.weight.detach() - before).double())
    assert values[1] > 1e-3 * values[0]
    assert values[2] < 1e-4 * values[0]


@pytest.mark.parametrize("name", ["lozo", "tezo", "subzero"])
@pytest.mark.parametrize("sampler", ["dense", "adalezo", "adalezo_both"])
@pytest.mark.parametrize("kind", KINDS)
def test_thin_products_have_the_losses_of_shifted_weights(kind: str, sampler: str, name: str) -> None:
    assert_both_modes_see_the_same_losses(kind, noise=name, sampler=sampler)


def test_a_stacked_forward_shifts_no_weight_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    optimizer = zo_dist.ZeroOrder(
        model, structure=zo_dist.LowRank(rank=2), noise="gaussian", directions=2, self_check=False
    )
    shifted: list[str] = []
    shift = optimizer.noise.shift

    def watched(outs: Any, weight: Tensor, name: str, *arguments: Any) -> None:
        shifted.append(name)
        shift(outs, weight, name, *arguments)

    rows = {"x": torch.randn(4, 9, generator=torch.Generator().manual_seed(0))}
    optimizer.prepare(rows, lambda m, batch: m(batch["x"]).square().sum(1))
    optimizer.noise.shift = watched  # type: ignore[method-assign]
    optimizer.step_batch(rows, lambda m, batch: m(batch["x"]).square().sum(1))
    assert set(shifted) == {"1.weight", "1.bias"}
    # Step by step, one probe at a time, copies are shifted.
    optimizer.step(lambda: model(rows["x"]).square().sum())
    assert "0.weight" in shifted
