"""ZeroOrder against the slow reference, step by step, on one process."""

from __future__ import annotations

from typing import Any

import pytest
import table
import torch
from injected import Injected, remembered_noise
from models import KINDS, build, loss_of, rows_for
from reference import Reference, weight_tolerance
from torch import nn

STEPS, ROWS, LR, EPS = 20, 8, 2.0**-8, 2.0**-6

LAYER_PREFIXES = {
    "llama": ("model.layers.0.", "model.layers.1."),
    "llama_tied": ("model.layers.0.", "model.layers.1."),
    "qwen3": ("model.layers.0.", "model.layers.1."),
    "mixtral": ("model.layers.0.", "model.layers.1."),
    "qwen3_moe": ("model.layers.0.", "model.layers.1."),
    "deepseek": ("model.layers.0.", "model.layers.1."),
    "opt": ("model.decoder.layers.0.", "model.decoder.layers.1."),
    "gpt2": ("transformer.h.0.", "transformer.h.1."),
    "sequential": ("0.", "2.", "3.", "4.", "5."),
}


def arms_of(kind: str, model: nn.Module) -> list[list[str]]:
    """Embeddings, each layer, the rest, by name. No arm of these tiny models is nearly empty."""
    names = [name for name, _ in model.named_parameters()]
    layers = [[n for n in names if n.startswith(prefix)] for prefix in LAYER_PREFIXES[kind]]
    others = [n for n in names if not any(n in layer for layer in layers)]
    embeddings = [n for n in others if "embed" in n or ".wte" in n or ".wpe" in n]
    rest = [n for n in others if n not in embeddings]
    return [arm for arm in (embeddings, *layers, rest) if arm]


def both(
    kind: str,
    sampler: str,
    directions: int,
    dtype: torch.dtype = torch.float32,
    per_row: int = 1,
    **options: Any,
) -> Any:
    """The reference, and ZeroOrder in each perturb mode."""
    method, own = table.REFERENCE[sampler]
    shared = {"lr": LR, "eps": EPS, "directions": directions, "seed": 3}
    options["directions_per_row"] = per_row
    model = build(kind, dtype)
    law, estimator = options.get("noise", "rademacher"), options.get("estimator", "two_sided")
    rounding = options.get("rounding", "stochastic")
    more = {"options": own, "law": law, "rounding": rounding, "estimator": estimator, "per_row": per_row}
    reference = Reference(model, arms_of(kind, model), method, **shared, **more)
    tested = {
        mode: table.optimizer(build(kind, dtype), **shared, sampler=sampler, perturb=mode, **options)
        for mode in table.MODES
    }
    return reference, tested


def weights_of(optimizer: Any) -> dict[str, torch.Tensor]:
    return {p.name: p.param.detach() for p in optimizer.params}


def expect_close(tested: Any, reference: Reference, tolerance: float, where: str) -> None:
    for name, weight in reference.weights().items():
        error = float((weights_of(tested)[name].float() - weight.float()).abs().max())
        assert error <= tolerance, f"{where}: {name} is off by {error}, tolerance {tolerance}"


# AdaLeZO learns from slopes. An error of e in each slope moves scores q / max q by at most 2 e / max q,
# the logarithm of a probability by 2 / tau of that, and so one step's update by
# lr |g| w (4 / tau) (e / max q): after the first step |g| / max q is at most 1 / alpha = 10, which with
# tau = 0.6 makes 67 times the error that the slope itself brings. (A draw at the very edge of a
# probability would differ by a whole arm; at fixed seeds none does.)
# With weights in both, half of that comes by the probe.
# FittedAdaLeZO: an error of e moves the square of a slope, 3 sqrt(m) at most, by 6 e sqrt(m), m being its
# mean. An arm that was drawn has some half of that, so its v is moved by 12 e / sqrt(m) of the mean v, and as
# no v is below 0.1 of that, the logarithm of a weight by 60 e / sqrt(m), times a slope of 3 sqrt(m).
GAIN = {"dense": 1.0, "uniform": 1.0, "adalezo": 70.0, "adalezo_both": 70.0, "fitted_adalezo": 250.0}


# All samplers with all numbers of directions, of a step and of a row, on two kinds; on the others each
# sampler once, and on two of the slowest but one.
CASES = [
    (kind, sampler, *directions)
    for kind in KINDS
    for i, sampler in enumerate(table.SAMPLERS)
    for j, directions in enumerate(((1, 1), (3, 1), (8, 1), (6, 3)))
    if kind in ("llama", "sequential") or i % 4 == j
    if kind not in ("qwen3_moe", "deepseek") or sampler == "uniform"
]


@pytest.mark.parametrize(("kind", "sampler", "directions", "per_row"), CASES)
def test_each_step_is_that_of_the_reference(kind: str, sampler: str, directions: int, per_row: int) -> None:
    reference, tested = both(kind, sampler, directions, per_row=per_row)
    start = {name: w.clone() for name, w in reference.weights().items()}
    highest = 0.0
    with remembered_noise():
        for step in range(STEPS):
            batch = rows_for(kind, ROWS, seed=step)
            expected = reference.step(batch, loss_of)
            highest = max(highest, expected)
            tolerance = weight_tolerance(step + 1, LR, EPS, highest, gain=GAIN[sampler])
            for mode, optimizer in tested.items():
                mean = optimizer.step_batch(batch, loss_of)
                # The mean over all probes: the loss's own error, and that of weights seen before.
                assert mean == pytest.approx(expected, rel=1e-4), (mode, step)
                expect_close(optimizer, reference, tolerance, f"{mode} step {step}")
                assert optimizer.step_count == reference.step_number
    moved = max(float((w - start[name]).abs().max()) for name, w in reference.weights().items())
    assert moved > 10 * tolerance / GAIN[sampler]


@pytest.mark.parametrize(
    ("directions", "estimator"), [(1, "two_sided"), (3, "two_sided"), (8, "two_sided"), (1, "three_sided")]
)
def test_dense_steps_of_one_row_per_direction_have_the_bits_of_the_reference(
    directions: int, estimator: str
) -> None:
    """Each owner then multiplies the same shapes as in the reference, and nothing else is a product.

    Unshifted sides of several directions are one product.
    """
    reference, tested = both("sequential", "dense", directions, estimator=estimator)
    with remembered_noise():
        for step in range(STEPS):
            batch = rows_for("sequential", directions, seed=step)
            reference.step(batch, loss_of)
            for optimizer in tested.values():
                optimizer.step_batch(batch, loss_of)
    for optimizer in tested.values():
        for name, weight in weights_of(optimizer).items():
            assert torch.equal(weight, reference.weights()[name]), name


# Each pair of values of different columns is in one of the runs.
GIVEN = table.all_pairs(
    table.WRITES,
    tuple(table.NOISES),
    tuple(table.SAMPLERS),
    table.GROUPED,
    tuple(table.ESTIMATORS),
)


@pytest.mark.parametrize("row", GIVEN, ids=str)
def test_given_losses_leave_the_bits_of_the_reference(row: tuple[Any, ...]) -> None:
    (dtype, rounding), law, sampler, (directions, per_row), estimator = row
    kind, estimator = table.dtype_of(dtype), table.estimator_for(sampler, estimator)
    options = {"noise": law, "rounding": rounding, "estimator": estimator, "self_check": False}
    reference, tested = both("sequential", sampler, directions, kind, per_row, **options)
    known = {"estimator": estimator, "per_row": per_row}
    losses = {mode: Injected(mode, directions, **known) for mode in (*tested, "reference")}
    batch = rows_for("sequential", ROWS, dtype=kind)
    with remembered_noise():
        for _ in range(STEPS):
            reference.step(batch, losses["reference"])
            for mode, optimizer in tested.items():
                optimizer.step_batch(batch, losses[mode])
    for mode, optimizer in tested.items():
        for name, weight in weights_of(optimizer).items():
            assert torch.equal(weight, reference.weights()[name]), (mode, name)


@pytest.mark.parametrize("estimator", list(table.ESTIMATORS))
def test_a_row_runs_once_per_shifted_side_and_once_unshifted(estimator: str) -> None:
    _, tested = both("llama", "dense", 6, per_row=3, estimator=estimator, self_check=False)
    signs = table.ESTIMATORS[estimator].signs
    of_a_row = 3 * sum(map(bool, signs)) + (0.0 in signs)
    for mode, optimizer in tested.items():
        rows: list[int] = []

        def counted(model: Any, batch: Any, rows: list[int] = rows) -> Any:
            rows.append(len(batch["input_ids"]))
            return loss_of(model, batch)

        optimizer.step_batch(rows_for("llama", ROWS), counted)
        assert sum(rows) == ROWS * of_a_row
        assert len(rows) == (1 if mode == "module" else 2 * of_a_row)


@pytest.mark.parametrize("mode", table.MODES)
def test_rows_that_test_all_directions_make_the_step_of_a_closure(mode: str) -> None:
    optimizers = [both("llama", "adalezo", 3, per_row=n)[1][mode] for n in (1, 3)]
    for step in range(3):
        batch = rows_for("llama", ROWS, seed=step)
        closed, stacked = optimizers
        model = closed.engine.module

        def closure(batch: Any = batch, model: Any = model) -> Any:
            sums, weights = loss_of(model, batch)
            return sums.sum(), weights.sum()

        assert closed.step(closure) == pytest.approx(stacked.step_batch(batch, loss_of), rel=1e-5)
    tolerance = weight_tolerance(3, LR, EPS, 10.0, gain=GAIN["adalezo"])
    for name, weight in weights_of(closed).items():
        assert float((weight - weights_of(stacked)[name]).abs().max()) <= tolerance


def test_a_closure_refuses_directions_per_row() -> None:
    _, tested = both("llama", "dense", 4, per_row=2)
    with pytest.raises(ValueError, match="directions_per_row is 2, but with a closure"):
        tested["module"].step(lambda: torch.zeros(()))


def test_a_closure_makes_the_step_of_mezo() -> None:
    reference, tested = both("llama", "dense", 1)
    batch = rows_for("llama", ROWS)
    for _ in range(3):
        expected = reference.step(batch, loss_of)
        for optimizer in tested.values():
            model = optimizer.engine.module

            def closure(model: Any = model) -> Any:
                sums, weights = loss_of(model, batch)
                return sums.sum(), weights.sum()

            assert optimizer.step(closure) == pytest.approx(expected, rel=1e-5)
    for mode, optimizer in tested.items():
        expect_close(optimizer, reference, weight_tolerance(3, LR, EPS, 10.0), mode)


def test_learning_rate_schedulers_drive_the_step() -> None:
    _, tested = both("sequential", "dense", 1)
    reference, _ = both("sequential", "dense", 1)
    optimizer = tested["module"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(4):
        reference.lr = LR * 0.5**step
        batch = rows_for("sequential", ROWS, seed=step)
        reference.step(batch, loss_of)
        optimizer.step_batch(batch, loss_of)
        scheduler.step()
    expect_close(optimizer, reference, weight_tolerance(4, LR, EPS, 3.0), "scheduled")
