"""Conservative steps: what a direction writes is tried first, and kept, turned round or left."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import Injected, remembered_noise
from models import build, cut, loss_of, rows_for
from reference import Reference
from torch import Tensor, nn
from workers import HAVE_DEEPSPEED, Pool, digest, whole_weights, wrap

import zo_dist
from zo_dist.config import load_config
from zo_dist.replay import identity, replay
from zo_dist.trajectory import TrajectoryWriter
from zo_dist.trials import Trials

LR, EPS, DECAY, STEPS, ROWS = 2.0**-7, 2.0**-6, 0.01, 10, 11
ARMS = (
    ("0.weight", "0.bias"),
    ("2.first.weight", "2.first.bias", "2.second.bias"),
    ("3.weight",),
    ("4.scale",),
    ("5.weight", "5.bias"),
)

# Which of three is kept


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ((1.0, 3.0, 2.0), 1.0),
        ((3.0, 1.0, 2.0), -1.0),
        ((3.0, 2.0, 1.0), 0.0),
        ((1.0, 1.0, 1.0), 1.0),
        ((2.0, 1.0, 1.0), 0.0),
        ((math.inf, 2.0, 1.0), 0.0),
        ((math.nan, 1.0, 2.0), -1.0),
        ((math.nan, math.inf, math.nan), 0.0),
    ],
)
def test_the_lowest_loss_is_kept(losses: tuple[float, ...], kept: float) -> None:
    assert Trials().kept(torch.tensor([losses, (1.0, 2.0, 3.0)], dtype=torch.float64)) == [kept, 1.0]


# Against the reference


class Rounds:
    """Given losses of a step and then of its trial: those of `Injected` for two sides, and for three."""

    def __init__(self, mode: str, directions: int, per_row: int, estimator: str, forwards: int = 1) -> None:
        known = {"num_forwards": forwards, "per_row": per_row}
        self._rounds = [Injected(mode, directions, **known, estimator=e) for e in (estimator, "three_sided")]
        calls = [
            forwards * (1 if mode == "module" else directions // per_row * len(r.order)) for r in self._rounds
        ]
        self._turns = itertools.cycle([0] * calls[0] + [1] * calls[1])

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._rounds[next(self._turns)](model, batch)


# (directions, per row), sampler, mode, noise, estimator, coefficients, mask
Run = tuple[Any, ...]
PLACES = tuple((engine, ranks) for engine in table.MAIN_ENGINES for ranks in table.RANKS)
RUNS = table.all_pairs(
    PLACES,
    table.GROUPED,
    tuple(table.SAMPLERS),
    table.MODES,
    tuple(table.NOISES),
    ("two_sided", "one_sided"),
    tuple(table.COEFFICIENTS),
    tuple(table.MASKS),
)


def options_of(run: Run) -> dict[str, Any]:
    (directions, per_row), sampler, mode, noise, estimator, coefficients, mask = run
    return {
        "lr": LR, "eps": EPS, "directions": directions, "directions_per_row": per_row, "sampler": sampler,
        "perturb": mode, "noise": noise, "estimator": estimator, "coefficients": coefficients, "mask": mask,
        "weight_decay": DECAY, "self_check": False, "conservative": True,
    }  # fmt: skip


def of_reference(run: Run) -> Reference:
    (directions, per_row), sampler, _, noise, estimator, coefficients, mask = run
    method, options = table.REFERENCE[sampler]
    small = table.MASKS[mask]
    reference = Reference(
        build("sequential"), ARMS, method, lr=LR, eps=EPS, directions=directions, per_row=per_row, law=noise,
        estimator=estimator, shape=coefficients, options=options, weight_decay=DECAY,
        share=1.0 if small is None else small.share, conservative=True,
    )  # fmt: skip
    if directions == 1 and coefficients in table.NEED_TWO:
        reference.shape = "raw"
    losses = Rounds("reference", directions, per_row, estimator)
    for _ in range(STEPS):
        reference.step(rows_for("sequential", ROWS), losses)
    return reference


# Each rank's micro-batches, as ranges of the rows of all ranks; in a step each rank makes as many forwards.
SHARES: dict[int, list[list[tuple[int, int]]]] = {
    1: [[(0, 4), (4, 11)]],
    2: [[(0, 7)], [(7, 9), (9, 11)]],
    3: [[(0, 5)], [(5, 5)], [(5, 8), (8, 11)]],
}


def runs_on_rank(engine: str, runs: list[Run]) -> list[str]:
    import torch.distributed as dist

    mine = SHARES[dist.get_world_size()][dist.get_rank()]
    digests = []
    with remembered_noise():
        for run in runs:
            optimizer = table.optimizer(wrap(engine, build("sequential")), **options_of(run))
            losses = Rounds(optimizer.perturb, *run[0], run[4], forwards=2)
            batch = rows_for("sequential", ROWS)
            for _ in range(STEPS):
                optimizer.step_batch([cut(batch, a, b) for a, b in mine], losses)
            digests.append(digest(whole_weights(optimizer)))
    return digests


# Other engines that hold all weights, or shards in groups: what the main ones run on two ranks, in part.
MORE_PLACES = (("ddp", 2), ("zero0", 2), ("hsdp_1x2", 2), ("hsdp_2x1", 2))


@pytest.mark.parametrize(("engine", "num_ranks"), [*PLACES, *MORE_PLACES])
def test_given_losses_leave_the_bits_of_the_reference(
    pool: Callable[[int], Pool], engine: str, num_ranks: int
) -> None:
    if engine.startswith("zero") and not HAVE_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    runs = [run[1:] for run in RUNS if run[0] == (engine, num_ranks)]
    if (engine, num_ranks) in MORE_PLACES:
        runs = [run[1:] for run in RUNS if run[0] == ("fsdp2", 2)][:4]
    results = pool(num_ranks).run(runs_on_rank, engine, runs)
    kept = set[float]()
    with remembered_noise():
        for i, run in enumerate(runs):
            reference = of_reference(run)
            kept.update(reference.all_kept)
            assert [rank[i] for rank in results] == [digest(reference.weights())] * num_ranks, run
    assert kept == {1.0, 0.0, -1.0}


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("directions", [1, 3])
def test_own_losses_of_one_row_per_direction_too(directions: int, mode: str) -> None:
    """Each owner then multiplies the same shapes as in the reference: the trials have the same bits."""
    # So long a step that it is often the wrong one.
    shared = {"lr": 0.5, "eps": EPS, "directions": directions, "conservative": True}
    reference = Reference(build("sequential"), ARMS, "mezo", **shared)
    optimizer = table.optimizer(build("sequential"), **shared, perturb=mode)
    with remembered_noise():
        for step in range(20):
            batch = rows_for("sequential", directions, seed=step)
            reference.step(batch, loss_of)
            optimizer.step_batch(batch, loss_of)
    assert digest(whole_weights(optimizer)) == digest(reference.weights())
    assert set(reference.all_kept) >= {1.0, 0.0}


# What a step does


class Valley(nn.Module):
    """A steep bowl, with the weights that its forwards saw, for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -0.5, 2.0, 0.25]))
        self.seen: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return 50.0 * self.weight.square().sum().expand(len(rows))


def valley_loss(model: Valley, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["row"])


def in_a_valley(lr: float, conservative: bool, steps: int = 30) -> list[float]:
    model = Valley()
    optimizer = zo_dist.ZeroOrder(
        model, lr=lr, eps=2.0**-6, noise="gaussian", self_check=False, conservative=conservative
    )
    heights = []
    for _ in range(steps):
        optimizer.step_batch({"row": torch.zeros(1)}, valley_loss)
        heights.append(50.0 * float(model.weight.detach().square().sum()))
    return heights


def test_the_loss_of_a_steps_own_rows_never_rises() -> None:
    """Where MeZO diverges: only a z with `lr * 100 |z|**2 < 2` has a move that lowers it."""
    heights = in_a_valley(2.0**-6, conservative=True)
    assert all(b <= a for a, b in itertools.pairwise(heights))
    assert heights[-1] < heights[0]
    assert in_a_valley(2.0**-6, conservative=False)[-1] > 1e6


def test_where_every_move_lowers_the_loss_it_is_mezo() -> None:
    """As above: here that is so up to a |z|**2 of 80, in four dimensions."""
    assert in_a_valley(2.0**-12, conservative=True) == in_a_valley(2.0**-12, conservative=False)


@pytest.mark.parametrize("perturb", table.MODES)
def test_what_was_tried_is_what_is_written(perturb: str) -> None:
    """To the bit, as lr is a power of two."""
    model = Valley()
    optimizer = zo_dist.ZeroOrder(
        model,
        lr=2.0**-6,
        eps=2.0**-6,
        noise="gaussian",
        perturb=perturb,  # type: ignore[arg-type]
        self_check=False,
        conservative=True,
    )
    written = []
    for _ in range(30):
        before = model.weight.detach().clone()
        model.seen = []
        optimizer.step_batch({"row": torch.zeros(1)}, valley_loss)
        plus, minus, move, opposite, clean = model.seen
        assert torch.equal(clean, before)
        assert torch.equal((plus - before).sign(), -(minus - before).sign())
        assert torch.equal((move - before).sign(), -(opposite - before).sign())
        coef = optimizer.record.coefs[0]
        now = {1.0: move, -1.0: opposite, 0.0: before}[
            math.copysign(1.0, coef * optimizer.record.slopes[0]) if coef else 0.0
        ]
        written.append(coef != 0.0)
        assert torch.equal(model.weight.detach(), now)
    assert set(written) == {True, False}


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
def test_a_row_runs_three_times_more(estimator: str, mode: str) -> None:
    optimizer = table.optimizer(
        build("llama"), directions=6, directions_per_row=3, estimator=estimator, perturb=mode,
        self_check=False, conservative=True,
    )  # fmt: skip
    rows: list[int] = []

    def counted(model: Any, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        return loss_of(model, batch)

    optimizer.step_batch(rows_for("llama", 8), counted)
    # Of three directions on a row, an unshifted side runs once.
    sides = (6 if estimator == "two_sided" else 4) + 7
    assert sum(rows) == 8 * sides
    assert len(rows) == (2 if mode == "module" else 2 * sides)


def test_a_step_of_lr_0_tries_nothing() -> None:
    optimizer = table.optimizer(build("sequential"), lr=0.0, self_check=False, conservative=True)
    losses = Injected("module", 1)
    optimizer.step_batch(rows_for("sequential", 4), losses)
    assert losses.calls == 1


def logged(path: Path, optimizer: zo_dist.ZeroOrder, fails: set[int]) -> None:
    """Ten steps, taken again where a call raised an error."""
    calls = itertools.count()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Any:
        losses = loss_of(model, batch)
        if next(calls) in fails:
            raise MemoryError
        return losses

    with TrajectoryWriter(path, identity(optimizer)) as log:
        while optimizer.step_count < 10:
            try:
                optimizer.step_batch(rows_for("sequential", 6, seed=optimizer.step_count), loss)
            except MemoryError:
                continue
            log.append(optimizer.record)


@pytest.mark.parametrize("sampler", list(table.SAMPLERS))
def test_a_log_holds_what_was_kept(tmp_path: Path, sampler: str) -> None:
    """A replay makes no trial; and a step whose trial raised an error can be taken again."""
    options = {"lr": 0.25, "eps": EPS, "directions": 2, "sampler": sampler, "self_check": False}
    ran, failed, again = (
        table.optimizer(build("sequential"), **options, conservative=conservative)
        for conservative in (True, True, False)
    )
    logged(tmp_path / "ran", ran, set())
    logged(tmp_path / "failed", failed, {0, 2, 5})
    assert (tmp_path / "ran").read_bytes() == (tmp_path / "failed").read_bytes()
    assert replay(again, tmp_path / "ran") == 10
    assert digest(whole_weights(again)) == digest(whole_weights(ran)) == digest(whole_weights(failed))
    assert repr(again.scalars) == repr(ran.scalars)


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": zo_dist.Momentum()}, "rule is Momentum"),
        ({"curvature": zo_dist.DiagonalCurvature(smoothing=0.1)}, "there is a curvature"),
        ({"anchor": zo_dist.Anchor(every=2)}, "there is an anchor"),
        ({"estimator": zo_dist.TwoSided(clip_rows=3.0)}, "clip_rows is 3.0"),
    ],
)
def test_parts_that_it_does_not_go_with_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"conservative is true.*{message}"):
        zo_dist.ZeroOrder(build("sequential"), conservative=True, **options)


def test_weights_of_16_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights in torch.bfloat16.*set the dtype .*to float32"):
        zo_dist.ZeroOrder(build("sequential", torch.bfloat16), conservative=True)


def conservative_in_mixed_precision() -> None:
    table.optimizer(wrap("fsdp2_mixed", build("sequential")), conservative=True)


def test_weights_that_are_cast_to_16_bits_are_refused(pool: Callable[[int], Pool]) -> None:
    for error in pool(2).errors(conservative_in_mixed_precision):
        assert "forwards take weights in torch.bfloat16" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dtype=bfloat16"], "weights in torch.bfloat16"),
        (
            ["model.dtype=float32", "engine.kind=fsdp2", "engine.compute_dtype=bfloat16"],
            "weights in torch.bfloat16",
        ),
        (["model.dtype=float32", "optimizer.rule={name: adam}"], "rule is Adam"),
    ],
)
def test_a_config_is_refused_before_anything_is_loaded(overrides: list[str], message: str) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "zo_conservative_opt1.3b_sst2.yaml"
    with pytest.raises(ValueError, match=message):
        load_config(recipe, overrides)


def rank_dependent() -> None:
    import torch.distributed as dist

    zo_dist.ZeroOrder(wrap("fsdp2", build("sequential")), conservative=dist.get_rank() == 0)


def test_all_ranks_or_none_are_conservative(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).errors(rank_dependent):
        assert "conservative must be the same on every rank" in message
