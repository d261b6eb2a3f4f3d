"""The write: rules with decoupled weight decay, and one rounding to 16 bits."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import table
import torch
from models import build, loss_of, rows_for
from reference import round_to
from torch import Tensor, nn
from torch._dynamo.utils import counters

import zo_dist
from zo_dist import kernels, native, update
from zo_dist.noise import Noise
from zo_dist.params import Param, Span
from zo_dist.rounding import Rounding16
from zo_dist.rules import SGD, Rule
from zo_dist.update import Terms, Write, update_span

HALVES = (torch.bfloat16, torch.float16)


def every_finite_value(dtype: torch.dtype) -> Tensor:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    return values[values.isfinite()]


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def rounded(exact: Tensor, dtype: torch.dtype, step: int = 0) -> Tensor:
    out = torch.empty(exact.shape, dtype=dtype)
    Noise("rademacher", 8).round(out, exact, "w", step, 0)
    return out


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_never_moves_a_value_that_fits(dtype: torch.dtype) -> None:
    values = every_finite_value(dtype).repeat(16)
    assert torch.equal(bits_of(rounded(values.float(), dtype)), bits_of(values))
    # Below fp16's normal numbers, often enough for each to meet the very largest of 16 bits.
    small = torch.arange(-1023, 1024).float().repeat(1024) * 2.0**-24
    if dtype == torch.float16:
        assert torch.equal(rounded(small, dtype).float(), small)


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_gives_a_neighbour(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 12, (1 << 14,), generator=generator)
    exact = torch.randn(1 << 14, generator=generator) * 2.0**exponents
    out = rounded(exact, dtype, step=3)
    # The ends: the least and the largest of 16 random bits.
    below = torch.tensor([round_to(x, 0, dtype) for x in exact.tolist()])
    above = torch.tensor([round_to(x, 0xFFFF, dtype) for x in exact.tolist()])
    assert bool(((out == below) | (out == above)).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.0 + 2.0**-10 / 3, -0.30001, 3e-5 / 7, -1e-6, 2.0**-24 / 5, 1000.1])
def test_the_mean_of_stochastic_rounding_is_the_exact_value(dtype: torch.dtype, value: float) -> None:
    size = 1 << 18
    exact = torch.full((size,), value)
    means = rounded(exact, dtype).double()
    low, high = float(means.min()), float(means.max())
    assert low <= float(exact[0]) <= high
    # The deviation of one is at most half the gap. Neighbours share bits: 8 elements are drawn from
    # one word, which at worst leaves size / 8 independent ones. 2**-13: what the fewest bits resolve.
    bound = 5 * 0.5 / math.sqrt(size / 8) + 2.0**-13
    assert abs(float(means.mean()) - float(exact[0])) <= (high - low) * bound


def span_of(value: float, size: int, dtype: torch.dtype, name: str = "w") -> tuple[Span, Param]:
    weight = nn.Parameter(torch.full((size, 1), value, dtype=dtype))
    return Span(name, weight.detach().view(-1), 0), Param(name, weight, weight.shape, ())


def write(span: Span, param: Param, rounding: Rounding16, step: int, coef: float, lr: float) -> None:
    update_span(span, param, Terms([(0, coef)]), Write(SGD(), rounding, rounding.noise, step, lr))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.5, -0.5, 2.0**-20])
def test_many_tiny_updates_by_stochastic_rounding_move_the_mean(dtype: torch.dtype, value: float) -> None:
    """Steps of 1/50 of the gap between neighbours: their sum must arrive, on average."""
    steps, size = 100, 4096
    gap = max(2.0 ** (math.frexp(value)[1] - (8 if dtype == torch.bfloat16 else 11)), 0.0)
    if dtype == torch.float16:
        gap = max(gap, 2.0**-24)
    noise = Noise("rademacher", 1)
    span, param = span_of(value, size, dtype)
    rounding = Rounding16("stochastic", noise)
    expected = torch.full((size,), value, dtype=torch.float64)
    for step in range(steps):
        write(span, param, rounding, step, 1.0, gap / 50)
        expected -= noise.values("w", step, 0, 0, size).double() * (gap / 50)
    # One rounding has a deviation of at most gap / 2, so the mean of `size` sums of `steps` of them
    # has gap / 2 * sqrt(steps / size), times sqrt(8) as eight elements share a word; the bound is 5
    # of these, and the 13 bits of fp16's draw.
    error = float((span.flat.double() - expected).mean().abs())
    assert error < 5 * gap / 2 * math.sqrt(8 * steps / size) + steps * gap * 2.0**-13


@pytest.mark.parametrize("dtype", HALVES)
def test_kahan_keeps_what_nearest_loses(dtype: torch.dtype) -> None:
    """1000 updates of 1/50 of a gap in one direction: nearest stays, kahan arrives."""
    gap = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)  # below 0.5 ... 1
    noise = Noise("rademacher", 1)
    sign = noise.values("w", 0, 0, 0, 256)
    ends = {}
    for mode in ("nearest", "kahan"):
        span, param = span_of(0.75, 256, dtype)
        rounding = Rounding16(mode, noise)  # type: ignore[arg-type]
        rounding.begin([span])
        for _ in range(1000):  # the same step number: the same z, so the updates add up
            write(span, param, rounding, 0, 1.0, gap / 50)
        lost = rounding.lost["w"].double() if mode == "kahan" else 0.0
        ends[mode] = span.flat.double() + lost
    assert torch.equal(ends["nearest"], torch.full((256,), 0.75).double())
    # What is kept is itself rounded to `dtype` in each step: it is below gap, so its own gap is at
    # most gap * 2**-8, and half of that is lost; in fp16 its gap is at least 2**-24.
    kept_gap = max(gap * 2.0**-8, 2.0**-24 if dtype == torch.float16 else 0.0)
    arrived = 0.75 - sign.double() * 1000 * gap / 50
    assert float((ends["kahan"] - arrived).abs().max()) <= 1000 * kept_gap / 2


@pytest.mark.parametrize(("dtype", "rounding"), table.WRITES)
@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("rule", list(table.RULES))
def test_lr_0_leaves_the_bits(dtype: str, rounding: str, mode: str, rule: str) -> None:
    kind = table.dtype_of(dtype)
    model = build("sequential", kind)
    before = {name: bits_of(p.detach()).clone() for name, p in model.named_parameters()}
    optimizer = table.optimizer(
        model, lr=0.0, eps=0.01, sampler="adalezo", directions=2, perturb=mode, rounding=rounding,
        rule=rule, weight_decay=0.1,
    )  # fmt: skip
    for step in range(6):
        optimizer.step_batch(rows_for("sequential", 3, seed=step, dtype=kind), loss_of)
    assert optimizer.step_count == 6
    for name, param in model.named_parameters():
        assert torch.equal(bits_of(param.detach()), before[name]), name


@pytest.mark.parametrize(("dtype", "rounding"), table.WRITES)
def test_a_write_of_nothing_leaves_every_value(dtype: str, rounding: str) -> None:
    """Not only with lr 0, where nothing is written: an update of exactly 0 goes through the rounding."""
    kind = table.dtype_of(dtype)
    values = every_finite_value(torch.bfloat16 if kind == torch.float32 else kind).to(kind)
    weight = nn.Parameter(values.clone().view(-1, 1))
    span, param = Span("w", weight.detach().view(-1), 0), Param("w", weight, weight.shape, ())
    writes = Rounding16(rounding, Noise())  # type: ignore[arg-type]
    writes.begin([span])
    for step in range(20):
        write(span, param, writes, step, 0.0, 0.1)
    # -0 - (+-0) may be +0; every other value keeps its bits.
    assert torch.equal(span.flat, values)


@pytest.mark.parametrize(("dtype", "rounding"), table.WRITES)
@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("rule", list(table.RULES))
def test_chunks_and_spans_leave_no_trace(
    rule: str, dtype: str, rounding: str, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, size = table.dtype_of(dtype), 1000
    start = torch.linspace(-1, 1, size).to(kind)
    results = []
    for chunk, edges in ((1 << 19, (0, size)), (64, (0, size)), (96, (0, 3, 130, 131, 777, size))):
        monkeypatch.setattr(update, "_CHUNK", chunk)
        flat = start.clone()
        noise = Noise(law, 3)  # type: ignore[arg-type]
        for a, b in itertools.pairwise(edges):
            span, writes = Span("w", flat[a:b], a), Rounding16(rounding, noise)  # type: ignore[arg-type]
            moves = table.RULES[rule](weight_decay=0.01)
            for part in (writes, moves):
                part.begin([span])
            param = Param("w", nn.Parameter(start), torch.Size((size, 1)), ())
            for step in range(4):
                terms = Terms([(0, 0.3), (2, -1.7)], step + 1)
                update_span(span, param, terms, Write(moves, writes, noise, step, 0.05))
        results.append(flat)
    assert not torch.equal(results[0], start)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("law", table.LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_native_and_eager_updates_leave_the_same_bits(rounding: str, dtype: torch.dtype, law: str) -> None:
    updates_agree(("eager", "native"), rounding, dtype, law)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_all_forms_of_an_update_leave_the_same_bits(rounding: str) -> None:
    updates_agree(table.FORMS, rounding, torch.bfloat16, "rademacher")


def updates_agree(forms: tuple[str, ...], rounding: str, dtype: torch.dtype, law: str) -> None:
    """One direction, a group of them, and more; long enough to be compiled, with ends inside tiles."""
    # Vectors do not decay.
    shapes = [(40_001, 1), *[(size,) for size in (1, 7, 576, 1000, 1500, 2000, 3000, 5000, 7000, 20_000)]]
    results = []
    for form in forms:
        left = []
        with table.noise_in(form, law, 3) as noise:
            for shape, start in zip(shapes, [13] + [0] * 10, strict=True):
                # Among them zeros of both signs, which a coefficient of zero leaves as they are.
                flat = torch.linspace(-1, 1, shape[0]).round(decimals=2).to(dtype)
                span, writes = Span("w", flat[start:], start), Rounding16(rounding, noise)  # type: ignore[arg-type]
                writes.begin([span])
                param = Param("w", nn.Parameter(flat), torch.Size(shape), ())
                for step, directions in enumerate((1, 1, 4, 6)):
                    terms = Terms([(d, 0.3 * step - d) for d in range(directions)])
                    update_span(span, param, terms, Write(SGD(0.01), writes, noise, step, 0.05))
                left += [flat, *writes.lost.values()]
        results.append(left)
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(bits_of(one), bits_of(another))


@pytest.mark.slow
def test_a_run_compiles_before_its_first_step_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of directions draws an arm: one, a few, a group or more."""
    monkeypatch.setattr(native, "library", lambda: None)
    torch._dynamo.reset()
    kernels.compiled.cache_clear()
    model = nn.Sequential(*[nn.Linear(160, 160) for _ in range(4)]).bfloat16()
    optimizer = zo_dist.ZeroOrder(
        model,
        lr=1e-3,
        directions=6,
        sampler=zo_dist.Uniform(sparsity=0.5),
        rule=SGD(weight_decay=0.1),  # of matrices, not of vectors
        self_check=False,
        compile=True,
    )
    rows = {"x": torch.ones(6, 160, dtype=torch.bfloat16)}

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(batch["x"]).float().square().mean(1)

    optimizer.prepare(rows, loss)
    graphs = counters["stats"]["unique_graphs"]
    shared = set()
    for _ in range(6):
        optimizer.step_batch(rows, loss)
        shared |= {sum(arm in arms for arms in optimizer.record.arms) for arm in range(4)}
    assert {1, 2, 3, 4, 5} <= shared
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_weight_decay_touches_matrices_alone() -> None:
    model = build("sequential")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = zo_dist.ZeroOrder(model, lr=0.5, rule=SGD(weight_decay=0.5), self_check=False)
    optimizer.step(lambda: torch.tensor(1.0) + 0 * model(torch.ones(1, 3)).sum())  # both sides equal
    for name, param in model.named_parameters():
        factor = 0.75 if param.ndim > 1 else 1.0
        assert torch.equal(param.detach(), before[name] * factor), name


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_bad_weight_decay_is_refused(weight_decay: float) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        SGD(weight_decay)


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="stochastic, kahan, nearest"):
        Rounding16("up", Noise())  # type: ignore[arg-type]


# Rules


def estimates_of(steps: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, size, generator=generator) * 2.0


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("sgd", partial(torch.optim.SGD, lr=0.01)),
        ("momentum", partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
        ("adam", partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.95), eps=1e-6)),
        ("amsgrad", partial(torch.optim.Adam, lr=0.01, betas=(0.8, 0.95), eps=1e-6, amsgrad=True)),
    ],
)
def test_a_rule_moves_as_the_optimizer_of_torch_does(rule: str, theirs: Any) -> None:
    steps, size = 30, 500
    ours, weight = table.RULES[rule](), torch.zeros(size)
    ours.begin([Span("w", weight, 0)])
    param = nn.Parameter(torch.zeros(size))
    optimizer = theirs([param])
    for i, estimate in enumerate(estimates_of(steps, size)):
        weight -= 0.01 * ours.move(estimate.clone(), [ours.kept[key]["w"] for key in ours.keeps], i + 1)
        param.grad = estimate.clone()
        optimizer.step()
    # A handful of roundings per step in moves of at most some 25 (momentum): 8 ulp of the path's length.
    path = 0.01 * steps * (25.0 if rule == "momentum" else 8.0)
    torch.testing.assert_close(weight, param.detach(), rtol=0, atol=8 * 2.0**-23 * path)
    assert float(weight.abs().max()) > 0.1


def test_the_second_moment_of_the_momentum_is_the_smaller() -> None:
    """For estimates that are noise, moves of R-AdaZO are longer: its second moment is of an average."""
    lengths = {}
    for name in ("adam", "adam_of_momentum"):
        rule = table.RULES[name]()
        rule.begin([Span("w", torch.zeros(500), 0)])
        moves = [
            rule.move(e, [rule.kept[key]["w"] for key in rule.keeps], i + 1)
            for i, e in enumerate(estimates_of(60, 500))
        ]
        lengths[name] = float(moves[-1].square().mean().sqrt())
    # An average of (1 - beta) / (1 + beta) = 1/9 of the variance: 3 times, when v has settled.
    assert lengths["adam_of_momentum"] == pytest.approx(3.0 * lengths["adam"], rel=0.15)


def model_after(**options: Any) -> list[Tensor]:
    model = build("sequential")
    optimizer = table.optimizer(model, lr=0.01, eps=0.01, directions=3, self_check=False, **options)
    for step in range(8):
        optimizer.step_batch(rows_for("sequential", 6, seed=step), loss_of)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("rule", "limit"),
    [
        (zo_dist.Momentum(0.0, 0.1), zo_dist.SGD(0.1)),
        (zo_dist.Adam(0.0, 0.0, 0.0, weight_decay=0.1), zo_dist.Sign(0.1)),
        (zo_dist.Adam(0.0, second="momentum"), zo_dist.Adam(0.0)),
    ],
)
@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
def test_rules_become_simpler_ones_at_their_limits(rule: Any, limit: Any, sampler: str) -> None:
    pairs = zip(
        model_after(rule=rule, sampler=sampler), model_after(rule=limit, sampler=sampler), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [name for name in table.RULES if name not in ("sgd", "sign")])
def test_what_a_rule_keeps_of_undrawn_weights_stays(name: str) -> None:
    optimizer = table.optimizer(
        build("sequential"), sampler="uniform", rule=name, lr=0.01, eps=0.01, self_check=False
    )
    seen = set()
    for step in range(6):
        before = {k: {n: t.clone() for n, t in of.items()} for k, of in optimizer.rule.kept.items()}
        writes = list(optimizer.writes)
        optimizer.step_batch(rows_for("sequential", 6, seed=step), loss_of)
        (drawn,) = optimizer.record.arms
        for i, arm in enumerate(optimizer.arms):
            assert optimizer.writes[i] == writes[i] + (i in drawn)
            for key, of in optimizer.rule.kept.items():
                for param in arm.params:
                    changed = not torch.equal(of[param.name], before[key][param.name])
                    assert changed <= (i in drawn)
                    seen.add((changed, i in drawn))
    assert seen >= {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zo_dist.Momentum(1.0), r"beta is 1\.0"),
        (lambda: zo_dist.Adam(beta1=-0.1), r"beta1 is -0\.1"),
        (lambda: zo_dist.Adam(beta2=math.nan), "beta2 is nan"),
        (lambda: zo_dist.Adam(eps=-1.0), r"eps is -1\.0"),
        (lambda: zo_dist.Adam(second="first"), "use one of estimate, momentum"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_without_a_move_says_so() -> None:
    with pytest.raises(TypeError, match="override move"):
        Rule().move(torch.zeros(1), [], 1)


@pytest.mark.parametrize("rule", list(table.RULES))
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_state_goes_on_where_it_was_saved(rule: str, rounding: str) -> None:
    def make() -> zo_dist.ZeroOrder:
        return table.optimizer(
            build("sequential", torch.bfloat16), rule=rule, rounding=rounding, sampler="adalezo",
            coefficients="rms", lr=0.01, eps=0.01, self_check=False,
        )  # fmt: skip

    def step(optimizer: zo_dist.ZeroOrder, number: int) -> None:
        optimizer.step_batch(rows_for("sequential", 6, seed=number, dtype=torch.bfloat16), loss_of)

    whole, again = make(), make()
    for number in range(4):
        step(whole, number)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    for mine, theirs in zip(again.params, whole.params, strict=True):
        mine.param.data.copy_(theirs.param.data)
    for number in range(4, 8):
        step(whole, number)
        step(again, number)
    for mine, theirs in zip(again.params, whole.params, strict=True):
        assert torch.equal(mine.param, theirs.param)
    assert repr(again.state_dict()) == repr(whole.state_dict())


def test_state_of_another_rule_is_refused() -> None:
    saved = table.optimizer(build("sequential"), rule="momentum").state_dict()
    with pytest.raises(ValueError, match="of another rule"):
        table.optimizer(build("sequential"), rule="adam").load_state_dict(saved)


def test_a_decay_that_float32_cannot_see_is_told(caplog: pytest.LogCaptureFixture) -> None:
    zo_dist.ZeroOrder(build("sequential"), lr=1e-6, rule=zo_dist.SGD(weight_decay=0.1))
    assert "weight_decay" not in caplog.text
    zo_dist.ZeroOrder(build("sequential"), lr=1e-6, rule=zo_dist.SGD(weight_decay=0.01))
    assert "weight_decay 0.01 does nothing at lr 1e-06" in caplog.text
