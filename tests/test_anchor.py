"""An anchor: what a step that is compared with it estimates, which weights it sees, and what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for, step
from test_estimate import expect_mean, flat
from tiny_run import write_config
from torch import Tensor, nn
from torch.func import functional_call
from workers import Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.noise import Noise
from zo_dist.replay import identity, replay
from zo_dist.samplers import Sampler
from zo_dist.snapshot import load_snapshot, save_snapshot
from zo_dist.trajectory import TrajectoryError, TrajectoryWriter

EPS, LR, SEED = 2.0**-6, 2.0**-7, 4
ROOT = Path(__file__).parent.parent


def weights_of(optimizer: zo_dist.ZeroOrder) -> dict[str, Tensor]:
    return {p.name: p.param.detach().clone() for p in optimizer.params}


def run(steps: int = 0, **options: Any) -> zo_dist.ZeroOrder:
    settings = {"lr": LR, "eps": EPS, "seed": SEED, "self_check": False, "anchor": "third"}
    dtype = options.pop("dtype", torch.float32)
    optimizer = table.optimizer(build("sequential", dtype), **{**settings, **options})
    step(optimizer, steps)
    return optimizer


# What is estimated


class Layer(nn.Module):
    """Adds `c w.w / 2 + b.w + row's noise * u.w` to each row's loss; a row is its noise and its loss."""

    def __init__(self, arm: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -0.5]) + arm / 4)
        self.c, self.b, self.u = torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])

    def forward(self, row: Tensor) -> Tensor:
        w = self.weight
        same = torch.dot(self.c * w, w) / 2 + torch.dot(self.b, w)
        return torch.stack([row[:, 0], row[:, 1] + same + row[:, 0] * torch.dot(self.u, w)], dim=1)


class Noisy(nn.Module):
    """Quadratic, so that two-sided slopes are those of the gradient; `[d]` vectors are over all layers."""

    def __init__(self, arms: int) -> None:
        super().__init__()
        self.each = [Layer(arm) for arm in range(arms)]
        self.layers = nn.ModuleList(self.each)

    def forward(self, noise: Tensor) -> Tensor:
        row = torch.stack([noise, torch.zeros_like(noise)], dim=1)
        for layer in self.each:
            row = layer(row)
        return row[:, 1]

    def of(self, name: str) -> Tensor:
        return flat(getattr(layer, name) for layer in self.each)

    def move_to(self, weights: Tensor) -> None:
        for layer, weight in zip(self.each, weights.view(-1, 2), strict=True):
            layer.weight.data.copy_(weight)


def noisy_loss(model: nn.Module, batch: Any) -> Tensor:
    losses = model(batch["noise"])
    assert isinstance(losses, Tensor)
    return losses


def estimates_near_anchor(
    arms: int, distance: float, steps: int, each: Callable[[zo_dist.ZeroOrder], None], **options: Any
) -> tuple[Noisy, Tensor, Tensor, Tensor]:
    """The model, what the anchor step took off, how far from it the others begin, and what each took off.

    Each of these has rows of its own, whose noise has variance 1. lr is 1.
    """
    model, generator = Noisy(arms), torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"lr": 1.0, "eps": 0.25, "self_check": False, **options}
    optimizer = zo_dist.ZeroOrder(model, **settings)
    start = model.of("weight")
    if optimizer.anchor.every:
        optimizer.step_batch({"noise": torch.zeros(8)}, noisy_loss)
    of_anchor = start - model.of("weight")
    away = distance * torch.sin(torch.arange(2.0 * arms)).double()
    taken = []
    for _ in range(steps):
        each(optimizer)
        model.move_to(start + away)
        optimizer.step_batch({"noise": torch.randn(optimizer.directions, generator=generator)}, noisy_loss)
        # The weights before are those rounded to float32.
        taken.append((start + away).float().double() - model.of("weight"))
    model.move_to(start)
    return model, of_anchor, away, torch.stack(taken)


SAMPLED: dict[str, Callable[[], Sampler]] = {
    "dense": zo_dist.Dense,
    "uniform": lambda: zo_dist.Uniform(sparsity=0.75),
    "adalezo_unclipped": lambda: zo_dist.AdaLeZO(clip=math.inf),
    "adalezo": zo_dist.AdaLeZO,
}


@pytest.mark.parametrize(
    ("name", "law", "mode", "directions"),
    table.all_pairs(tuple(SAMPLED), table.LAWS, table.MODES, (1, 3)),
)
def test_the_mean_is_the_samplers_share_of_gradients_apart_and_the_anchors_estimate(
    name: str, law: str, mode: str, directions: int
) -> None:
    """A right one fails once in 1.7 million: see `expect_mean`."""
    arms, shares = 8, []

    def before(optimizer: zo_dist.ZeroOrder) -> None:
        sampler = optimizer.sampler
        mine = [sampler.lr_factor] * arms
        if isinstance(sampler, zo_dist.AdaLeZO):
            mine = [min(1.0, sampler.clip * sampler.num_draws * p) for p in sampler.probabilities]
        shares.append(torch.tensor(mine, dtype=torch.float64).repeat_interleave(2))

    anchor = zo_dist.Anchor(every=10_000, directions=2)
    model, of_anchor, away, taken = estimates_near_anchor(
        arms, 1.0, 250, before, sampler=SAMPLED[name](), noise=law, perturb=mode, directions=directions,
        anchor=anchor,
    )  # fmt: skip
    gradient = model.of("c") * away + of_anchor
    expected = torch.stack(shares) * gradient
    expect_mean(taken - expected, 0.0, "weights")
    along = (taken @ gradient) / (expected @ gradient)
    expect_mean(along, 1.0, "along the gradient")
    # The anchor's part alone: a wrong factor of it would be off by 1/3 at least.
    wrong = (
        taken - 1.5 * torch.stack(shares) * of_anchor - torch.stack(shares) * model.of("c") * away
    ) @ of_anchor
    assert abs(float(wrong.mean())) > 5 * float(wrong.std()) / len(wrong) ** 0.5


def test_the_variance_is_of_the_gradients_apart_and_without_the_noise_of_rows() -> None:
    """`(d - 1) |G(w) - G(anchor)|**2` for signs; of a plain step, `(d - 1) |G|**2 + d |a row's noise|**2`."""
    arms, dims = 2, 4
    ratios = []
    for distance in (0.5, 0.125):
        model, _, away, taken = estimates_near_anchor(
            arms, distance, 600, lambda _: None, anchor=zo_dist.Anchor(every=10_000)
        )
        apart = model.of("c") * away
        theory = (dims - 1) * float(apart.square().sum())
        spread = (taken - taken.mean(0)).square().sum(1)
        # From their own mean, which takes off one part in 600.
        assert float(expect_mean(spread / theory, 1.0)) < 0.3 / 5
        ratios.append(theory)
    model, _, away, taken = estimates_near_anchor(arms, 0.125, 600, lambda _: None)
    gradient = model.of("c") * (model.of("weight") + away) + model.of("b")
    plain = (dims - 1) * gradient.square().sum() + dims * model.of("u").square().sum()
    expect_mean((taken - gradient).square().sum(1) / plain, 1.0)
    # Near the anchor it falls with the distance squared, and is far below that of a plain step.
    assert ratios[0] == pytest.approx(16 * ratios[1])
    assert ratios[1] < 0.01 * float(plain)


@pytest.mark.parametrize("mode", table.MODES)
def test_an_anchor_in_every_step_is_none(mode: str) -> None:
    options = {"perturb": mode, "directions": 2}
    plain = digest(whole_weights(run(5, anchor=None, **options)))
    assert digest(whole_weights(run(5, anchor=zo_dist.Anchor(every=1), **options))) == plain
    doubled = zo_dist.Anchor(every=1, lr_ratio=2.0)
    assert digest(whole_weights(run(5, anchor=doubled, **options))) != plain
    twice = digest(whole_weights(run(5, anchor=None, **options, lr=2 * LR)))
    assert digest(whole_weights(run(5, anchor=doubled, **options))) == twice


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("mask", list(table.MASKS))
@torch.no_grad()
def test_what_was_tested_at_both_points_is_what_is_written(mode: str, mask: str) -> None:
    """Against a model with the weights of either point, and the write by hand; factors change every step."""
    optimizer = run(
        sampler="adalezo", scale=zo_dist.RunningScale(alpha=0.5), mask=mask, perturb=mode, directions=2,
        anchor=zo_dist.Anchor(every=4, directions=3),
    )  # fmt: skip
    noise = Noise("rademacher", SEED)
    for number in range(8):
        rows, weights = rows_for("sequential", 6, seed=number), weights_of(optimizer)
        if number % 4 == 0:
            dropped, at_anchor = number, weights
            step(optimizer)
            written, before = optimizer.record, dict(optimizer.factors)
            assert len(written.slopes) == 3
            assert all(arms == tuple(range(len(optimizer.arms))) for arms in written.arms)
            continue
        draws = [optimizer.sampler.draw(number, d) for d in range(2)]
        step(optimizer)
        record, factors = optimizer.record, optimizer.factors
        expected = dict(weights)
        for arm in sorted(record.terms):
            mean = (
                sum(w for draw in draws for a, w in zip(draw.arms, draw.weights, strict=True) if a == arm) / 2
            )
            for param in optimizer.arms[arm].params:
                name, numel = param.name, param.numel
                now, then = factors.get(name, 1.0), before.get(name, 1.0)
                move = torch.zeros(numel)
                for d, coef in record.terms[arm]:
                    move += noise.values(name, number, d, 0, numel) * (coef * now)
                for d, coef in written.terms[arm]:
                    move += noise.values(name, dropped, d, 0, numel) * (coef * mean * now * now / then)
                move[weights[name].abs().view(-1) > optimizer.mask.thresholds.get(name, math.inf)] = 0.0
                expected[name] = weights[name] - LR * move.view(param.shape)
        for name, weight in weights_of(optimizer).items():
            # The mean is cut to 12 bits: of moves of up to 1, 2**-13.
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2.0**-13 * LR * 64)
        for d, (arms, scales) in enumerate(zip(record.arms, record.scales, strict=True)):
            mine, slopes = slice(3 * d, 3 * d + 3), []
            for point in (weights, at_anchor):
                sides = []
                for sign in (1.0, -1.0):
                    at = dict(point)
                    for param in (p for arm in arms for p in optimizer.arms[arm].params):
                        weight = point[param.name]
                        z = noise.values(param.name, number, d, 0, param.numel).view_as(weight)
                        z[weight.abs() > optimizer.mask.thresholds.get(param.name, math.inf)] = 0.0
                        at[param.name] = weight + z * (sign * EPS * factors.get(param.name, 1.0))
                    out = functional_call(build("sequential"), at, (rows["x"][mine],))
                    sides.append(float((out.squeeze(1) - rows["y"][mine]).square().mean()))
                slopes.append((sides[0] - sides[1]) / (2 * EPS))
            # Losses of some 10 are off by some 64 roundings; see reference.weight_tolerance.
            error = 64 * 2.0**-23 * 10 / EPS
            assert slopes[0] == pytest.approx(record.slopes[d], abs=error)
            for scale, weight in zip(scales, draws[d].weights, strict=True):
                assert scale == pytest.approx((slopes[0] - slopes[1]) / 2 * weight, abs=2 * error * weight)


# Which weights a forward sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_forward_sees_the_anchor_and_an_error_in_it_leaves_the_weights(dtype: torch.dtype) -> None:
    seen: list[str] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        seen.append(digest(dict(model.named_parameters())))
        if len(seen) in failing:
            raise RuntimeError("a fault of the model")
        return loss_of(model, batch)

    failing = {5}
    optimizer = run(dtype=dtype, rounding="kahan")
    at_anchor = digest(weights_of(optimizer))
    step(optimizer, 2, loss)
    before = digest(weights_of(optimizer))
    assert seen[0] == seen[2] == at_anchor
    kept = {name: tensor.clone() for name, tensor in optimizer.anchor.weights.items()}
    with pytest.raises(RuntimeError, match="a fault of the model"):
        step(optimizer, 1, loss)
    assert seen[3:] == [before, at_anchor]
    assert digest(weights_of(optimizer)) == before != at_anchor
    for name, tensor in optimizer.anchor.weights.items():
        assert torch.equal(tensor, kept[name])


def test_chunks_leave_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"dtype": torch.bfloat16, "directions": 2}
    expected = digest(whole_weights(run(5, **options)))
    monkeypatch.setattr("zo_dist.anchor._CHUNK", 3)
    monkeypatch.setattr("zo_dist.update._CHUNK", 11)
    assert digest(whole_weights(run(5, **options))) == expected
    assert digest(whole_weights(run(5, compile=False, **options))) == expected


def test_a_closure_is_evaluated_at_both_points() -> None:
    by_closure, by_rows, calls = run(), run(), []
    for number in range(5):
        rows = rows_for("sequential", 6, seed=number)

        def closure(rows: Any = rows) -> Any:
            calls.append(by_closure.step_count)
            return loss_of(by_closure.engine.module, rows).mean()  # type: ignore[union-attr]

        assert by_closure.step(closure) == pytest.approx(by_rows.step_batch(rows, loss_of), rel=1e-5)
    per_step = [calls.count(number) for number in range(5)]
    assert per_step == [2, 4, 4, 2, 4]


# What a log and a snapshot rebuild


def nan_in_call(number: int) -> Any:
    calls = iter(range(1000))
    return lambda model, batch: loss_of(model, batch) + (math.nan if next(calls) == number else 0.0)


def test_an_anchor_step_that_is_skipped_is_tried_again() -> None:
    optimizer, loss, lrs = run(sampler="adalezo", directions=2), nan_in_call(5), []
    # Calls: 1, 2, 2, then the fourth step's fails; the fifth is an anchor step in its place.
    due = []
    for _ in range(9):
        due.append(optimizer.anchor.due(optimizer.step_count))
        step(optimizer, 1, loss)
        lrs.append(optimizer.record.lr)
    assert due == [True, False, False, True, True, False, False, True, False]
    assert optimizer.skipped == 1
    assert lrs == [2 * LR if anchor else LR for anchor in due]


OPTIONS: dict[str, Any] = {"sampler": "adalezo", "rule": "momentum", "rounding": "kahan", "directions": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_is_in_the_log_and_in_a_snapshot(tmp_path: Path, dtype: torch.dtype) -> None:
    anchor = zo_dist.Anchor(every=4, directions=3, lr_ratio=0.5)
    options = {**OPTIONS, "dtype": dtype, "anchor": anchor, "scale": zo_dist.RunningScale()}
    ran, loss = run(**options), nan_in_call(6)
    with TrajectoryWriter(tmp_path / "log", identity(ran)) as log:
        for number in range(15):
            step(ran, loss=loss)
            log.append(ran.record)
            if number == 9:
                assert not ran.anchor.due(number + 1)
                snapshot = save_snapshot(ran, tmp_path)
    assert ran.skipped == 1
    for start in (None, snapshot):
        again = run(**{**options, "scale": zo_dist.RunningScale()})
        assert replay(again, tmp_path / "log", snapshot=start) == 15
        assert digest(whole_weights(again)) == digest(whole_weights(ran))
        assert repr(again.state_dict()) == repr(ran.state_dict())
    other = run(**{**options, "scale": zo_dist.RunningScale()})
    other.engine.module.load_state_dict(ran.engine.module.state_dict())
    other.load_state_dict(ran.state_dict())
    for optimizer in (ran, again, other):
        step(optimizer, 3)
    assert digest(whole_weights(again)) == digest(whole_weights(other)) == digest(whole_weights(ran))
    with pytest.raises(TrajectoryError, match=r"anchor is .*'every': 0.* here, but was .*'every': 4"):
        replay(run(**{**options, "anchor": None}), tmp_path / "log")
    with pytest.raises(ValueError, match=r"another rule, rounding, .*anchor or projection"):
        run(**{**options, "anchor": None}).load_state_dict(ran.state_dict())


def resumed_on_rank(engine: str, snapshot: str, steps: int) -> str:
    model = wrap(engine, build("sequential", torch.bfloat16))
    options = {**OPTIONS, "directions": 1, "lr": LR, "eps": EPS, "seed": SEED}
    optimizer = table.optimizer(model, anchor="third", self_check=False, **options)
    load_snapshot(optimizer, snapshot)
    for _ in range(steps):
        rows = rows_for("sequential", 4, seed=optimizer.step_count, dtype=torch.bfloat16)
        optimizer.step_batch(rows, coarse_loss)
    return digest(whole_weights(optimizer))


def coarse_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Losses that tell some weights from others, in multiples of 2**-10, whose sums are exact."""
    out = loss_of(model, batch)
    assert isinstance(out, Tensor)
    return (out.detach().double() * 64).round() / 1024 + torch.arange(len(out)) / 8


@needs_deepspeed
def test_a_snapshot_goes_on_with_the_same_bits_on_every_engine(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    snapshot = str(save_snapshot(run(5, dtype=torch.bfloat16, **OPTIONS), tmp_path))
    expected = resumed_on_rank("replicated", snapshot, 6)
    for engine, ranks in (("fsdp2", 2), ("fsdp2", 3), ("zero3", 2)):
        assert pool(ranks).run(resumed_on_rank, engine, snapshot, 6) == [expected] * ranks


# Settings, and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be at least 1"),
        ({"every": 2, "directions": 0}, "directions is 0; it must be at least 1, or null"),
        ({"every": 2, "lr_ratio": -1.0}, "lr_ratio is -1.0; it must be finite and at least 0"),
        ({"every": 2, "lr_ratio": math.nan}, "lr_ratio is nan"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zo_dist.Anchor(**options)


@pytest.mark.parametrize("name", [name for name in table.COEFFICIENTS if name != "raw"])
def test_coefficients_must_be_slopes(name: str) -> None:
    with pytest.raises(ValueError, match=r"with an anchor it must be Raw"):
        zo_dist.ZeroOrder(
            build("sequential"), coefficients=table.COEFFICIENTS[name](), directions=2,
            anchor=zo_dist.Anchor(every=2),
        )  # fmt: skip


def rank_dependent_anchor() -> None:
    import torch.distributed as dist

    zo_dist.ZeroOrder(wrap("fsdp2", build("sequential")), anchor=zo_dist.Anchor(every=2 + dist.get_rank()))


def test_ranks_must_have_one_anchor(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).errors(rank_dependent_anchor):
        assert "anchor must be the same on every rank" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.anchor=null"], "train.anchor_rows is 512, but optimizer.anchor is null"),
        (["train.anchor_rows=600"], r"train.anchor_rows is 600; it must be at most data.train \(512\)"),
        (["train.anchor_rows=0"], "train.anchor_rows is 0; it must be at least 1"),
        (
            ["optimizer.anchor.directions=513"],
            "optimizer.anchor.directions is 513; it must be at most the rows",
        ),
        (
            ["optimizer.directions=16", "train.rows=16", "train.anchor_rows=4"],
            "optimizer.anchor.directions is 16; it must be at most the rows of an anchor step",
        ),
        (["optimizer.anchor.every=0"], "optimizer.anchor.every is 0"),
        (["optimizer.coefficients.name=sign"], "optimizer.coefficients is SignOnly"),
    ],
)
def test_a_config_names_the_anchor(overrides: list[str], message: str) -> None:
    path = ROOT / "configs/mezo_svrg_opt1.3b_sst2.yaml"
    assert load_config(path).optimizer.anchor == zo_dist.Anchor(every=2, lr_ratio=10.0)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_an_anchor_step_that_is_skipped_is_tried_again_on_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"anchor_rows": 4, "eval_every": 0, "steps": 6}
    path = write_config(tmp_path, optimizer={"anchor": {"every": 5}}, train=train)
    tried: list[Tensor] = []
    original = zo_dist.ZeroOrder.step_batch

    def failing(self: zo_dist.ZeroOrder, batch: Any, row_loss: Any) -> float:
        tried.append(batch[0]["input_ids"])
        bad = len(tried) <= 3
        return original(self, batch, lambda m, b: row_loss(m, b) * (math.nan if bad else 1.0))

    monkeypatch.setattr(zo_dist.ZeroOrder, "step_batch", failing)
    assert main(["train", str(path), "optimizer.self_check=false"]) == 0
    assert len({tuple(ids.flatten().tolist()) for ids in tried[:4]}) == 4


def test_a_run_gives_anchor_steps_their_rows_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = {"anchor": {"every": 3, "directions": 4}, "sampler": {"name": "adalezo", "ratio": 0.6}}
    train = {"anchor_rows": 10, "micro_rows": 4, "snapshot_every": 5, "eval_every": 0, "steps": 8}
    path = write_config(tmp_path, optimizer=anchor, train=train)
    rows: list[int] = []
    original = zo_dist.ZeroOrder.step_batch

    def counted(self: zo_dist.ZeroOrder, batch: Any, row_loss: Any) -> float:
        rows.append(sum(len(micro["row"] if "row" in micro else micro["label"]) for micro in batch))
        return original(self, batch, row_loss)

    monkeypatch.setattr(zo_dist.ZeroOrder, "step_batch", counted)
    assert main(["train", str(path), f"train.output={tmp_path / 'whole'}"]) == 0
    assert rows == [10, 4, 4, 10, 4, 4, 10, 4]
    rows.clear()
    # After 5 steps from the log alone, after 7 from the snapshot of step 5: in the middle of a period.
    for steps in (2, 5, 7, 8):
        assert main(["train", str(path), f"train.output={tmp_path / 'cut'}", f"train.steps={steps}"]) == 0
    assert rows == [10, 4, 4, 10, 4, 4, 10, 4]
    whole, cut = ((tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
