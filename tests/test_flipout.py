"""Noise of flipped signs: what it is, that no cut shows, and that products stand for shifted weights."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import table
import torch
from models import KINDS, assert_both_modes_see_the_same_losses
from torch import Tensor, nn

import zo_dist
from zo_dist.flipout import FlipoutNoise, summable
from zo_dist.noise import Noise

SHAPES = {"w": torch.Size((30, 21)), "conv": torch.Size((12, 5, 3)), "v": torch.Size((30,))}


def noise_of(law: Any) -> FlipoutNoise:
    return FlipoutNoise(law, 5, False, SHAPES)


def z_of(noise: Noise, name: str, step: int = 0, direction: int = 0) -> Tensor:
    shape = SHAPES[name]
    return noise.values(name, step, direction, 0, shape.numel()).view(shape[0], -1)


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("name", ["w", "conv"])
def test_directions_of_a_step_differ_by_signs_of_rows_and_columns(law: str, name: str) -> None:
    noise = noise_of(law)
    first = z_of(noise, name, 2)
    seen = {tuple(first.sign().flatten().tolist())}
    # 31, 32 and 64: where one draw of signs ends and the next begins.
    for direction in (1, 2, 31, 32, 64):
        z = z_of(noise, name, 2, direction)
        assert torch.equal(z.abs(), first.abs())
        flips = z.sign() * first.sign()
        # An outer product of signs: each row is the first one or its opposite.
        assert torch.equal(flips, flips[:, :1] * flips[0, 0] * flips[:1])
        assert abs(float(flips.mean())) < 0.7
        seen.add(tuple(z.sign().flatten().tolist()))
    assert len(seen) == 6
    other = z_of(noise, name, 3)
    flips = other.sign() * first.sign()
    assert not torch.equal(flips, flips[:, :1] * flips[0, 0] * flips[:1])
    assert torch.equal(other.abs(), first.abs()) == (law == "rademacher")


@pytest.mark.parametrize("law", table.LAWS)
def test_a_vector_has_what_it_had(law: Any) -> None:
    assert torch.equal(noise_of(law).values("v", 3, 1, 0, 30), Noise(law, 5).values("v", 3, 1, 0, 30))


@pytest.mark.parametrize("law", table.LAWS)
def test_elements_have_mean_0_and_variance_1_and_do_not_go_together(law: Any) -> None:
    draws, shapes = 200, {"w": torch.Size((3, 4))}
    noise = FlipoutNoise(law, 5, False, shapes)
    # Two directions of each step: 24 numbers, in one of them and between them.
    both = torch.stack(
        [torch.cat([noise.values("w", step, d, 0, 12) for d in (0, 1)]) for step in range(draws)]
    )
    # A mean of products has a deviation of at most sqrt(E z^4 / draws), E z^4 being 1 or 3; 5 of these.
    limit = 5 * math.sqrt((1 if law == "rademacher" else 3) / draws)
    second = both.T @ both / draws
    assert float((second - torch.eye(24)).abs().max()) < limit
    assert float(both.mean(0).abs().max()) < limit


@pytest.mark.parametrize("name", ["w", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("law", table.LAWS)
def test_no_cut_shows(name: str, dtype: torch.dtype, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, numel = noise_of(law), SHAPES[name].numel()
    weight = torch.linspace(-1, 1, numel).to(dtype)
    # Of very different sizes, so that sums in float32 would show their order.
    terms = [(d, 0.1 * 3.7 ** (d % 9)) for d in range(40)]
    whole = [torch.empty_like(weight) for _ in range(2)]
    noise.shift(whole, weight, name, 4, 1, 0, [0.5, -0.25])
    total = torch.zeros(numel)
    noise.accumulate(total, name, 4, terms, 0)
    for chunk in (64, 1 << 20):
        monkeypatch.setattr("zo_dist.kernels.HELD", chunk)
        for edges in ((0, numel), (0, 1, 2, 50, 51, 100, 177, numel)):
            for a, b in itertools.pairwise(edges):
                outs = [torch.empty(b - a, dtype=dtype) for _ in range(2)]
                noise.shift(outs, weight[a:b], name, 4, 1, a, [0.5, -0.25])
                for out, expected in zip(outs, whole, strict=True):
                    assert torch.equal(out, expected[a:b])
                part = torch.zeros(b - a)
                noise.accumulate(part, name, 4, terms, a)
                assert torch.equal(part, total[a:b])


def test_directions_are_added_up_exactly_and_rounded_once() -> None:
    noise = noise_of("gaussian")
    scales = torch.tensor([1.0, 2.0**-20 / 3, -1.0, 1e-30, 5.0**9, -(5.0**9)]).tolist()
    total = torch.zeros(630)
    noise.accumulate(total, "w", 1, list(enumerate(scales)), 0)
    all_z = [noise.values("w", 1, d, 0, 630) for d in range(6)]
    for i in (0, 1, 100, 629):
        exact = sum(Fraction(scale) * int(z[i].sign()) for scale, z in zip(scales, all_z, strict=True))
        # 1e-30 is below what is kept of sums of this size; elsewhere numbers are exact.
        summed = torch.tensor(float(exact)) * all_z[0][i].abs()
        torch.testing.assert_close(total[i], summed, rtol=1e-6, atol=1e-9)
    # The order in which they come is nowhere to be seen.
    backwards = torch.zeros(630)
    noise.accumulate(backwards, "w", 1, list(enumerate(scales))[::-1], 0)
    assert torch.equal(total, backwards)


def test_what_is_made_exact_keeps_what_float32_has() -> None:
    # Within 2**28 of each other, as 24 bits of each then fit in 52 of the sum.
    scales = torch.tensor([1.0 / 3, -7e-5 / 3, 1e-6, 123.456]).tolist()
    assert summable(scales) == scales
    assert summable([0.0, 0.0]) == [0.0, 0.0]
    assert summable(torch.tensor([1e-40]).tolist()) == torch.tensor([1e-40]).tolist()
    for given in ([1e20, 1e-3, 3.0], [1e30, -1e-30], [0.1] * 64):
        made, some = summable(given), torch.tensor(given).tolist()
        size = math.fsum(map(abs, some))
        assert all(abs(a - b) <= 2.0**-52 * size for a, b in zip(some, made, strict=True))
        # In float64 every partial sum, in any order and with any signs, is a whole number of the grid.
        grid = Fraction(2) ** (math.frexp(size)[1] - 52)
        assert all((Fraction(a) / grid).denominator == 1 for a in made)
        assert sum(abs(Fraction(a)) for a in made) <= grid * 2**53


@pytest.mark.parametrize("law", table.LAWS)
def test_rows_that_are_looked_up_are_those_of_the_whole(law: str) -> None:
    noise, weights = noise_of(law), torch.linspace(-1, 1, 630).view(30, 21)
    whole = torch.empty(630)
    noise.shift([whole], weights.reshape(-1), "w", 2, 3, 0, [0.125])
    rows = torch.tensor([7, 0, 29, 7])
    assert torch.equal(noise.shift_rows(weights, rows, "w", 2, 3, 0.125), whole.view(30, 21)[rows])


@pytest.mark.parametrize("name", ["flipout", "grzo"])
@pytest.mark.parametrize("sampler", ["dense", "adalezo", "adalezo_both"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_have_the_losses_of_shifted_weights(
    kind: str, sampler: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base comes in parts."""
    monkeypatch.setattr("zo_dist.kernels.PART", 100)
    assert_both_modes_see_the_same_losses(kind, noise=name, sampler=sampler)


def test_a_stacked_forward_draws_one_base_for_all_directions() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    optimizer = zo_dist.ZeroOrder(model, structure=zo_dist.Flipout(), directions=4, self_check=False)
    drawn: list[str] = []
    address = optimizer.noise._schedule

    def watched(name: str) -> Any:
        drawn.append(name.replace("\0", " "))
        return address(name)

    rows = {"x": torch.randn(4, 9, generator=torch.Generator().manual_seed(0))}
    optimizer.prepare(rows, lambda m, batch: m(batch["x"]).square().sum(1))
    optimizer.noise._schedule = watched  # type: ignore[method-assign]
    optimizer.step_batch(rows, lambda m, batch: m(batch["x"]).square().sum(1))
    # One for the forward and one for the write, and no z of the matrix's own elements.
    assert drawn.count("0.weight base") == drawn.count("2.weight base") == 2
    assert "0.weight" not in drawn
    assert drawn.count("1.weight") > 4


def test_what_is_no_structure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"structure is 'flipout'; use LowRank"):
        zo_dist.ZeroOrder(nn.Linear(2, 2), structure="flipout")  # type: ignore[arg-type]
