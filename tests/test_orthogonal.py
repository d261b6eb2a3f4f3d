"""Directions of a step that are orthogonal: what they are, that no cut shows, and what they are for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import zo_dist
from zo_dist.noise import Noise
from zo_dist.orthogonal import OrthogonalNoise

SHAPES = {"w": torch.Size((30, 21)), "v": torch.Size((11,)), "s": torch.Size(()), "e": torch.Size((50, 4))}
NUMEL = sum(shape.numel() for shape in SHAPES.values())


def noise() -> OrthogonalNoise:
    return OrthogonalNoise("rademacher", 5, False, SHAPES)


def all_of(step: int, directions: int) -> Tensor:
    """float64 `[directions, NUMEL]`: z of every weight."""
    made = [
        torch.cat([noise().values(n, step, d, 0, shape.numel()) for n, shape in SHAPES.items()])
        for d in range(directions)
    ]
    return torch.stack(made).double()


@pytest.mark.parametrize("directions", [1, 2, 64, 1024])
def test_elements_go_together_where_their_distance_is_a_multiple_of_the_directions(directions: int) -> None:
    z = all_of(3, directions)
    assert bool((z.abs() == 1).all())
    number = torch.arange(NUMEL)
    apart = (number.unsqueeze(1) - number) % directions
    assert torch.equal((z.T @ z).abs() / directions, (apart == 0).double())
    # And directions do not, over as many elements as there are of these.
    some = z[:, :directions]
    assert directions > NUMEL or torch.equal(some @ some.T, directions * torch.eye(directions).double())


def test_each_direction_is_plain_noise_by_itself() -> None:
    for name, shape in SHAPES.items():
        first, other = (noise().values(name, 7, d, 0, shape.numel()) for d in (0, 5))
        plain = Noise("rademacher", 5).values(name, 7, 0, 0, shape.numel())
        assert torch.equal(first, plain)
        assert shape.numel() < 5 or not torch.equal(other, plain)
    # Over steps, elements have the mean 0 and no correlation: 5 deviations of a mean of 400 signs.
    draws = torch.stack([noise().values("v", step, 3, 0, 11) for step in range(400)]).double()
    second = draws.T @ draws / 400
    assert float((second - torch.eye(11)).abs().max()) < 5 / 20
    assert float(draws.mean(0).abs().max()) < 5 / 20


@pytest.mark.parametrize("name", ["w", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_cut_shows(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    z, numel = noise(), SHAPES[name].numel()
    weight = torch.linspace(-1, 1, numel).to(dtype)
    terms = [(d, 0.1 * 3.7 ** (d % 9)) for d in range(40)]
    whole = [torch.empty_like(weight) for _ in range(2)]
    z.shift(whole, weight, name, 4, 6, 0, [0.5, -0.25])
    values = z.values(name, 4, 6, 0, numel)
    assert torch.equal(whole[0], (weight.float() + 0.5 * values).to(dtype))
    total = torch.zeros(numel)
    z.accumulate(total, name, 4, terms, 0)
    exact = sum(scale * z.values(name, 4, d, 0, numel).double() for d, scale in terms)
    torch.testing.assert_close(total.double(), exact, rtol=2.0**-23, atol=0)  # type: ignore[arg-type]
    edges = (0, 1, 2, 5, 11) if name == "v" else (0, 1, 2, 50, 51, 100, 177, numel)
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr("zo_dist.kernels.HELD", chunk)
        for a, b in [(0, numel), *itertools.pairwise(edges)]:
            outs = [torch.empty(b - a, dtype=dtype) for _ in range(2)]
            z.shift(outs, weight[a:b], name, 4, 6, a, [0.5, -0.25])
            for out, expected in zip(outs, whole, strict=True):
                assert torch.equal(out, expected[a:b])
            part = torch.zeros(b - a)
            z.accumulate(part, name, 4, terms, a)
            assert torch.equal(part, total[a:b])


def test_rows_that_are_looked_up_are_those_of_the_whole() -> None:
    table, rows = torch.linspace(-1, 1, 200).view(50, 4), torch.tensor([3, 3, 0, 49, 17])
    whole = torch.empty(200)
    noise().shift([whole], table.flatten(), "e", 2, 9, 0, [0.25])
    assert torch.equal(noise().shift_rows(table, rows, "e", 2, 9, 0.25), whole.view(50, 4)[rows])


class Slope(nn.Module):
    """A linear loss, the same for each row, of weights in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2, 3))

    def gradient(self) -> Tensor:
        return torch.arange(1.0, 14.0) / 8

    def forward(self, rows: Tensor) -> Tensor:
        flat = torch.cat([self.first, self.second.flatten()])
        return (flat @ self.gradient()).expand(len(rows))


def moved(directions: int, step: int) -> Tensor:
    """What one step takes off, over its learning rate."""
    model = Slope()
    optimizer = zo_dist.ZeroOrder(
        model, lr=0.5, eps=0.25, directions=directions, directions_per_row=directions, estimator=None,
        structure=zo_dist.Orthogonal(), seed=step, self_check=False,
    )  # fmt: skip
    optimizer.step_batch({"rows": torch.zeros(1)}, lambda module, batch: module(batch["rows"]))
    return -torch.cat([p.detach().flatten() for p in model.parameters()]) / 0.5


@pytest.mark.parametrize("directions", [16, 64])
def test_as_many_directions_as_weights_see_the_gradient_itself(directions: int) -> None:
    """Of 13 weights. Losses of at most 2.9 are a few roundings off, over eps = 1/4."""
    torch.testing.assert_close(moved(directions, 0), Slope().gradient(), rtol=0, atol=4 * 2.0**-23 * 3 * 4)


def test_fewer_see_one_other_weight_for_each_number_of_them() -> None:
    """8 directions of 13 weights: numbers 0 to 4 and 8 to 12 go together, with random signs."""
    gradient = Slope().gradient()
    errors = torch.stack([moved(8, step) - gradient for step in range(40)])
    alone = (5, 6, 7)
    for i in range(13):
        other = 0.0 if i in alone else float(gradient[i + 8 if i < 8 else i - 8])
        assert bool(((errors[:, i].abs() - other).abs() < 1e-5).all())
    # 40 signs: that all agree has a chance of 2**-39.
    assert bool((errors[:, 0] > 0).any())
    assert bool((errors[:, 0] < 0).any())


def test_normals_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is 'gaussian'.*use rademacher"):
        zo_dist.ZeroOrder(nn.Linear(2, 2), noise="gaussian", structure=zo_dist.Orthogonal())
