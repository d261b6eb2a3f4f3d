"""Earlier steps that are written again: by how much, at which limit it is what, and what is kept of them."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
import yaml
from models import build, loss_of, rows_for, step, two_outputs
from tiny_run import tiny_config
from torch import Tensor, nn
from workers import Pool, digest, whole_weights, wrap

import zo_dist
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.replay import identity, replay
from zo_dist.scale import Scale
from zo_dist.snapshot import save_snapshot
from zo_dist.tasks import choice_loss, choice_margin
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryWriter

ROOT = Path(__file__).parent.parent
EPS = 2.0**-6
every_scale = pytest.mark.parametrize("scale", [Scale, zo_dist.RunningScale])


def make(model: nn.Module | None = None, **options: Any) -> zo_dist.ZeroOrder:
    shared = {"lr": 2.0**-7, "eps": EPS, "seed": 4, "self_check": False, "jacobian": "window"}
    return table.optimizer(build("sequential") if model is None else model, **{**shared, **options})


# What is written


class Linear(nn.Module):
    """Two outputs, linear in the weights, the same in every row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 2, bias=False), nn.Linear(4, 2, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x[:, :4])


def curved(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Not linear in outputs: their gradient is another at every step."""
    return outputs[:, 0].square() + (outputs[:, 0] * outputs[:, 1]).exp() + 3.0 * outputs[:, 1]


def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(batch["x"])
    assert isinstance(out, Tensor)
    return out


LOSS = zo_dist.Composite(outputs_of, curved, width=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
def test_an_earlier_direction_gets_the_slope_that_it_has_today(estimator: str, sampler: str) -> None:
    """With outputs that are linear in the weights, as J is then the same in every step.

    The slope by autograd at today's weights, eps being 2**-10. Outputs have 24 bits, so that their
    differences are exact to 2**-14 of their size or so; G of two sides is off by order eps**2. The step's own
    slope is of losses, and of one side off by eps / 2 z.Hz, where H is some 10 and z.z up to 10.
    """
    torch.manual_seed(0)
    model, batch = Linear(), {"x": torch.randn(1, 6).expand(3, 6).contiguous()}
    window = zo_dist.JacobianWindow(window=4, decay=0.5)
    options: dict[str, Any] = {"jacobian": window, "estimator": estimator, "sampler": sampler}
    optimizer = make(model, directions=3, lr=0.02, eps=2.0**-10, arms=r"layers\.\d", **options)
    tolerance = {"two_sided": 1e-3, "one_sided": 2e-2}[estimator]
    draws: list[list[Any]] = []
    compared = 0
    for now in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        draws.append([optimizer.sampler.draw(now, d) for d in range(3)])
        losses = LOSS(model, batch).mean()
        gradient = dict(
            zip(before, torch.autograd.grad(losses, list(model.parameters())), strict=True)  # type: ignore[arg-type]
        )
        outputs = outputs_of(model, batch).detach().requires_grad_()
        (by_outputs,) = torch.autograd.grad(curved(outputs, batch).mean(), outputs)
        optimizer.step_batch(batch, LOSS)
        of_rows = torch.tensor(optimizer.record.gradient)
        # Both sides are off by eps**2 times a few hundred; the wrong one by some 10 eps.
        torch.testing.assert_close(of_rows, by_outputs.sum(0), rtol=1e-3, atol=1e-4)
        moved, sizes = dict.fromkeys(before, torch.zeros(())), dict.fromkeys(before, 0.0)
        for age in range(min(4, now + 1)):
            for d, draw in enumerate(draws[now - age]):
                names = [
                    (p.name, arm, i) for i, arm in enumerate(draw.arms) for p in optimizer.arms[arm].params
                ]
                z = {
                    name: optimizer.noise.values(name, now - age, d, 0, before[name].numel()).view_as(
                        before[name]
                    )
                    for name, *_ in names
                }
                slope = sum(float((gradient[n] * z[n]).sum()) * draw.lengths[i] for n, _, i in names)
                for name, _, i in names:
                    moved[name] = moved[name] + 0.5**age * slope / 3 * draw.weights[i] * z[name]
                    sizes[name] += 0.5**age * abs(slope) / 3 * draw.weights[i]
        for name, p in model.named_parameters():
            got = (before[name] - p.detach()) / 0.02
            # The log's weights of draws have 11 bits, and weights 24.
            limit = (tolerance + 2.0**-11) * sizes[name] + 2.0**-23 / 0.02
            assert float((got - moved[name]).abs().max()) <= limit
            compared += sizes[name] > 0.1
    assert compared >= 8


@every_scale
def test_of_losses_alone_earlier_estimates_are_added_as_they_were(scale: type[Scale]) -> None:
    """Written by hand from the records; float32 keeps 24 bits of each of the few that are added.

    With the factors of a scale as they were, too.
    """
    window = zo_dist.JacobianWindow(window=3, decay=0.5)
    optimizer = make(jacobian=window, directions=2, sampler="uniform", scale=scale())
    records, factors = list[StepRecord](), list[dict[str, float]]()
    for now in range(6):
        before = {p.name: p.param.detach().clone() for p in optimizer.params}
        step(optimizer)
        records.append(optimizer.record)
        factors.append(dict(optimizer.factors))
        assert optimizer.record.gradient == ()
        moved = {name: torch.zeros_like(w) for name, w in before.items()}
        for age, record in enumerate(records[: -min(now + 1, 3) - 1 : -1]):
            for arm, terms in record.terms.items():
                for p in optimizer.arms[arm].params:
                    for d, amount in terms:
                        z = optimizer.noise.values(p.name, record.step, d, 0, before[p.name].numel())
                        factor = factors[record.step].get(p.name, 1.0)
                        moved[p.name] += 0.5**age * amount * factor * z.view_as(before[p.name])
        for p in optimizer.params:
            expected = before[p.name] - 2.0**-7 * moved[p.name]
            torch.testing.assert_close(p.param.detach(), expected, rtol=2.0**-22, atol=2.0**-24)
    assert (factors[-1] != factors[-2]) == (scale is zo_dist.RunningScale)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
@pytest.mark.parametrize(
    "window",
    [
        zo_dist.JacobianWindow(window=1),
        zo_dist.JacobianWindow(decay=0.0),
        # Every step is a cycle of its own.
        zo_dist.JacobianWindow(cycle=1),
    ],
    ids=str,
)
def test_without_an_earlier_step_it_is_what_it_was_before(
    window: zo_dist.JacobianWindow, sampler: str, outputs: bool
) -> None:
    loss = two_outputs(loss_of) if outputs else loss_of
    given = {"sampler": sampler, "directions": 3, "rule": "momentum", "compile": False}
    with_it, without = make(jacobian=window, **given), make(jacobian=None, **given)
    for optimizer in (with_it, without):
        for seed in range(8):
            optimizer.step_batch(rows_for("sequential", 60, seed=seed), loss)
    assert digest(whole_weights(with_it)) == digest(whole_weights(without))
    assert without.record.gradient == ()


def test_the_decay_falls_by_epochs_and_begins_anew_with_each_cycle() -> None:
    optimizer = make(jacobian=zo_dist.JacobianWindow(decay=0.9, epoch=2, cycle=30))
    shares = [optimizer.jacobian.share(i) for i in range(30)]
    expected = [0.9 / (1 + 10 * t) for t in range(11) for _ in range(2)] + [0.0] * 8
    assert shares == expected == [optimizer.jacobian.share(30 + i) for i in range(30)]
    kept = []
    for _ in range(32):
        step(optimizer)
        kept.append(len(optimizer.jacobian.kept))
    assert kept == [*range(1, 14), *[13] * 9, *[0] * 8, 1, 2]


def test_the_variance_falls_as_one_over_the_window() -> None:
    """Of the mean of as many directions, each by itself unbiased, at weights that do not move.

    One direction of signs in d weights has, over the square of the gradient, a variance of d - 1; the mean of
    8 an eighth of that. Over 400 windows without a common step the mean square has a relative deviation of
    some sqrt(2 / 400) = .07 or less, of which 5 are allowed for.
    """
    torch.manual_seed(0)
    model, batch = Linear(), {"x": torch.randn(1, 6).expand(2, 6).contiguous()}
    weights = list(model.parameters())
    for w in weights:
        w.data.zero_()
    losses = LOSS(model, batch).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses, weights)])
    # So small a rate that weights stay where they are, near 0, where float32 is fine enough to see it.
    rate = 2.0**-40
    optimizer = make(model, jacobian=zo_dist.JacobianWindow(window=8), lr=rate, arms=None)
    off = []
    for i in range(400 * 8):
        before = torch.cat([w.detach().flatten().clone() for w in weights])
        optimizer.step_batch(batch, LOSS)
        if i % 8 == 7:
            estimate = (before - torch.cat([w.detach().flatten() for w in weights])) / rate / 8
            off.append(float((estimate - gradient).square().sum() / gradient.square().sum()))
    expected = (gradient.numel() - 1) / 8
    assert math.fsum(off) / len(off) == pytest.approx(expected, rel=0.35)


# Losses in two steps


def scored(scores: list[list[float]]) -> tuple[Any, dict[str, Tensor]]:
    """A model whose logits are scores, of options 0, 1, ... of each row."""
    table_of = torch.tensor(scores)

    class Scores(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=table_of[input_ids[:, 0]].unsqueeze(1))

    rows, options = table_of.shape
    ids = torch.arange(rows)[:, None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": ids[:, 0] % options}
    return Scores(), batch | {"option_ids": torch.arange(options).expand(rows, options)}


@pytest.mark.parametrize("options", [1, 2, 5])
def test_a_margin_has_the_loss_and_the_slopes_of_its_choice(options: int) -> None:
    """To a few units of float32, which for logits up to 20 is 20 * 2**-23."""
    torch.manual_seed(0)
    model, batch = scored((torch.randn(12, options) * 6).tolist())
    losses, margins, slopes = choice_margin.with_slopes(model, batch, 12)
    assert margins.shape == slopes.shape == (12, 1)
    torch.testing.assert_close(losses, choice_loss(model, batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(choice_margin(model, batch), losses)
    # What is not the right answer's probability.
    torch.testing.assert_close(slopes[:, 0], 1 - torch.exp(-losses), rtol=1e-4, atol=1e-5)
    assert bool(margins.isfinite().all())
    assert (losses.max() > 1) == (options > 1)


def other_weights(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return batch["x"][:, 0] * nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize(
    ("outputs", "loss", "width", "words"),
    [
        (outputs_of, curved, 3, r"outputs returned .*\(\d, 2\) for \d rows and width 3"),
        (lambda m, b: outputs_of(m, b).mean(0, keepdim=True), curved, 2, r"\(1, 2\) for \d rows and width 2"),
        (lambda m, b: outputs_of(m, b)[:, :1].squeeze(1), curved, 2, r"outputs returned .*\(\d,\)"),
        (outputs_of, lambda o, _: o[:, 0].detach(), 2, "does not depend on the outputs"),
        (outputs_of, other_weights, 2, "does not depend on the outputs"),
        (outputs_of, lambda o, _: o.sum(), 2, r"loss returned .*\(\) for \d rows"),
    ],
    ids=["width", "mean", "flat", "detached", "other", "sum"],
)
def test_a_composite_that_is_none_is_refused(
    outputs: Any, loss: Any, width: int, words: str, mode: str
) -> None:
    model = Linear()
    before = digest(model.state_dict())
    optimizer = make(model, arms=r"layers\.\d", perturb=mode)
    with pytest.raises(ValueError, match=words):
        optimizer.step_batch({"x": torch.ones(3, 6)}, zo_dist.Composite(outputs, loss, width))
    assert digest(model.state_dict()) == before


@pytest.mark.parametrize("width", [0, 256])
def test_a_width_out_of_range_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}"):
        zo_dist.Composite(outputs_of, LOSS.loss, width)


def one_output(loss: Any = loss_of) -> zo_dist.Composite:
    return zo_dist.Composite(lambda m, b: loss(m, b)[:, None], lambda o, _: o[:, 0].square(), width=1)


def test_another_loss_function_in_the_middle_is_refused() -> None:
    for first, second, words in (
        (loss_of, two_outputs(loss_of), r"has 2 outputs, .* had 0"),
        (loss_of, one_output(), r"has 1 outputs, .* had 0"),
        (one_output(), loss_of, r"has 0 outputs, .* had 1"),
    ):
        optimizer = make()
        step(optimizer, 2, first)
        before, count = digest(whole_weights(optimizer)), optimizer.step_count
        with pytest.raises(ValueError, match=words):
            step(optimizer, 1, second)
        assert (digest(whole_weights(optimizer)), optimizer.step_count) == (before, count)
        step(optimizer, 1, first)
    with pytest.raises(ValueError, match="has 0 outputs"):
        make_after(one_output()).step(lambda: torch.zeros(()))


def make_after(loss: Any, steps: int = 2) -> zo_dist.ZeroOrder:
    optimizer = make()
    step(optimizer, steps, loss)
    return optimizer


def unlike(engine: str) -> str:
    """Each rank has a loss function of other outputs."""
    optimizer = make(wrap(engine, build("sequential")), directions=2)
    loss: Any = loss_of if optimizer.engine.rank else two_outputs(loss_of)
    try:
        optimizer.step_batch(rows_for("sequential", 4), loss)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_loss_functions_are_told(pool: Callable[[int], Pool]) -> None:
    first, second = pool(2).run(unlike, "fsdp2")
    assert first == second
    assert "of [2, 0] outputs" in first


def skipping(engine: str, what: str) -> tuple[int, str, list[int]]:
    """Four steps, the third with finite losses, but on one rank an output or a slope that is no number.

    Or on both a `product`: each of its numbers fits float32, but not an earlier direction's slope today.
    """
    optimizer = make(wrap(engine, build("sequential")), directions=2)
    wrong, large = optimizer.engine.rank == 1, 1e20 if what == "product" else 1.0

    def loss_in(turn: int) -> zo_dist.Composite:
        def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            out = model(batch["x"]).float()
            bad = turn == 2 and wrong and what == "output"
            return torch.cat([out * large, torch.full_like(out, math.nan if bad else 1.0)], dim=1)

        def loss(o: Tensor, batch: dict[str, Tensor]) -> Tensor:
            losses = (o[:, 0] / large).square()
            if turn == 2 and wrong and what == "slope":
                return losses + (o[:, 1] - 1.0).sqrt()
            if turn == 2 and what == "product":
                return losses + (o[:, 0] - o[:, 0].detach()) * 1e30
            return losses

        return zo_dist.Composite(outputs, loss, width=2)  # type: ignore[arg-type]

    kept = []
    for turn in range(4):
        optimizer.step_batch(rows_for("sequential", 4, seed=turn), loss_in(turn))
        kept.append(len(optimizer.jacobian.kept))
    return optimizer.skipped, digest(whole_weights(optimizer)), kept


@pytest.mark.parametrize("what", ["output", "slope", "product"])
def test_a_step_that_is_skipped_has_no_place_in_the_window(pool: Callable[[int], Pool], what: str) -> None:
    results = pool(2).run(skipping, "fsdp2", what)
    assert results[0] == results[1]
    assert (results[0][0], results[0][2]) == (1, [1, 2, 2, 3])


@pytest.mark.parametrize("outputs", [False, True])
def test_a_search_for_a_projection_has_no_place_in_the_window(outputs: bool) -> None:
    loss = two_outputs(loss_of) if outputs else loss_of
    optimizer, again, kept = make(projection="third"), make(projection="third"), []
    for _ in range(10):
        step(optimizer, 1, loss)
        again.replay(optimizer.record)
        kept.append([one.step for one in optimizer.jacobian.kept])
    # Three steps, two of a search, and so on; a cycle is of 16, a window of 4.
    assert kept[2:9] == [[2, 1, 0], [2, 1, 0], [2, 1, 0], [5, 2, 1], [6, 5, 2], [7, 6, 5], [7, 6, 5]]
    assert optimizer.skipped == 0
    assert digest(whole_weights(again)) == digest(whole_weights(optimizer))
    assert repr(again.state_dict()) == repr(optimizer.state_dict())


def test_a_log_of_another_loss_function_is_refused_before_anything_is_written() -> None:
    optimizer = make()
    step(optimizer, 2, two_outputs(loss_of))
    before = digest(whole_weights(optimizer)), repr(optimizer.state_dict())
    record = make_after(loss_of, 3).record
    with pytest.raises(TrajectoryError, match=r"step 2 cannot follow: .* has 0 outputs, .* had 2"):
        optimizer.replay(record)
    assert (digest(whole_weights(optimizer)), repr(optimizer.state_dict())) == before


# What is kept


@pytest.mark.parametrize("outputs", [False, True])
@every_scale
def test_it_is_in_a_snapshot_and_comes_back_from_the_log(
    tmp_path: Path, outputs: bool, scale: type[Scale]
) -> None:
    loss = two_outputs(loss_of) if outputs else loss_of

    def new(**more: Any) -> zo_dist.ZeroOrder:
        options = {"sampler": "adalezo", "rule": "momentum", "directions": 3, "lr": 0.01, "mask": "small"}
        return make(**{**options, "scale": scale(), **more})

    ran = new()
    with TrajectoryWriter(tmp_path / "log", identity(ran)) as log:
        for number in range(19):
            step(ran, 1, loss)
            log.append(ran.record)
            if number == 9:
                snapshot = save_snapshot(ran, tmp_path)
    assert len(ran.record.gradient) == (2 if outputs else 0)
    for start in (None, snapshot):
        again = new()
        assert replay(again, tmp_path / "log", snapshot=start) == 19
        assert digest(whole_weights(again)) == digest(whole_weights(ran))
        assert again.jacobian.state_dict() == ran.jacobian.state_dict()
    taken = new(model=again.engine.module)
    taken.load_state_dict(ran.state_dict())
    for _ in range(3):
        for optimizer in (ran, taken):
            optimizer.step_batch(rows_for("sequential", 6, seed=optimizer.step_count), loss)
    assert digest(whole_weights(taken)) == digest(whole_weights(ran))
    # Of a longer window only what the shorter one has is written again.
    shorter = new(jacobian=zo_dist.JacobianWindow(window=2, decay=0.5, epoch=4, cycle=16))
    shorter.load_state_dict(ran.state_dict())
    assert [kept.step for kept, _ in shorter.jacobian.again(ran.record)] == [ran.jacobian.kept[0].step]
    with pytest.raises(ValueError, match="another jacobian"):
        new(jacobian=None).load_state_dict(ran.state_dict())
    with pytest.raises(TrajectoryError, match=r"jacobian is .* here, but was"):
        replay(new(jacobian=None), tmp_path / "log")


@pytest.mark.parametrize(("directions", "outputs"), list(itertools.product([1, 3], [0, 1, 255])))
@pytest.mark.parametrize("curvatures", [False, True])
def test_a_record_is_what_was_packed(directions: int, outputs: int, curvatures: bool) -> None:
    numbers = [i / 8 for i in range(outputs)]
    record = StepRecord(
        *(
            7,
            0.5,
            (1.0,) * directions,
            ((0, 2),) * directions,
            (0.25,) * directions,
            ((1.0, 2.0),) * directions,
        ),
        (3.0, 4.0),
        curvatures=((1.5, 2.0),) * directions if curvatures else (),
        gradient=tuple(numbers),
        changes=tuple(tuple(d + n for n in numbers) for d in range(directions)) if outputs else (),
    )
    packed = record.pack(3)
    assert StepRecord.unpack(packed, 3) == record
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises((ValueError, struct.error, IndexError)):
            StepRecord.unpack(wrong, 3)


# Runs


def test_a_run_by_config_has_a_margin_for_its_output(tmp_path: Path) -> None:
    settings = tiny_config(tmp_path, optimizer={"jacobian": {"window": 3, "decay": 0.5}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    main(["train", str(tmp_path / "c.yaml")])
    records = list(zo_dist.TrajectoryReader(tmp_path / "run" / "trajectory.zo"))
    assert [len(r.gradient) for r in records] == [1, 1, 1]
    # The mean of what is not the right answer's probability.
    assert all(0 < r.gradient[0] < 1 for r in records)
    assert all(len(r.changes) == 2 for r in records)


@pytest.mark.parametrize("name", ["pseuzo_opt1.3b_sst2", "adalezo_pseuzo_opt13b_sst2"])
def test_recipes_name_it(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.optimizer.jacobian is not None
    # Cycles are of whole epochs, and the published code counts the last one that is begun.
    epoch = -(-config.data.train // config.train.rows)
    epochs = -(-config.train.steps // epoch)
    assert config.optimizer.jacobian == zo_dist.JacobianWindow(epoch=epoch, cycle=epochs // 2 * epoch)


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curvature": zo_dist.DiagonalCurvature()}, "there is a curvature, with which they would be others"),
        ({"perturbation_momentum": zo_dist.PerturbationMomentum()}, "there is a perturbation_momentum, with"),
        ({"anchor": zo_dist.Anchor(every=3)}, "an anchor too.*leave out one"),
        ({"conservative": True}, "conservative is true.*set conservative to false"),
        ({"coefficients": zo_dist.SignOnly()}, "coefficients is SignOnly: set it to Raw"),
        ({"estimator": zo_dist.TwoSided(clip_rows=1.0)}, "clip_rows is 1.0"),
        (
            {"rule": zo_dist.Momentum(factored=True), "structure": zo_dist.LowRank()},
            "set factored to false",
        ),
    ],
    ids=["curvature", "momentum", "anchor", "conservative", "coefficients", "clip_rows", "factored"],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zo_dist.ZeroOrder(build("sequential"), jacobian=zo_dist.JacobianWindow(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"decay": 1.5}, "decay is 1.5; it must lie in"),
        ({"decay": math.nan}, "decay is nan"),
        ({"epoch": 0}, "epoch is 0; .* or null"),
        ({"cycle": -1}, "cycle is -1; .* or null"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zo_dist.JacobianWindow(**options)
