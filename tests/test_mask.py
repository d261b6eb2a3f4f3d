"""Only small weights are trained: which those are, and that nothing else of them or beside them changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, losses_by_mode, rows_for, step
from torch import Tensor, nn
from torch.func import functional_call
from workers import HAVE_DEEPSPEED, Pool, digest, needs_deepspeed, runs_in, whole_weights, wrap

import zo_dist
from zo_dist.config import load_config
from zo_dist.engines import select
from zo_dist.mask import Mask, smallest
from zo_dist.noise import Noise
from zo_dist.params import trainable_params
from zo_dist.parts import Probe, Shifts, looked_up
from zo_dist.perturb import ShardPerturbation
from zo_dist.replay import identity, replay
from zo_dist.snapshot import load_snapshot, save_snapshot
from zo_dist.trajectory import TrajectoryError, TrajectoryWriter

EPS, LR, SEED = 2.0**-6, 2.0**-7, 4
SHARE = 0.4  # of table.MASKS
ROOT = Path(__file__).parent.parent


def run(steps: int = 6, **options: Any) -> zo_dist.ZeroOrder:
    options = {"lr": LR, "eps": EPS, "seed": SEED, "self_check": False, "mask": "small", **options}
    optimizer = table.optimizer(build("sequential", options.pop("dtype", torch.float32)), **options)
    step(optimizer, steps)
    return optimizer


def weights_of(optimizer: zo_dist.ZeroOrder) -> dict[str, Tensor]:
    return {p.name: p.param.detach().clone() for p in optimizer.params}


def by_sorting(weight: Tensor, share: float) -> float:
    k = max(1, round(share * weight.numel()))
    return float(weight.detach().float().abs().flatten().kthvalue(k).values)


def integers(weight: Tensor) -> Tensor:
    """The bits of weights, in which 0.0 is not -0.0 and NaN is itself."""
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


# Thresholds


def with_ties(dtype: torch.dtype) -> nn.Module:
    """One matrix with few magnitudes, and one whose smallest weights are subnormal."""
    model = build("sequential", dtype)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        few = weights["2.first.weight"]
        few.copy_((few * 3).round().clamp(-2, 2) + 0.5)
        weights["3.weight"][0, :] = 2.0**-24 * torch.arange(1, 6)
    return model  # type: ignore[no-any-return]


def thresholds_on_rank(engine: str, dtype: torch.dtype, share: float) -> dict[str, float]:
    mask = zo_dist.SmallWeights(share=share)
    model = wrap(engine, with_ties(dtype))
    return zo_dist.ZeroOrder(model, mask=mask, self_check=False).mask.thresholds


@pytest.mark.parametrize("share", [0.05, 0.4, 0.99])
@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [
        *((engine, ranks) for engine in table.MAIN_ENGINES for ranks in table.RANKS),
        ("fsdp2_mixed", 2),
        ("fsdp2_offload", 2),
        ("hsdp_2x1", 2),
        ("hsdp_1x2", 2),
        ("hsdp_2x2", 4),
    ],
)
def test_thresholds_are_those_of_sorting_the_whole_weights(
    pool: Callable[[int], Pool], engine: str, num_ranks: int, share: float
) -> None:
    if engine.startswith("zero") and not HAVE_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (engine == "fsdp2_mixed" and dtype != torch.float32) or not runs_in(dtype, engine):
            continue
        whole = with_ties(dtype)
        expected = {n: by_sorting(p, share) for n, p in whole.named_parameters() if p.ndim > 1}
        assert len(expected) == 4
        got = pool(num_ranks).run(thresholds_on_rank, engine, dtype, share)
        assert got == [expected] * num_ranks


def test_weights_that_are_no_number_count_as_the_largest() -> None:
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.nan, -1.0, 3.0, math.inf], [-2.0, -math.nan, 0.5, -math.inf]]))
    params = trainable_params(model, lambda p: p.shape)

    def number(k: int) -> float:
        return smallest(select(model), params, {"weight": k})["weight"]

    assert [number(k) for k in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, 3.0]
    assert {number(k) for k in (5, 6, 7, 8)} == {torch.finfo(torch.float32).max}


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share is {share}"):
        zo_dist.SmallWeights(share=share)


def test_weights_that_are_0_cannot_be_the_small_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match=r"so many weights of 1\.weight are 0"):
        zo_dist.ZeroOrder(model, mask=zo_dist.SmallWeights(share=0.5))
    zo_dist.ZeroOrder(model, mask=zo_dist.SmallWeights(share=1.0))


def rank_dependent_share() -> None:
    import torch.distributed as dist

    share = 0.5 if dist.get_rank() else 0.25
    zo_dist.ZeroOrder(wrap("fsdp2", build("sequential")), mask=zo_dist.SmallWeights(share=share))


def test_ranks_must_have_one_share(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).errors(rank_dependent_share):
        assert "mask must be the same on every rank" in message


# What a step leaves alone


# Decay would move every weight.
@pytest.mark.parametrize("write", table.WRITES, ids=str)
@pytest.mark.parametrize("rule", list(table.RULES))
def test_what_is_left_out_keeps_its_bits(write: tuple[str, str], rule: str) -> None:
    dtype, rounding = table.dtype_of(write[0]), write[1]
    options = {"dtype": dtype, "rounding": rounding, "rule": rule, "weight_decay": 0.5, "lr": 0.05}
    optimizer = run(0, **options)
    assert set(optimizer.mask.thresholds) == {"0.weight", "2.first.weight", "3.weight", "5.weight"}
    moved: set[tuple[str, str]] = set()
    for _ in range(20):
        before = everything(optimizer)
        step(optimizer)
        for (kind, name), now in everything(optimizer).items():
            weight, was = before["weight", name], before[kind, name]
            out = weight.float().abs() > optimizer.mask.thresholds.get(name, math.inf)
            assert bool(out.any()) == (name in optimizer.mask.thresholds)
            assert torch.equal(integers(now)[out], integers(was)[out])
            if not torch.equal(now, was):
                moved.add((kind, name))
    assert moved == set(before)


def everything(optimizer: zo_dist.ZeroOrder) -> dict[tuple[str, str], Tensor]:
    """Weights and what is kept beside them, in the shape of the weight."""
    found = {("weight", name): weight for name, weight in weights_of(optimizer).items()}
    for kind, of in optimizer.beside.items():
        for name, tensor in of.items():
            found[kind, name] = tensor.clone().view_as(found["weight", name])
    return found


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("sampler", ["dense", "adalezo"])
@torch.no_grad()
def test_probe_and_write_have_one_mask(mode: str, sampler: str) -> None:
    """Against weights of the model as a forward sees them, and against the write by hand."""
    optimizer = run(5, perturb=mode, sampler=sampler)
    weights, number = weights_of(optimizer), optimizer.step_count
    step(optimizer)
    (slope,), (arms,) = optimizer.record.slopes, optimizer.record.arms
    coefs = {
        p.name: coef
        for arm, coef in zip(arms, optimizer.record.scales[0], strict=True)
        for p in optimizer.arms[arm].params
    }
    rows, expected, losses = rows_for("sequential", 6, seed=number), dict(weights), []
    for sign in (1.0, -1.0):
        at = dict(weights)
        for name, coef in coefs.items():
            weight = weights[name]
            z = Noise("rademacher", SEED).values(name, number, 0, 0, weight.numel()).view_as(weight)
            z[weight.abs() > optimizer.mask.thresholds.get(name, math.inf)] = 0.0
            at[name] = weight + z * (sign * EPS)
            expected[name] = weight - z * coef * LR
        out = functional_call(build("sequential"), at, (rows["x"],))
        losses.append(float((out.squeeze(1) - rows["y"]).square().mean()))
    # Losses near 1 are off by some 64 roundings; see reference.weight_tolerance.
    assert (losses[0] - losses[1]) / (2 * EPS) == pytest.approx(slope, abs=64 * 2.0**-23 * 8 / EPS)
    for param in optimizer.params:
        assert torch.equal(param.param, expected[param.name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_probes_see_clean_weights_where_they_are_left_out(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_dist.mask._CHUNK", chunk)
    weight = torch.linspace(-1, 1, 630).to(dtype)
    weight[5] = math.nan
    mask = Mask(zo_dist.SmallWeights(share=0.5))
    mask.thresholds = {"w": 0.5}
    plain = Shifts(Noise("gaussian", SEED), 3, EPS)
    shifts = Shifts(plain.noise, 3, EPS, {}, mask)
    small = weight.float().abs() <= 0.5
    assert 0 < int(small.sum()) < 630
    sides = [Probe(1, sign, frozenset({"w"})) for sign in (1.0, -1.0)]
    # In two parts, as shards are.
    for a, b in ((0, 630), (0, 100), (100, 630)):
        shifted, outs = ([torch.empty(b - a, dtype=dtype) for _ in sides] for _ in range(2))
        plain.copies(shifted, weight[a:b], "w", sides, a)
        shifts.copies(outs, weight[a:b], "w", sides, a)
        for out, whole in zip(outs, shifted, strict=True):
            assert torch.equal(integers(out)[~small[a:b]], integers(weight)[a:b][~small[a:b]])
            assert torch.equal(out[small[a:b]], whole[small[a:b]])
    # In place, in a shard.
    clean, span = weight.clone(), zo_dist.params.Span("w", weight[100:], 100)
    with ShardPerturbation(shifts, lambda: None).shifted([span], sides[0]):
        shifts.copies(outs[:1], clean[100:], "w", sides[:1], 100)
        assert torch.equal(integers(weight)[100:], integers(outs[0]))
        assert not torch.equal(integers(weight), integers(clean))
    assert torch.equal(integers(weight), integers(clean))
    # Where rows are looked up.
    matrix, ids = weight.view(30, 21), torch.tensor([[7, 0, 29], [7, 14, 15]])
    monkeypatch.setattr("zo_dist.parts.EAGER_CHUNK", chunk)
    rows = looked_up(shifts, matrix, "w", sides[1], ids)
    whole = torch.empty(630, dtype=dtype)
    shifts.copies([whole], weight, "w", sides[1:], 0)
    assert torch.equal(integers(rows), integers(whole.view(30, 21)[ids]))


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_are_as_without_a_mask(mode: str, rule: str, dtype: torch.dtype) -> None:
    def after(mask: Any) -> str:
        options: dict[str, Any] = {"lr": LR, "eps": EPS, "self_check": False, "perturb": mode}
        optimizer = zo_dist.ZeroOrder(
            build("sequential", dtype), rule=table.RULES[rule](), mask=mask, **options
        )
        step(optimizer, 6)
        return digest(whole_weights(optimizer))

    assert after(zo_dist.SmallWeights(share=1.0)) == after(None) != after(zo_dist.SmallWeights(share=0.9))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("write", table.WRITES, ids=str)
def test_chunks_and_forms_leave_the_same_bits(
    rule: str, write: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dtype": table.dtype_of(write[0]), "rounding": write[1], "rule": rule, "directions": 2}
    expected = digest(whole_weights(run(**options)))
    monkeypatch.setattr("zo_dist.update._CHUNK", 11)
    assert digest(whole_weights(run(**options))) == expected
    assert digest(whole_weights(run(compile=False, **options))) == expected


def test_a_config_names_the_share() -> None:
    path = "configs/sparse_mezo_opt13b_sst2.yaml"
    assert load_config(ROOT / path).optimizer.mask == zo_dist.SmallWeights(share=0.25)
    assert load_config(ROOT / path, ["optimizer.mask=null"]).optimizer.mask is None
    with pytest.raises(ValueError, match=r"optimizer\.mask\.share is 25\.0; it must lie in \(0, 1\]"):
        load_config(ROOT / path, ["optimizer.mask.share=25"])


# What a log and a snapshot rebuild


def nan_in_step(number: int) -> Any:
    calls = iter(range(1000))
    return lambda model, batch: loss_of(model, batch) + (math.nan if next(calls) == number else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_in_the_log_and_in_a_snapshot(tmp_path: Path, dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "sampler": "adalezo", "rule": "momentum", "rounding": "kahan", "lr": 0.05}
    ran, loss = run(0, **options), nan_in_step(3)
    with TrajectoryWriter(tmp_path / "log", identity(ran)) as log:
        for number in range(20):
            step(ran, loss=loss)
            log.append(ran.record)
            if number == 9:
                snapshot = save_snapshot(ran, tmp_path)
    assert ran.skipped == 1
    # Not to be had from the weights as they are at the end.
    for name, threshold in ran.mask.thresholds.items():
        assert by_sorting(whole_weights(ran)[name], SHARE) != threshold
    for start in (None, snapshot):
        again = run(0, **options)
        assert replay(again, tmp_path / "log", snapshot=start) == 20
        assert digest(whole_weights(again)) == digest(whole_weights(ran))
        assert repr(again.state_dict()) == repr(ran.state_dict())
    for optimizer in (ran, again):
        step(optimizer)
    assert digest(whole_weights(again)) == digest(whole_weights(ran))
    with pytest.raises(TrajectoryError, match=r"mask is .*1.0.* here, but was .*0.4"):
        replay(run(0, **{**options, "mask": "all"}), tmp_path / "log")


def test_state_is_taken_up_on_weights_that_were_trained() -> None:
    """An optimizer made on a checkpoint's weights would count others; the state has the thresholds."""
    ran = run(10, lr=0.05)
    other = build("sequential")
    other.load_state_dict(ran.engine.module.state_dict())
    again = table.optimizer(other, lr=0.05, eps=EPS, seed=SEED, self_check=False, mask="small")
    assert again.mask.thresholds != ran.mask.thresholds
    again.load_state_dict(ran.state_dict())
    for optimizer in (ran, again):
        step(optimizer, 3)
    assert digest(whole_weights(again)) == digest(whole_weights(ran))
    with pytest.raises(ValueError, match="thresholds of 4 parameters, this mask has 0"):
        run(0, mask="all").load_state_dict(ran.state_dict())


def resumed_on_rank(engine: str, dtype: torch.dtype, snapshot: str, steps: int) -> str:
    model = wrap(engine, build("sequential", dtype))
    optimizer = table.optimizer(model, lr=0.05, eps=EPS, seed=SEED, mask="small", self_check=False)
    load_snapshot(optimizer, snapshot)
    for _ in range(steps):
        optimizer.step_batch(rows_for("sequential", 4, seed=optimizer.step_count, dtype=dtype), _known)
    return digest(whole_weights(optimizer))


def _known(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss_of(model, batch)
    number = (batch["x"][0, 0].double() * 64).round() / 1024
    # Multiples of 2**-10, whose sums are exact in any order.
    return torch.arange(len(batch["row"])) * number + 1.0


@needs_deepspeed
def test_a_snapshot_goes_on_with_the_same_bits_on_every_engine(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    dtype = torch.bfloat16
    snapshot = str(save_snapshot(run(8, dtype=dtype, lr=0.05), tmp_path))
    expected = resumed_on_rank("replicated", dtype, snapshot, 12)
    for engine, ranks in (("fsdp2", 2), ("fsdp2", 3), ("zero3", 2), ("hsdp_2x2", 4)):
        assert pool(ranks).run(resumed_on_rank, engine, dtype, snapshot, 12) == [expected] * ranks


def test_thin_products_are_not_used_where_weights_are_left_out() -> None:
    """They would shift every weight; the losses are those of shards, which are shifted one by one."""
    losses = losses_by_mode("sequential", noise="lozo", mask="small", eps=2.0**-3)
    # A few dozen roundings in sequence on a loss of this size, as in test_perturb.py.
    tolerance = 64 * 2.0**-23 * float(losses["shard"].max())
    torch.testing.assert_close(losses["module"], losses["shard"], rtol=0, atol=tolerance)
