"""Projections: what a search finds, what it leaves alone, and what logs and snapshots rebuild of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for, step
from test_anchor import coarse_loss
from tiny_run import write_config
from torch import Tensor, nn
from workers import Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.replay import identity, replay
from zo_dist.report.history import History
from zo_dist.snapshot import load_snapshot, save_snapshot
from zo_dist.trajectory import TrajectoryError, TrajectoryWriter

LR, EPS, SEED = 2.0**-7, 2.0**-6, 4
ROOT = Path(__file__).parent.parent


def make(engine: str = "replicated", dtype: torch.dtype = torch.float32, **options: Any) -> zo_dist.ZeroOrder:
    settings = {"lr": LR, "eps": EPS, "seed": SEED, "self_check": False, "projection": "third"}
    return table.optimizer(wrap(engine, build("sequential", dtype)), **{**settings, **options})


def bits(optimizer: zo_dist.ZeroOrder) -> str:
    return digest(whole_weights(optimizer))


# What a search finds


class Bowls(nn.Module):
    """Two weights, each with its loss `|w - w0 - best (start - w0)|**2 / 2` per row, w0 being 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(n)) for n in (3, 2))
        self.learnt = {"first": torch.tensor([0.6, -0.8, 0.0]), "second": torch.tensor([0.0, 1.0])}
        self.best = {"first": 0.75, "second": 1.25}

    def forward(self, rows: Tensor) -> Tensor:
        apart = [w - self.best[name] * self.learnt[name] for name, w in self.named_parameters()]
        return sum(d.square().sum() for d in apart) / 2 + 0.0 * rows  # type: ignore[no-any-return]


def search_of_bowls(clip: float) -> dict[str, Tensor]:
    """The weights after one search of 200 steps."""
    model = Bowls()
    projection = zo_dist.Projection(every=1, iterations=200, lr=0.1, clip=clip, parameters=None)
    optimizer = zo_dist.ZeroOrder(model, lr=0.0, projection=projection, self_check=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(model.learnt[name])
    for _ in range(201):
        optimizer.step_batch({"rows": torch.zeros(2)}, lambda module, batch: module(batch["rows"]))
    assert optimizer.projection.distances == pytest.approx({"first": 1.0, "second": 1.0}, abs=1e-7)
    return dict(model.named_parameters())


def test_a_search_finds_how_far_each_parameter_is_best() -> None:
    """The distance from the best shrinks by a tenth per step, as `E z**2` is 1: to 1e-9, and 0.1 is much."""
    found = search_of_bowls(clip=0.5)
    for name, weight in found.items():
        torch.testing.assert_close(weight.data, Bowls().best[name] * Bowls().learnt[name], rtol=0, atol=1e-3)


def test_a_ratio_stays_within_the_clip() -> None:
    found = search_of_bowls(clip=0.125)
    for name, ratio in (("first", 0.875), ("second", 1.125)):
        torch.testing.assert_close(found[name].data, ratio * Bowls().learnt[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1.0), ("float32", 1e-6), ("bfloat16", 2.0**-6)])
def test_distances_are_those_of_float64_for_any_chunks(
    dtype: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for chunk in (1 << 20, 7):
        monkeypatch.setattr("zo_dist.projection._CHUNK", chunk)
        optimizer = make(dtype=table.dtype_of(dtype), lr=0.0)
        start = {name: w.double() for name, w in whole_weights(optimizer).items()}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in optimizer.params:
                param.param.add_(torch.randn(param.shape, generator=generator), alpha=size)
        moved = {
            name: float((w.double() - start[name]).norm()) for name, w in whole_weights(optimizer).items()
        }
        step(optimizer, 4)
        # What is left out of a square is below 2**-70, and differences in float32 are exact to 2**-24.
        assert optimizer.projection.distances == pytest.approx(moved, rel=2.0**-22, abs=2.0**-35)
        kept.append(dict(optimizer.projection.distances))
    assert kept[0] == kept[1]


# What it leaves alone


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize(("dtype", "rounding"), table.WRITES)
def test_without_a_clip_a_search_leaves_every_bit(dtype: str, rounding: str, mode: str) -> None:
    """It is MeZO, but for the numbers of its steps."""
    options = {"dtype": table.dtype_of(dtype), "rounding": rounding, "perturb": mode, "directions": 2}
    still = zo_dist.Projection(every=3, iterations=2, clip=0.0, parameters=None)
    projected, plain = make(projection=still, **options), make(projection=None, **options)
    for optimizer in (projected, plain):
        with torch.no_grad():
            optimizer.params[0].param.view(-1)[0] = -0.0
    for number in range(10):
        plain.param_groups[0]["lr"] = 0.0 if number % 5 >= 3 else LR
        step(projected)
        step(plain)
        assert bits(projected) == bits(plain)
    assert bits(make(**options)) != bits(plain)


def test_a_projection_later_than_the_run_is_none() -> None:
    late = make(projection=zo_dist.Projection(every=7, parameters=None), directions=2)
    plain = make(projection=None, directions=2)
    for optimizer in (late, plain):
        step(optimizer, 7)
    assert bits(late) == bits(plain)


def test_named_parameters_alone_are_projected() -> None:
    optimizer = make(projection=zo_dist.Projection(every=1, iterations=1, parameters=r"first\.weight$"))
    step(optimizer)
    before = whole_weights(optimizer)
    step(optimizer)
    after = whole_weights(optimizer)
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["2.first.weight"]


def test_an_error_in_a_search_leaves_the_weights_and_the_step_can_be_taken_again() -> None:
    def failing(model: nn.Module, batch: Any) -> Any:
        raise RuntimeError("a fault of the model")

    # So fast that what it writes is more than a rounding.
    fast = zo_dist.Projection(every=3, iterations=2, lr=8.0, parameters=None)
    options = {"rounding": "kahan", "dtype": torch.bfloat16, "projection": fast}
    disturbed, whole = make(**options), make(**options)
    for number in range(7):
        before = bits(disturbed)
        if number in (3, 4):
            with pytest.raises(RuntimeError, match="a fault of the model"):
                step(disturbed, loss=failing)
            assert bits(disturbed) == before
        step(disturbed)
        step(whole)
        assert (bits(disturbed) == before) == (number == 3)
    assert bits(disturbed) == bits(whole)


def test_a_closure_is_evaluated_on_both_sides() -> None:
    by_closure, by_rows, calls = make(), make(), []
    for number in range(6):
        rows = rows_for("sequential", 6, seed=number)

        def closure(rows: Any = rows) -> Any:
            calls.append(by_closure.step_count)
            return loss_of(by_closure.engine.module, rows).mean()  # type: ignore[union-attr]

        assert by_closure.step(closure) == pytest.approx(by_rows.step_batch(rows, loss_of), rel=1e-4)
    assert [calls.count(number) for number in range(6)] == [2] * 6


# What a log and a snapshot rebuild

OPTIONS: dict[str, Any] = {"sampler": "adalezo", "rule": "momentum", "rounding": "kahan", "directions": 2}


def logged(folder: Path, loss: Any, **options: Any) -> tuple[zo_dist.ZeroOrder, Path]:
    """A run of 15 steps with its log, and a snapshot of step 9: one of a search of two has been taken."""
    ran = make(**OPTIONS, **options)
    with TrajectoryWriter(folder / "log", identity(ran)) as log:
        for number in range(15):
            step(ran, loss=loss)
            log.append(ran.record)
            if number == 8:
                assert ran.projection.counts["taken"] == 1
                snapshot = save_snapshot(ran, folder)
    return ran, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_is_in_the_log_and_in_a_snapshot(tmp_path: Path, dtype: torch.dtype) -> None:
    ran, snapshot = logged(tmp_path, loss_of, dtype=dtype)
    for start in (None, snapshot):
        again = make(**OPTIONS, dtype=dtype)
        assert replay(again, tmp_path / "log", snapshot=start) == 15
        assert bits(again) == bits(ran)
        assert repr(again.state_dict()) == repr(ran.state_dict())
    other = make(**OPTIONS, dtype=dtype)
    other.engine.module.load_state_dict(ran.engine.module.state_dict())
    other.load_state_dict(ran.state_dict())
    for optimizer in (ran, again, other):
        step(optimizer, 4)
    assert bits(again) == bits(other) == bits(ran)
    without = {**OPTIONS, "projection": None, "dtype": dtype}
    with pytest.raises(TrajectoryError, match=r"projection is .*'every': 0.* here, but was .*'every': 3"):
        replay(make(**without), tmp_path / "log")
    with pytest.raises(ValueError, match="anchor or projection"):
        make(**without).load_state_dict(ran.state_dict())


def rebuilt_on_rank(engine: str, folder: str, snapshot: str) -> list[str]:
    """By the log alone, by the log after a snapshot, and by steps after it."""
    digests = []
    for start in (None, snapshot):
        optimizer = make(engine, torch.bfloat16, **OPTIONS)
        replay(optimizer, Path(folder) / "log", snapshot=start)
        digests.append(bits(optimizer))
    optimizer = make(engine, torch.bfloat16, **OPTIONS)
    load_snapshot(optimizer, snapshot)
    step_on_rank(optimizer, 15)
    return [*digests, bits(optimizer)]


def step_on_rank(optimizer: zo_dist.ZeroOrder, last: int) -> None:
    """The rows of `step`, the first rank having all of them."""
    while optimizer.step_count < last:
        rows = rows_for("sequential", 6, seed=optimizer.step_count, dtype=torch.bfloat16)
        mine = {key: value[: 6 if optimizer.engine.rank == 0 else 0] for key, value in rows.items()}
        optimizer.step_batch(mine, coarse_loss)


@needs_deepspeed
@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [
        ("replicated", 2),
        ("fsdp2", 1),
        ("fsdp2", 2),
        ("fsdp2", 3),
        ("zero3", 2),
        ("zero3", 3),
        ("hsdp_2x1", 2),
    ],
)
def test_every_engine_rebuilds_a_search_with_the_same_bits(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str, num_ranks: int
) -> None:
    ran, snapshot = logged(tmp_path, coarse_loss, dtype=torch.bfloat16)
    results = pool(num_ranks).run(rebuilt_on_rank, engine, str(tmp_path), str(snapshot))
    assert results == [[bits(ran)] * 3] * num_ranks


# Settings, and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; it must be at least 1"),
        ({"iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"eps": 0.0}, "eps is 0.0; it must be finite and above 0"),
        ({"lr": math.nan}, "lr is nan; it must be finite and at least 0"),
        ({"clip": 1.0}, r"clip is 1.0; it must lie in \[0, 1\)"),
        ({"parameters": "(k"}, r"parameters is '\(k', no regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zo_dist.Projection(**{"every": 2, **options})


def test_names_that_no_parameter_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"self_attn.*which no name of a trained parameter has \(one is 5"):
        make(projection=zo_dist.Projection(every=2))


def test_an_anchor_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a projection, and an anchor too"):
        make(anchor="third")


def test_clipped_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="clip_rows is 3"):
        make(estimator=zo_dist.TwoSided(clip_rows=3.0))


def rank_dependent_projection() -> None:
    import torch.distributed as dist

    make("fsdp2", projection=zo_dist.Projection(every=2 + dist.get_rank(), parameters=None))


def test_ranks_must_have_one_projection(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).errors(rank_dependent_projection):
        assert "projection must be the same on every rank" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.projection.every=0"], "optimizer.projection.every is 0"),
        (["optimizer.projection.cycle=50"], "unknown key optimizer.projection.cycle"),
        (["optimizer.anchor.every=2"], "optimizer.there is a projection, and an anchor too"),
    ],
)
def test_a_config_names_the_projection(overrides: list[str], message: str) -> None:
    path = ROOT / "configs/dizo_opt2.7b_sst2.yaml"
    assert load_config(path).optimizer.projection == zo_dist.Projection(every=50)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_a_run_is_cut_in_a_search_and_its_report_knows_the_bandit(tmp_path: Path) -> None:
    projected = {"projection": {"every": 2, "iterations": 2}, "sampler": {"name": "adalezo", "ratio": 0.6}}
    train = {"snapshot_every": 7, "eval_every": 0, "steps": 12}
    path = write_config(tmp_path, optimizer=projected, train=train)
    assert main(["train", str(path), f"train.output={tmp_path / 'whole'}"]) == 0
    # After 3 steps from the log alone, after 11 from the snapshot of step 7: each is within a search.
    for steps in (3, 11, 12):
        assert main(["train", str(path), f"train.output={tmp_path / 'cut'}", f"train.steps={steps}"]) == 0
    whole, cut = ((tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    probabilities = History(tmp_path / "whole").probabilities
    assert len(probabilities) == 12
    # Learnt from the second step, when the third begins, and from none of the search, steps 2 and 3.
    assert probabilities[1] != probabilities[2] == probabilities[3] == probabilities[4] != probabilities[5]
