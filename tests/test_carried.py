"""Directions around the one before: what they are, that what is tested is moved, and what is kept of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import Injected
from models import build, loss_of, rows_for, step
from torch import Tensor, nn
from workers import digest, whole_weights

import zo_dist
from zo_dist.carried import Carried
from zo_dist.config import load_config
from zo_dist.noise import Noise
from zo_dist.params import Span
from zo_dist.parts import Probe, Shifts, looked_up
from zo_dist.probes import Batch
from zo_dist.replay import identity, replay
from zo_dist.snapshot import save_snapshot
from zo_dist.trajectory import TrajectoryError, TrajectoryWriter

EPS, LR, SEED = 2.0**-6, 2.0**-7, 4
ROOT = Path(__file__).parent.parent


def make(model: nn.Module | None = None, **options: Any) -> zo_dist.ZeroOrder:
    shared = {"lr": LR, "eps": EPS, "seed": SEED, "self_check": False, "noise": "zo_adamu"}
    dtype = options.pop("dtype", torch.float32)
    model = build("sequential", dtype) if model is None else model
    return table.optimizer(model, **{**shared, **options})


class Slope(nn.Module):
    """`sum(slope * w)`, the same for each row; it remembers the weights that each forward saw."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = slope
        self.weight = nn.Parameter(torch.zeros_like(slope))
        self.seen: list[Tensor] = []

    def forward(self, row: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return (self.weight * self.slope).sum().expand(len(row))


def slope_loss(model: nn.Module, batch: Batch) -> Tensor:
    losses = model(batch["row"])
    assert isinstance(losses, Tensor)
    return losses


def on_a_slope(slope: Tensor, momentum: zo_dist.PerturbationMomentum, **options: Any) -> zo_dist.ZeroOrder:
    shared: dict[str, Any] = {"lr": 2.0**-3, "eps": 0.25, "noise": "gaussian", "self_check": False}
    return zo_dist.ZeroOrder(Slope(slope), perturbation_momentum=momentum, **{**shared, **options})


# What a direction is


def test_the_schedule_has_three_parts() -> None:
    carried = Carried(zo_dist.PerturbationMomentum(uncertainty=0.5, beta1=0.25, beta2=0.0, begin=4, end=12))
    assert [carried.shares(t) for t in (0, 4)] == [(1.0, 1.0, 1.0)] * 2
    assert carried.shares(8) == (0.75, 0.625, 0.5)
    assert [carried.shares(t) for t in (12, 1000)] == [(0.5, 0.25, 0.0)] * 2
    # A quarter of half a cosine, cut to 12 bits.
    assert carried.shares(6)[2] == pytest.approx((1 + math.cos(math.pi / 4)) / 2, abs=2.0**-12)
    never = Carried(zo_dist.PerturbationMomentum(begin=4, end=4, beta2=None))
    assert [never.shares(t) for t in (3, 5)] == [(1.0, 1.0, None), (0.01, 0.13, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_probe_is_shifted_by_the_mix_around_what_is_kept(dtype: torch.dtype) -> None:
    """In a shard, in parts, and where rows are looked up: the same bits, those of the formula."""
    weight = torch.linspace(-1, 1, 630).to(dtype)
    noise, momentum = Noise("gaussian", SEED), table.NOISES["zo_adamu"]["perturbation_momentum"]
    carried = Carried(momentum)
    carried.begin([Span("w", weight, 0)], [], "shard")
    assert not carried.kept["w"].any()
    carried.kept["w"].normal_(generator=torch.Generator().manual_seed(0))
    shifts = Shifts(noise, 7, EPS, steering=carried)
    sides = [Probe(1, sign, frozenset({"w"})) for sign in (1.0, -1.0)]
    # In the middle of its cosine, which is 1/2.
    a, b1 = 0.625, 0.75
    z, other = (noise.values(name, 7, 1, 0, 630) for name in ("w", "w\0around"))
    u = z * math.sqrt(a) * b1 + (other * math.sqrt(1 - a) + carried.kept["w"]) * (1 - b1)
    expected = [(weight.float() + u * (sign * EPS)).to(dtype) for sign in (1.0, -1.0)]
    assert not torch.equal(*expected)
    for start, stop in ((0, 630), (0, 100), (100, 630)):
        outs = [torch.empty(stop - start, dtype=dtype) for _ in sides]
        shifts.copies(outs, weight[start:stop], "w", sides, start)
        assert all(torch.equal(out, whole[start:stop]) for out, whole in zip(outs, expected, strict=True))
    ids = torch.tensor([[7, 0, 29], [7, 14, 15]])
    rows = looked_up(shifts, weight.view(30, 21), "w", sides[1], ids)
    assert torch.equal(rows, expected[1].view(30, 21)[ids])


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("beta2", [None, 0.25])
def test_what_was_tested_is_what_is_moved(mode: str, directions: int, beta2: float | None) -> None:
    """By the weights that forwards saw, to the rounding of weights of about 1 (2**-24) over eps.

    Divided by the root of the mix's squares where that is asked for; and what is kept is their mean, with the
    signs of what they were multiplied by.
    """
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25, -1.0])
    momentum = zo_dist.PerturbationMomentum(uncertainty=0.5, beta1=0.5, beta2=beta2, begin=1, end=6)
    optimizer = on_a_slope(slope, momentum, directions=directions, perturb=mode)
    model = optimizer.engine.module
    assert isinstance(model, Slope)
    for _ in range(9):
        before, step = model.weight.detach().clone(), optimizer.step_count
        around, model.seen = optimizer.perturbation_momentum.kept["weight"].clone(), []
        optimizer.step_batch({"row": torch.arange(directions)}, slope_loss)
        plus, minus = model.seen[::2], model.seen[1::2]
        tested = [(p - m) / (2 * optimizer.eps) for p, m in zip(plus, minus, strict=True)]
        assert len(tested) == directions
        a, b1, b2 = optimizer.perturbation_momentum.shares(step)
        mixes = [
            (z[0] * math.sqrt(a), z[1] * math.sqrt(1 - a) + around)
            for z in (
                [
                    optimizer.noise.values(name, step, d, 0, len(slope))
                    for name in ("weight", "weight\0around")
                ]
                for d in range(directions)
            )
        ]
        for (x, y), u in zip(mixes, tested, strict=True):
            torch.testing.assert_close(u, x * b1 + y * (1 - b1), rtol=0, atol=1e-5)
        coefs = [scale for _, scale in optimizer.record.terms[0]]
        turned = [math.copysign(1.0, c) * u for c, u in zip(coefs, tested, strict=True)]
        torch.testing.assert_close(
            optimizer.perturbation_momentum.kept["weight"], sum(turned) / directions, rtol=0, atol=1e-5
        )
        moved = (before - model.weight.detach()) / optimizer.record.lr
        roots = [1.0 if b2 is None else (x * x * b2 + y * y * (1 - b2) + 1e-8).sqrt() for x, y in mixes]
        expected = sum(c * u / root for c, u, root in zip(coefs, tested, roots, strict=True))
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)


def test_the_mean_of_the_estimate_has_the_gradient_and_what_is_carried() -> None:
    """Undivided `E g u = (b1**2 a + (1 - b1)**2 (1 - a)) gradient + (1 - b1)**2 (c . gradient) c`."""
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0])
    a, b1, around = 0.5, 0.25, torch.tensor([0.5, 1.0, -2.0, 0.25])
    momentum = zo_dist.PerturbationMomentum(uncertainty=a, beta1=b1, beta2=None, begin=0, end=0)
    optimizer = on_a_slope(slope, momentum, lr=1.0, directions=4, directions_per_row=4)
    model, taken = optimizer.engine.module, []
    assert isinstance(model, Slope)
    for _ in range(2000):
        optimizer.perturbation_momentum.kept["weight"].copy_(around)
        optimizer.step_batch({"row": torch.arange(1)}, slope_loss)
        taken.append(-model.weight.detach().double())
        model.weight.data.zero_()
        model.seen.clear()
    samples = torch.stack(taken)
    of_noise, of_carried = b1 * b1 * a + (1 - b1) ** 2 * (1 - a), (1 - b1) ** 2 * float(around @ slope)
    expected = of_noise * slope + of_carried * around
    deviation = samples.std(0) / math.sqrt(len(samples))
    # One that is right fails once in 400,000: 4 numbers within 5 deviations.
    assert bool(((samples.mean(0) - expected).abs() < 5 * deviation).all())
    # What is carried is seen: without it this would not hold.
    assert float(((of_carried * around).abs() / deviation).max()) > 20


def test_directions_settle_at_the_length_that_is_told() -> None:
    """3.1 by the defaults. The mean square of 20,000 normals has a deviation of sqrt(2 / 20000) = 1%."""
    momentum = zo_dist.PerturbationMomentum(begin=0, end=0)
    optimizer = on_a_slope(torch.ones(20_000), momentum, lr=1e-6)
    for _ in range(30):
        optimizer.step_batch({"row": torch.arange(1)}, slope_loss)
    squares = float(optimizer.perturbation_momentum.kept["weight"].square().mean())
    kept = (1 - 0.13) ** 2
    assert squares == pytest.approx((kept * 0.99 + 0.13**2 * 0.01) / (1 - kept), rel=0.05)
    assert squares == pytest.approx(3.1, rel=0.05)


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize(
    ("law", "rule", "dtype"),
    [("gaussian", "sgd", "bfloat16"), ("rademacher", "adam", "float32"), ("gaussian", "momentum", "float16")],
)
@pytest.mark.parametrize("when", ["never begun", "all of it new"])
def test_without_momentum_it_is_mezo_bit_for_bit(
    when: str, mode: str, law: str, rule: str, dtype: str
) -> None:
    least = {"uncertainty": 0.5, "beta1": 0.5, "begin": 99, "end": 99}
    if when == "all of it new":
        least = {"uncertainty": 1.0, "beta1": 1.0, "begin": 0, "end": 0}
    digests, shifted = [], list[Tensor]()
    for momentum in (zo_dist.PerturbationMomentum(**least, beta2=None), None):  # type: ignore[arg-type]
        options: dict[str, Any] = {"noise": law, "rule": rule, "perturb": mode, "directions": 2}
        optimizer = make(dtype=table.dtype_of(dtype), perturbation_momentum=momentum, **options)
        known = Injected(mode, 2)
        step(optimizer, 5, known)
        digests.append(digest(whole_weights(optimizer)))
        weight = torch.linspace(-1, 1, 300).to(table.dtype_of(dtype))
        outs, side = [torch.empty_like(weight)], [Probe(1, 1.0, frozenset({"w"}))]
        optimizer.steering.begin([Span("w", weight, 0)], [], "shard")
        Shifts(optimizer.noise, 3, EPS, steering=optimizer.steering).copies(outs, weight, "w", side)
        shifted.append(outs[0])
    assert torch.equal(*shifted)
    assert not torch.equal(shifted[0], weight)
    start = digest(dict(build("sequential", table.dtype_of(dtype)).named_parameters()))
    assert digests[0] == digests[1] != start


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "sequential"])
def test_both_modes_see_the_same_losses(kind: str) -> None:
    kept: dict[str, Tensor] = {}
    losses = {}
    for mode in table.MODES:
        momentum = zo_dist.PerturbationMomentum(uncertainty=0.5, beta1=0.5, begin=0, end=0)
        options = {"noise": "gaussian", "perturbation_momentum": momentum, "eps": 2.0**-3}
        optimizer = make(build(kind), perturb=mode, **options)
        for name, c in optimizer.perturbation_momentum.kept.items():
            c.copy_(kept.setdefault(name, torch.randn(c.shape)))
        seen: list[Tensor] = []

        def loss(model: nn.Module, batch: Any, seen: list[Tensor] = seen) -> Any:
            out = loss_of(model, batch)
            seen.append((out[0] if isinstance(out, tuple) else out).clone())
            return out

        optimizer.step_batch(rows_for(kind, 4), loss)
        losses[mode] = torch.cat(seen)
    # A few dozen roundings in sequence on a loss of this size, as in test_perturb.py.
    tolerance = 64 * 2.0**-23 * float(losses["shard"].max())
    torch.testing.assert_close(losses["module"], losses["shard"], rtol=0, atol=tolerance)


# Kept and logged


def test_a_skipped_step_leaves_it() -> None:
    optimizer = make()
    step(optimizer, 4)
    before = digest(optimizer.perturbation_momentum.kept)
    step(optimizer, 1, lambda model, batch: loss_of(model, batch) * math.nan)  # type: ignore[operator]
    assert optimizer.skipped == 1
    assert digest(optimizer.perturbation_momentum.kept) == before


def test_directions_that_told_nothing_change_nothing() -> None:
    """Two of three have rows without weight, or all of them equal losses."""
    optimizer = make(directions=3, sampler="dense")
    step(optimizer, 8)
    noise, momentum, number = optimizer.noise, optimizer.perturbation_momentum, optimizer.step_count
    before = {name: c.clone() for name, c in momentum.kept.items()}

    def of_the_first(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = loss_of(model, batch)  # type: ignore[arg-type]
        assert isinstance(losses, Tensor)
        # A row comes with both sides of its direction, and two rows test each.
        return losses, torch.tensor([1.0] * 4 + [0.0] * (len(losses) - 4))

    step(optimizer, 1, of_the_first)
    ((_, scale), *others) = optimizer.record.terms[0]
    assert scale
    assert [other for _, other in others] == [0.0, 0.0]
    for param in optimizer.params:

        def drawing(name: str, numel: int = param.numel) -> Tensor:
            return noise.values(name, number, 0, 0, numel)

        u = momentum.along(drawing, before[param.name], param.name, number)
        assert torch.equal(momentum.kept[param.name], u * math.copysign(1.0, scale))
    after = digest(momentum.kept)
    step(optimizer, 1, lambda model, batch: loss_of(model, batch) * 0.0)  # type: ignore[operator]
    assert optimizer.record.slopes == (0.0, 0.0, 0.0)
    assert digest(momentum.kept) == after


def test_it_is_in_a_snapshot_and_comes_back_from_the_log(tmp_path: Path) -> None:
    options = {"sampler": "adalezo", "rule": "momentum", "directions": 3, "lr": 0.01, "mask": "small"}
    ran = make(**options)
    with TrajectoryWriter(tmp_path / "log", identity(ran)) as log:
        for number in range(12):
            step(ran)
            log.append(ran.record)
            if number == 5:
                snapshot = save_snapshot(ran, tmp_path)
    for start in (None, snapshot):
        again = make(**options)
        assert replay(again, tmp_path / "log", snapshot=start) == 12
        assert digest(whole_weights(again)) == digest(whole_weights(ran))
        assert digest(again.perturbation_momentum.kept) == digest(ran.perturbation_momentum.kept)
    taken = make(**options)
    taken.load_state_dict(ran.state_dict())
    assert digest(taken.perturbation_momentum.kept) == digest(ran.perturbation_momentum.kept)
    with pytest.raises(ValueError, match="another rule, rounding, curvature, perturbation momentum"):
        make(**{**options, "noise": "gaussian"}).load_state_dict(ran.state_dict())
    with pytest.raises(TrajectoryError, match=r"perturbation_momentum is .*-1.* here, but was .*0.25"):
        replay(make(**{**options, "noise": "gaussian"}), tmp_path / "log")


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"curvature": zo_dist.DiagonalCurvature()},
            "a curvature too: each of them says what a direction is",
        ),
        ({"structure": zo_dist.Flipout()}, "structure is Flipout.*Leave out one"),
        ({"anchor": zo_dist.Anchor(every=3)}, "an anchor too.*leave out one"),
        ({"conservative": True}, "conservative is true.*set conservative to false"),
        ({"rule": zo_dist.Momentum(factored=True)}, "Set factored to false"),
        ({"estimator": zo_dist.OneSided()}, "estimator is OneSided.*Use TwoSided"),
    ],
    ids=["curvature", "structure", "anchor", "conservative", "rule", "estimator"],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zo_dist.ZeroOrder(
            build("sequential"), perturbation_momentum=zo_dist.PerturbationMomentum(), **options
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"uncertainty": 1.5}, "uncertainty is 1.5; it must lie in"),
        ({"uncertainty": 0.0}, "uncertainty is 0.0; .*nothing of x is left"),
        ({"beta1": 0.0}, "beta1 is 0.0; .*grow without bound"),
        ({"beta2": math.nan}, "beta2 is nan; it must lie in .* or be null"),
        ({"beta2": 1.0}, "beta2 is 1.0; .*near 0 for some"),
        ({"begin": 5, "end": 4}, "begin is 5 and end 4; it must be 0 <= begin <= end"),
        ({"begin": -1}, "begin is -1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zo_dist.PerturbationMomentum(**options)


def test_a_config_names_it() -> None:
    path = ROOT / "configs" / "zo_adamu_opt13b_sst2.yaml"
    momentum = load_config(path).optimizer.perturbation_momentum
    assert momentum == zo_dist.PerturbationMomentum()
    with pytest.raises(ValueError, match="conservative is true"):
        load_config(path, ["optimizer.conservative=true", "model.dtype=float32"])
    with pytest.raises(ValueError, match="beta1 is 2"):
        load_config(path, ["optimizer.perturbation_momentum.beta1=2.0"])
