"""Noise of low rank: what it is, that no cut shows, and how long its sides last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import KINDS, losses_by_mode
from torch import Tensor, nn

import zo_dist
from zo_dist.lowrank import LowRankNoise
from zo_dist.noise import Noise

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


@pytest.mark.parametrize("fixed", [False, True])
def test_elements_have_mean_0_and_variance_1_and_do_not_go_together(fixed: bool) -> None:
    # With fixed sides over runs, else over steps, each with its right side.
    options = zo_dist.LowRank(rank=2, fixed=True) if fixed else zo_dist.LowRank(rank=2, refresh=1)
    draws, shapes = 400, {"w": torch.Size((3, 4))}
    all_z = torch.stack(
        [LowRankNoise("gaussian", i, False, options, shapes).values("w", i, 0, 0, 12) for i in range(draws)]
    )
    second = all_z.T @ all_z / draws
    # A product of three independent normals has E z^4 = 3**3, so a mean of z_i z_j over the draws has a
    # deviation of at most sqrt(27 / 400) = 0.26; five of these, and of 144 of them the mean.
    torch.testing.assert_close(second, torch.eye(12), rtol=0, atol=1.3)
    assert float((second - torch.eye(12)).abs().mean()) < 0.26
    assert float(all_z.mean(0).abs().max()) < 5 / draws**0.5


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["w", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_cut_shows(name: str, fixed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, numel = noise_of(rank=3, fixed=fixed), SHAPES[name].numel()
    weight = torch.linspace(-1, 1, numel).to(dtype)
    whole = [torch.empty_like(weight) for _ in range(2)]
    noise.shift(whole, weight, name, 4, 1, 0, [0.5, -0.25])
    total = torch.zeros(numel)
    noise.accumulate(total, name, 4, [(0, 0.3), (2, -1.0)], 0)
    monkeypatch.setattr("zo_dist.lowrank._CHUNK", 64)
    for edges in ((0, numel), (0, 1, 2, 50, 51, 100, 177, numel)):
        for a, b in itertools.pairwise(edges):
            outs = [torch.empty(b - a, dtype=dtype) for _ in range(2)]
            noise.shift(outs, weight[a:b], name, 4, 1, a, [0.5, -0.25])
            for out, expected in zip(outs, whole, strict=True):
                assert torch.equal(out, expected[a:b])
            part = torch.zeros(b - a)
            noise.accumulate(part, name, 4, [(0, 0.3), (2, -1.0)], a)
            assert torch.equal(part, total[a:b])


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_are_looked_up_are_those_of_the_whole(fixed: bool) -> None:
    noise, table = noise_of(rank=2, fixed=fixed), torch.linspace(-1, 1, 630).view(30, 21)
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


@pytest.mark.parametrize("options", [{"rank": 0}, {"refresh": 0}, {"fixed": True, "refresh": 50}])
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"is 0|is 50"):
        zo_dist.LowRank(**options)


def test_a_step_moves_a_matrix_within_the_rank() -> None:
    model = nn.Linear(9, 7, bias=False)
    before = model.weight.detach().clone()
    optimizer = zo_dist.ZeroOrder(
        model, lr=0.1, low_rank=zo_dist.LowRank(rank=2), noise="gaussian", self_check=False
    )
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        optimizer.step_batch({"x": x}, lambda m, batch: m(batch["x"]).square().sum(1))
    # Ten steps with one right side: the change has rank 2, in the space of its columns.
    values = torch.linalg.svdvals((model.weight.detach() - before).double())
    assert values[1] > 1e-3 * values[0]
    assert values[2] < 1e-4 * values[0]


@pytest.mark.parametrize("name", ["lozo", "tezo"])
@pytest.mark.parametrize("sampler", ["dense", "adalezo", "adalezo_both"])
@pytest.mark.parametrize("kind", KINDS)
def test_thin_products_have_the_losses_of_shifted_weights(kind: str, sampler: str, name: str) -> None:
    """Stacked, where linear layers are not shifted, against shards that are."""
    losses = losses_by_mode(kind, noise=name, sampler=sampler, directions=2, eps=2.0**-5)
    assert len(set(losses["module"].tolist())) == 8
    # A few dozen roundings in sequence on a loss of this size, as in test_perturb.py.
    tolerance = 64 * 2.0**-23 * float(losses["shard"].max())
    torch.testing.assert_close(losses["module"], losses["shard"], rtol=0, atol=tolerance)


def test_a_stacked_forward_shifts_no_weight_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    optimizer = zo_dist.ZeroOrder(
        model, low_rank=zo_dist.LowRank(rank=2), noise="gaussian", directions=2, self_check=False
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
