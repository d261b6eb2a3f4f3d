"""How far each parameter is perturbed: in the probe and the write alike, learnt or from slopes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for
from safetensors.torch import load_file
from tiny_run import launch, result_of, write_config
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaForCausalLM
from workers import Pool, digest, needs_deepspeed, whole_weights, wrap

import zo_dist
from zo_dist.cli import main
from zo_dist.engines import select
from zo_dist.learn_scale import Learning, learn_scale, new_nets
from zo_dist.noise import Noise
from zo_dist.params import trainable_params
from zo_dist.scale import ScaleNets, energies, inputs_of, normaliser, save_nets

EPS, LR, SEED = 2.0**-6, 2.0**-7, 4


def nets_for(path: Path, nets: ScaleNets | None = None, kind: str = "sequential") -> Path:
    """A scale for the model of that kind: nets as they begin, unless others are given."""
    model = build(kind)
    params = trainable_params(model, lambda p: p.shape)
    # Learning begins from these, with every block another factor.
    save_nets(path, nets or new_nets(len(params), seed=1), params, 240, {"model": "a test"})
    return path


def constant(value: float) -> ScaleNets:
    nets = new_nets(len(list(build("sequential").parameters())), seed=0)
    with torch.no_grad():
        nets.out.zero_()
        nets.out_bias.fill_(value)
    return nets


def run(steps: int = 6, **options: Any) -> zo_dist.ZeroOrder:
    options = {"lr": LR, "eps": EPS, "seed": SEED, "self_check": False, "directions": 2, **options}
    optimizer = table.optimizer(build("sequential", options.pop("dtype", torch.float32)), **options)
    dtype = optimizer.params[0].param.dtype
    for step in range(steps):
        optimizer.step_batch(rows_for("sequential", 6, seed=step, dtype=dtype), loss_of)
    return optimizer


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
def test_equal_factors_leave_the_bits(tmp_path: Path, mode: str, sampler: str) -> None:
    scale = zo_dist.LearnedScale(nets_for(tmp_path / "scale", constant(-3.0)))
    plain = digest(whole_weights(run(perturb=mode, sampler=sampler)))
    assert digest(whole_weights(run(perturb=mode, sampler=sampler, scale=scale))) == plain


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("sampler", ["dense", "adalezo"])
@torch.no_grad()
def test_probe_and_write_have_the_same_factor(tmp_path: Path, mode: str, sampler: str) -> None:
    """Against weights of the model as a forward sees them, and against the write by hand."""
    scale = zo_dist.LearnedScale(nets_for(tmp_path / "scale"))
    optimizer = run(0, perturb=mode, sampler=sampler, scale=scale, directions=1)
    weights = {p.name: p.param.detach().clone() for p in optimizer.params}
    optimizer.step_batch(rows_for("sequential", 4), loss_of)
    factors, (slope,), (arms,) = optimizer.factors, optimizer.record.slopes, optimizer.record.arms
    assert len({round(f, 4) for f in factors.values()}) > 3
    coefs = {
        p.name: coef
        for arm, coef in zip(arms, optimizer.record.scales[0], strict=True)
        for p in optimizer.arms[arm].params
    }
    expected, losses = dict(weights), []
    for sign in (1.0, -1.0):
        at = dict(weights)
        for name, coef in coefs.items():
            weight = weights[name]
            z = Noise("rademacher", SEED).values(name, 0, 0, 0, weight.numel()).view_as(weight)
            at[name] = weight + z * (sign * EPS * factors[name])
            expected[name] = weight - z * (coef * factors[name]) * LR
        losses.append(float(loss_at(at, rows_for("sequential", 4))))
    # Losses near 1 are off by some 64 roundings; see reference.weight_tolerance.
    assert (losses[0] - losses[1]) / (2 * EPS) == pytest.approx(slope, abs=64 * 2.0**-23 * 8 / EPS)
    for param in optimizer.params:
        # Products of three numbers, rounded in another order: two roundings of the move.
        torch.testing.assert_close(param.param, expected[param.name], rtol=2.0**-22, atol=2.0**-22)


def loss_at(weights: dict[str, Tensor], rows: dict[str, Tensor]) -> Tensor:
    out = functional_call(build("sequential"), weights, (rows["x"],))
    return (out.squeeze(1) - rows["y"]).square().mean()


@pytest.mark.parametrize("name", ["running", "learned"])
def test_the_mean_square_of_factors_is_1(tmp_path: Path, name: str) -> None:
    optimizer = run(8, sampler="uniform", scale=made(name, tmp_path))
    factors = optimizer.factors
    total = sum(p.numel for p in optimizer.params)
    # Each is cut to 12 bits.
    assert sum(p.numel * factors[p.name] ** 2 for p in optimizer.params) == pytest.approx(total, rel=2.0**-11)
    assert len(set(factors.values())) > 3


def made(name: str, folder: Path) -> Any:
    if name == "learned":
        path = folder / "scale"
        return zo_dist.LearnedScale(path if path.exists() else nets_for(path))
    return zo_dist.RunningScale(alpha=0.5)


def test_learned_factors_are_those_of_the_formula(tmp_path: Path) -> None:
    """ZO Fine-tuner's, block by block in plain numbers: from the file of the nets, weights and losses."""
    path = nets_for(tmp_path / "scale")
    optimizer = run(0, scale=zo_dist.LearnedScale(path))
    nets = load_file(path)
    sigmas, losses = [1.0] * len(optimizer.params), [0.0, 0.0]
    for step in range(6):
        found, counts = [], []
        for block, param in enumerate(optimizer.params):
            weight = param.param.detach().double()
            mean, variance = float(weight.mean()), float(weight.var(correction=0))
            seen = torch.tensor([mean, variance, *losses, sigmas[block]], dtype=torch.float64)
            hidden = torch.tanh(nets["hidden"][block] @ seen + nets["hidden_bias"][block])
            found.append(abs(float(nets["out"][block] @ hidden + nets["out_bias"][block])))
            counts.append(weight.numel())
        common = (sum(counts) / sum(n * s * s for n, s in zip(counts, found, strict=True))) ** 0.5
        optimizer.step_batch(rows_for("sequential", 6, seed=step), loss_of)
        for param, sigma in zip(optimizer.params, found, strict=True):
            # Cut to 12 bits twice, and means and variances to 2**-24 and 2**-32.
            assert optimizer.factors[param.name] == pytest.approx(sigma * common, rel=2.0**-10)
        sigmas, losses = found, list(optimizer.record.losses)
    assert len(set(sigmas)) == len(sigmas)


def test_running_factors_follow_the_slopes_of_their_arms(tmp_path: Path) -> None:
    optimizer = run(0, sampler="uniform", scale=zo_dist.RunningScale(alpha=0.5, limit=2.0))
    assert optimizer.factors == {}
    squares: dict[int, float] = {}
    sizes = [arm.numel for arm in optimizer.arms]
    for step in range(8):
        optimizer.step_batch(rows_for("sequential", 6, seed=step), loss_of)
        used = [optimizer.factors.get(arm.params[0].name, 1.0) for arm in optimizer.arms]
        for arms, slope in zip(optimizer.record.arms, optimizer.record.slopes, strict=True):
            # As if the drawn weights' factors had a mean square of 1.
            mean_square = sum(sizes[a] * used[a] ** 2 for a in arms) / sum(sizes[a] for a in arms)
            found = slope**2 / mean_square
            for arm in arms:
                squares[arm] = 0.5 * squares.get(arm, found) + 0.5 * found
    mean = sum(squares.values()) / len(squares)
    roots = [min(max(math.sqrt(squares[a] / mean), 0.5), 2.0) for a in range(len(optimizer.arms))]
    factors = optimizer.scale.factors(optimizer.engine)
    first = optimizer.arms[0].params[0].name
    for arm, root in zip(optimizer.arms, roots, strict=True):
        for param in arm.params:
            assert factors[param.name] / factors[first] == pytest.approx(root / roots[0], rel=2.0**-10)


def test_running_factors_of_equal_arms_stay_together() -> None:
    """A slope has the factor in it: taken as it is, the arm that begins ahead would run away."""

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 1, bias=False) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(x).squeeze(1) for layer in self.layers]).sum(0)

    torch.manual_seed(0)
    model, x = Even(), torch.randn(1, 64).expand(8, 64)
    options: dict[str, Any] = {"directions": 8, "lr": 0.0, "self_check": False, "perturb": "shard"}
    scale, sampler = zo_dist.RunningScale(), zo_dist.Uniform(sparsity=0.875)
    optimizer = zo_dist.ZeroOrder(model, scale=scale, sampler=sampler, **options)
    for _ in range(400):
        optimizer.step_batch({"x": x}, lambda m, batch: m(batch["x"]))
    found = list(optimizer.scale.factors(optimizer.engine).values())
    # Squares of z.g scatter by sqrt(2) of their mean; averaged over some 2 / alpha = 40 of them by .22, so
    # that roots scatter by .11, and the eight of them are seldom 1.6 apart. With the faulty recursion: 6.6.
    assert max(found) / min(found) < 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["running", "learned"])
def test_a_scale_is_in_the_log_and_in_the_state(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from zo_dist.replay import identity, replay
    from zo_dist.trajectory import TrajectoryWriter

    options = {"dtype": dtype, "sampler": "adalezo", "rule": "momentum"}
    ran = run(0, scale=made(name, tmp_path), **options)
    calls = iter(range(1000))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(model, batch) + (math.nan if next(calls) == 3 else 0.0)

    def step(optimizer: zo_dist.ZeroOrder, number: int, loss: Any = loss_of) -> None:
        optimizer.step_batch(rows_for("sequential", 6, seed=number, dtype=dtype), loss)

    with TrajectoryWriter(tmp_path / "log", identity(ran)) as log:
        for number in range(10):
            step(ran, number, loss)
            log.append(ran.record)
    assert ran.skipped == 1
    again = run(0, scale=made(name, tmp_path), **options)
    replay(again, tmp_path / "log")
    assert digest(whole_weights(again)) == digest(whole_weights(ran))
    assert repr(again.state_dict()) == repr(ran.state_dict())
    for optimizer in (ran, again):
        step(optimizer, 10)
    assert digest(whole_weights(again)) == digest(whole_weights(ran))
    with pytest.raises(ValueError, match="scale is"):
        replay(run(0, **options), tmp_path / "log")


def on_rank(engine: str, path: str, name: str, dtype: torch.dtype) -> tuple[str, list[float]]:
    model = wrap(engine, build("sequential", dtype))
    scale = zo_dist.LearnedScale(path) if name == "learned" else zo_dist.RunningScale(0.5)
    optimizer = table.optimizer(
        model, lr=LR, eps=EPS, seed=SEED, sampler="uniform", scale=scale, self_check=False
    )
    for step in range(20):
        # Known numbers: a test of sums over shards, not of the order in which a forward adds.
        optimizer.step_batch(rows_for("sequential", 4, seed=step, dtype=dtype), _known)
    return digest(whole_weights(optimizer)), list(optimizer.factors.values())


def _known(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss_of(model, batch)
    # Another in each step, and multiples of 2**-10, whose sums are exact in any order.
    number = (batch["x"][0, 0].double() * 64).round() / 1024
    return torch.arange(len(batch["row"])) * number + 1.0


@pytest.mark.parametrize("name", ["running", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_weights_are_the_same_bits_on_every_engine(
    pool: Callable[[int], Pool], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    path = str(nets_for(tmp_path / "scale"))
    expected = on_rank("replicated", path, name, dtype)
    assert len(set(expected[1])) > 3
    for engine, ranks in (("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp_2x2", 4)):
        assert pool(ranks).run(on_rank, engine, path, name, dtype) == [expected] * ranks


@needs_deepspeed
@pytest.mark.parametrize("name", ["running", "learned"])
@pytest.mark.parametrize(("engine", "ranks"), [("zero0", 2), ("zero3", 2), ("zero3", 3)])
def test_factors_and_weights_are_the_same_bits_on_deepspeed(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str, ranks: int, name: str
) -> None:
    path = str(nets_for(tmp_path / "scale"))
    expected = on_rank("replicated", path, name, torch.bfloat16)
    assert pool(ranks).run(on_rank, engine, path, name, torch.bfloat16) == [expected] * ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["native", "eager"])
def test_moments_are_those_of_the_weights(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(777, 50, dtype=dtype)
    with torch.no_grad():
        model.weight.normal_(0.3, 0.7)
        model.weight[0, 0] = -40.0  # counts as -32
    if form == "eager":
        monkeypatch.setattr("zo_dist.native.library", lambda: None)
    engine = select(model)
    (mean, variance), _ = engine.moments(trainable_params(model, lambda p: p.shape)).values()
    exact = model.weight.detach().double().clamp(-32, 32)
    # Each element is rounded to 2**-24, each square to 2**-32; the mean is that of 38,850.
    assert mean == pytest.approx(float(exact.mean()), abs=2.0**-25)
    assert variance == pytest.approx(float(exact.var(correction=0)), abs=2.0**-23)


# Learning


def test_the_nets_get_the_gradient_of_the_loss_after_the_step() -> None:
    """Against autograd through a model whose weights are a function of the nets."""
    model = build("sequential")
    params = trainable_params(model, lambda p: p.shape)
    rows = rows_for("sequential", 6)
    learning = Learning(epochs=1, restart=1, lr_nets=1.0, lr_step=0.02, lr_model=0.0, tokens=1)
    before = new_nets(len(params), seed=3)
    after = learn_scale(select(model), params, lambda step: rows, 1, loss_of, learning, eps=EPS, seed=3)

    counts = energies(params, 1)
    weights = {p.name: p.param.detach().clone() for p in params}
    moments = [(float(w.double().mean()), float(w.double().var(correction=0))) for w in weights.values()]
    sigmas = before(inputs_of(moments, [0.0, 0.0], [1.0] * len(params)))
    common = normaliser(sigmas.detach(), torch.tensor(list(counts.values()), dtype=torch.float64))
    noise = Noise("rademacher", 3)
    z = {p.name: noise.values(p.name, 0, 0, 0, p.numel).view(p.shape) for p in params}
    factors = dict(zip(weights, (sigmas * common).float(), strict=True))

    def at(size: Any) -> Tensor:
        return loss_at({name: w + size * factors[name] * z[name] for name, w in weights.items()}, rows)

    with torch.no_grad():
        slope = (at(EPS) - at(-EPS)) / (2 * EPS)
    at(-0.02 * slope).backward()
    moved = 0.0
    for was, now in zip(before.parameters(), after.parameters(), strict=True):
        assert was.grad is not None
        # Two losses in float32 make a slope good to some 64 roundings over eps.
        error = 64 * 2.0**-23 * 8 / EPS
        torch.testing.assert_close(was - now, was.grad, rtol=error, atol=1e-3 * error)
        moved = max(moved, float((was - now).detach().abs().max()))
    assert moved > 1e-3
    # The model is as it was.
    for param in params:
        assert torch.equal(param.param, weights[param.name])


def test_learning_lowers_the_loss_after_a_step() -> None:
    model = build("sequential")
    params = trainable_params(model, lambda p: p.shape)
    batches = [rows_for("sequential", 8, seed=seed) for seed in range(8)]
    learning = Learning(epochs=20, restart=20, lr_nets=0.6, lr_step=0.003, lr_model=0.0, tokens=1)
    nets = learn_scale(select(model), params, lambda step: batches[step % 8], 8, loss_of, learning, eps=EPS)
    counts = torch.tensor(list(energies(params, 1).values()), dtype=torch.float64)

    def mean_after_a_step(of: ScaleNets) -> float:
        """Over many directions that were not seen, from the first step's inputs."""
        engine, noise, total = select(model), Noise("rademacher", 99), 0.0
        moments = engine.moments(params)
        sigmas = of(inputs_of([moments[p.name] for p in params], [1.0, 1.0], [1.0] * len(params)))
        factors = (sigmas * normaliser(sigmas, counts)).tolist()
        for step in range(200):
            z = {p.name: noise.values(p.name, step, 0, 0, p.numel).view(p.shape) for p in params}

            def at(size: float, z: dict[str, Tensor] = z, rows: Any = batches[step % 8]) -> float:
                pairs = zip(params, factors, strict=True)
                return float(loss_at({p.name: p.param + size * f * z[p.name] for p, f in pairs}, rows))

            total += at(-0.003 * (at(EPS) - at(-EPS)) / (2 * EPS))
        return total / 200

    with torch.no_grad():
        assert mean_after_a_step(nets) < mean_after_a_step(new_nets(len(params), seed=0)) - 0.001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo_dist.RunningScale(alpha=0.0), r"alpha is 0\.0"),
        (lambda: zo_dist.RunningScale(limit=0.5), r"limit is 0\.5"),
        (lambda: with_scale("no such file"), "cannot be read"),
        (lambda: with_scale(__file__), "not what zo-dist learn-scale writes"),
        (lambda: Learning(epochs=0), "epochs is 0"),
        (lambda: Learning(lr_nets=math.nan), "lr_nets is nan"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def with_scale(path: str) -> zo_dist.ZeroOrder:
    return zo_dist.ZeroOrder(nn.Linear(2, 2), scale=zo_dist.LearnedScale(path))


def test_a_scale_of_another_model_is_refused(tmp_path: Path) -> None:
    path = nets_for(tmp_path / "scale", kind="opt")
    with pytest.raises(ValueError, match="learnt for other parameters: it lacks 9 of 9"):
        table.optimizer(build("sequential"), scale=zo_dist.LearnedScale(path))


def test_a_part_of_the_parameters_uses_a_part_of_the_scale(tmp_path: Path) -> None:
    model = build("sequential")
    path = nets_for(tmp_path / "scale")
    next(iter(model.parameters())).requires_grad_(False)
    optimizer = table.optimizer(model, scale=zo_dist.LearnedScale(path), self_check=False)
    optimizer.step_batch(rows_for("sequential", 6), loss_of)
    assert set(optimizer.factors) == {p.name for p in optimizer.params} != set()


def test_a_scale_is_learnt_in_float32_alone() -> None:
    model = build("sequential", torch.bfloat16)
    params = trainable_params(model, lambda p: p.shape)
    with pytest.raises(ValueError, match="float32"):
        learn_scale(select(model), params, lambda step: {}, 1, loss_of, Learning())


def test_the_command_learns_a_scale_that_runs_train_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Learnt by one process, used by two with sharded weights, and by a resume."""
    scale = tmp_path / "made" / "scale.safetensors"
    config = write_config(tmp_path, model={"dtype": "bfloat16"})
    assert main(["learn-scale", str(config), "--to", str(scale), "--epochs", "1", "--restart", "1"]) == 0
    result = result_of(capsys.readouterr().out)
    assert result["scale"] == str(scale)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert result["blocks"] == len(list(model.parameters()))
    use = "optimizer.scale={name: learned, path: %s}"
    trained = launch(["train", str(config), use % scale, "engine.kind=fsdp2"])
    assert trained.returncode == 0, trained.stderr
    # Moved, it is the same scale; another in its place is not.
    moved = scale.rename(tmp_path / "elsewhere")
    assert main(["train", str(config), use % moved, "train.steps=5"]) == 0
    assert result_of(capsys.readouterr().out)["steps"] == 5
    params = trainable_params(model, lambda p: p.shape)
    save_nets(scale, new_nets(len(params), seed=9), params, 240, {})
    assert main(["train", str(config), use % scale, "train.steps=6"]) == 2
    assert "scale is" in capsys.readouterr().err


def test_a_scale_is_learnt_by_one_process(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    refused = launch(["learn-scale", str(config), "--to", str(tmp_path / "scale")])
    assert refused.returncode != 0
    assert "one process that holds the model, not by 2" in refused.stderr
