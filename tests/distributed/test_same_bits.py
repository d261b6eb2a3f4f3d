"""The central claim: the same losses leave the same bits, whoever holds the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import table
import torch
from injected import Injected, remembered_noise
from models import EXPERTS, build, cut, loss_of, rows_for, two_outputs
from reference import Reference, weight_tolerance
from workers import HAVE_DEEPSPEED, Pool, digest, needs_deepspeed, runs_in, whole_weights, wrap

import zo_dist

STEPS = 20
LR, EPS, DECAY = 2.0**-7, 2.0**-6, 0.01
ROWS = 11
# Each rank's micro-batches, as ranges of the rows of all ranks: uneven ranks, uneven numbers of
# micro-batches, and a rank without rows. No number of directions above 1 divides the rows.
SHARES: dict[int, list[list[tuple[int, int]]]] = {
    1: [[(0, 4), (4, 11)]],
    2: [[(0, 7)], [(7, 9), (9, 11)]],
    3: [[(0, 5)], [(5, 5)], [(5, 8), (8, 11)]],
    4: [[(0, 3)], [(3, 4), (4, 6)], [(6, 6)], [(6, 11)]],
}
SEQUENTIAL_ARMS = (
    ("0.weight", "0.bias"),
    ("2.first.weight", "2.first.bias", "2.second.bias"),
    ("3.weight",),
    ("4.scale",),
    ("5.weight", "5.bias"),
)
LLAMA_LAYER = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
ARMS = {
    "sequential": SEQUENTIAL_ARMS,
    "llama": (
        ("model.embed_tokens.weight",),
        *(tuple(f"model.layers.{i}.{name}" for name in LLAMA_LAYER) for i in range(2)),
        ("model.norm.weight", "lm_head.weight"),
    ),
}

# One row per run: (dtype, rounding), (directions, per row), sampler, mode, noise, estimator, coefficients,
# rule, mask, which steps there are besides. Of all combinations of these and of (engine, ranks), each pair
# of values of different columns is in one of the runs.
Combo = tuple[tuple[str, str], tuple[int, int], str, str, str, str, str, str, str, str]
F32, BF16 = ("float32", "stochastic"), ("bfloat16", "stochastic")
PLACES = tuple((engine, ranks) for engine in table.MAIN_ENGINES for ranks in table.RANKS)
AXES: tuple[tuple[Any, ...], ...] = (
    *(table.WRITES, table.GROUPED, tuple(table.SAMPLERS), table.MODES, tuple(table.NOISES)),
    *(tuple(table.ESTIMATORS), tuple(table.COEFFICIENTS), tuple(table.RULES)),
    *(tuple(table.MASKS), tuple(table.BESIDES)),
)


def in_force(combo: Combo) -> Combo:
    """What the table makes of a run whose values do not go together."""
    write, (directions, per_row), sampler, mode, noise, estimator, shape, rule, mask, besides = combo
    estimator = table.estimator_for(sampler, estimator)
    besides = table.besides_for(besides, estimator)
    adds = table.adds_terms(besides)
    noise = table.noise_for(noise, estimator, adds)
    shape = table.coefficients_for(shape, directions, adds)
    structure = table.NOISES[noise].get("structure")
    rule = table.rule_for(rule, structure, estimator == "three_sided", adds)
    return (write, (directions, per_row), sampler, mode, noise, estimator, shape, rule, mask, besides)


def added(runs: list[Combo]) -> list[Combo]:
    """A run for each value that none of these has in force."""
    plain: Combo = (F32, (3, 1), "adalezo", "module", "rademacher", "two_sided", "raw", "sgd", "all", "none")
    missing = [
        (column, value)
        for column, values in enumerate(AXES)
        for value in values
        if value not in {in_force(run)[column] for run in runs}
    ]
    more = []
    for column, value in missing:
        run: list[Any] = list(plain)
        run[4] = {"lozo_m": "lozo", "tezo_adam": "tezo"}.get(value, run[4])
        run[column] = value
        more.append(tuple(run))
    return more


PAIRS = table.all_pairs(PLACES, *AXES)
RUNS: dict[tuple[str, int], list[Combo]] = {
    place: [run[1:] for run in PAIRS if run[0] == place] for place in PLACES
}
for runs in RUNS.values():
    runs += added(runs)
# For engines that share their code with a main one: each direction count, mode and dtype once.
FEW: list[Combo] = [
    (F32, (3, 1), "adalezo", "module", "rademacher", "two_sided", "raw", "sgd", "all", "anchor"),
    (BF16, (3, 1), "adalezo", "module", "rademacher", "two_sided", "raw", "momentum", "all", "search"),
    (
        ("bfloat16", "kahan"),
        (8, 4),
        "uniform",
        "module",
        "gaussian",
        "one_sided",
        "fzoo",
        "adam",
        "small",
        "none",
    ),
    (
        ("float16", "stochastic"),
        (2, 1),
        "dense",
        "shard",
        "flipout",
        "two_sided",
        "raw",
        "momentum",
        "all",
        "none",
    ),
    (BF16, (1, 1), "adalezo", "shard", "lozo", "two_sided", "rms", "sgd", "small", "none"),
    (F32, (3, 1), "adalezo", "module", "subzero", "two_sided", "raw", "lozo_m", "all", "none"),
    (BF16, (4, 2), "adalezo", "module", "gaussian", "three_sided", "raw", "sgd", "all", "none"),
    (BF16, (2, 1), "uniform", "module", "zo_adamu", "two_sided", "raw", "momentum", "small", "none"),
    (BF16, (2, 1), "adalezo", "module", "gaussian", "one_sided", "raw", "sgd", "all", "outputs"),
    # Arms of the window that a step did not draw have no terms of its own.
    (F32, (1, 1), "uniform", "module", "grzo", "two_sided", "raw", "sgd", "all", "window"),
    (F32, (1, 1), "uniform", "shard", "orthogonal", "two_sided", "raw", "sgd", "all", "window"),
]


def final_weights(engine: str, kind: str, combo: Combo, given: bool, **options: Any) -> dict[str, Any]:
    """Whole weights after `STEPS` steps of this rank's share of the rows.

    `given`: the losses are known numbers; else they are the model's own.
    """
    import torch.distributed as dist

    (
        (dtype, rounding),
        (directions, per_row),
        sampler,
        mode,
        noise,
        estimator,
        coefficients,
        rule,
        mask,
        besides,
    ) = combo
    estimator = table.estimator_for(sampler, estimator)
    steered = estimator == "three_sided" or noise == "zo_adamu"
    optimizer = table.optimizer(
        wrap(engine, build(kind, table.dtype_of(dtype))),
        lr=LR,
        eps=EPS,
        sampler=sampler,
        estimator=estimator,
        coefficients=coefficients,
        rule=rule,
        directions=directions,
        directions_per_row=per_row,
        perturb=table.mode_of(engine, dist.get_world_size(), mode, steered),
        noise=noise,
        mask=mask,
        rounding=rounding,
        **table.BESIDES[besides],
        **options,
    )
    # All ranks of a pipeline run all rows, in 11 parts.
    share = [[(0, ROWS)]] if engine == "pipeline" else SHARES[optimizer.engine.num_groups]
    batch = rows_for(kind, ROWS, dtype=table.dtype_of(dtype))
    mine = [cut(batch, a, b) for a, b in share[optimizer.engine.group]]
    num_forwards = 11 if engine == "pipeline" else max(len(pieces) for pieces in share)
    calls = {"num_forwards": num_forwards, "per_row": per_row}
    known = Injected(optimizer.perturb, directions, **calls, estimator=estimator, search=searched(besides))
    loss = loss_for(besides, known if given else None)
    for _ in range(STEPS):
        optimizer.step_batch(mine, loss)
    return whole_weights(optimizer)


def loss_for(besides: str, given: Any) -> Any:
    """`given`, or the model's own; of outputs if they are told, as part of the sum over a row's tokens."""
    loss, unit = (given, 1.0) if given else (loss_of, 2.0**-5)
    return two_outputs(loss, unit) if besides == "outputs" else loss


def searched(besides: str) -> zo_dist.Projection | None:
    return table.PROJECTIONS[table.BESIDES[besides].get("projection", "none")]


def runs_on_rank(engine: str, kind: str, combos: list[Combo]) -> list[str]:
    """Digests of this rank's whole weights after each run on given losses."""
    options = {"weight_decay": DECAY, "self_check": False}
    with remembered_noise():
        return [digest(final_weights(engine, kind, combo, given=True, **options)) for combo in combos]


def weights_of_reference(
    kind: str, combo: Combo, given: bool, weight_decay: float = 0.0
) -> tuple[dict[str, Any], list[float]]:
    """What `final_weights` should be, and the loss of each step."""
    (dtype, rounding), (directions, per_row), sampler, _, noise, estimator, shape, rule, mask, besides = combo
    estimator = table.estimator_for(sampler, estimator)
    small = table.MASKS[mask]
    dropped = table.ANCHORS[table.BESIDES[besides].get("anchor", "none")]
    method, options = table.REFERENCE[sampler]
    reference = Reference(
        build(kind, table.dtype_of(dtype)),
        ARMS[kind],
        method,
        lr=LR,
        eps=EPS,
        directions=directions,
        per_row=per_row,
        law=noise,
        rounding=rounding,
        weight_decay=weight_decay,
        estimator=estimator,
        rule=rule,
        shape=shape,
        options=options,
        share=1.0 if small is None else small.share,
        anchor=dropped and (dropped.every, directions, dropped.lr_ratio),
        projection=searched(besides),
        window=table.JACOBIANS[table.BESIDES[besides].get("jacobian", "none")],
    )
    batch = rows_for(kind, ROWS, dtype=table.dtype_of(dtype))
    known = Injected("reference", directions, estimator=estimator, per_row=per_row, search=searched(besides))
    loss = loss_for(besides, known if given else None)
    with remembered_noise():
        losses = [reference.step(batch, loss) for _ in range(STEPS)]
    return reference.weights(), losses


@cache
def bits_of_reference(kind: str, combo: Combo) -> str:
    return digest(weights_of_reference(kind, combo, given=True, weight_decay=DECAY)[0])


def _expect_same(digests: list[list[str]], kind: str, combos: list[Combo]) -> None:
    for i, combo in enumerate(combos):
        got = [rank[i] for rank in digests]
        assert got == [bits_of_reference(kind, combo)] * len(got), combo


def _skip_without_deepspeed(engine: str) -> None:
    if engine.startswith("zero") and not HAVE_DEEPSPEED:
        pytest.skip("deepspeed is not installed")


def _taken(engine: str, combos: list[Combo]) -> list[Combo]:
    """Those that the engine runs on this machine."""
    return [c for c in combos if runs_in(getattr(torch, c[0][0]), engine)]


@pytest.mark.parametrize("place", PLACES)
def test_every_part_is_in_force_in_some_run_of_every_engine(place: tuple[str, int]) -> None:
    for column, values in enumerate(AXES):
        assert {in_force(run)[column] for run in RUNS[place]} == set(values)


@pytest.mark.parametrize(("engine", "num_ranks"), PLACES)
def test_given_losses_leave_the_same_bits(pool: Callable[[int], Pool], engine: str, num_ranks: int) -> None:
    _skip_without_deepspeed(engine)
    combos = _taken(engine, RUNS[engine, num_ranks])
    _expect_same(pool(num_ranks).run(runs_on_rank, engine, "sequential", combos), "sequential", combos)


@pytest.mark.parametrize(
    ("num_ranks", "engine"), [(n, e) for n, names in table.MORE_ENGINES.items() for e in names]
)
def test_given_losses_leave_the_same_bits_on_the_other_forms(
    pool: Callable[[int], Pool], engine: str, num_ranks: int
) -> None:
    _skip_without_deepspeed(engine)
    combos = _taken(engine, FEW)
    if engine == "fsdp2_mixed":  # its shards are float32
        combos = [((("float32", "stochastic")), *combo[1:]) for combo in FEW]
    if engine == "tp_2":
        combos = combos + added(FEW)
    if "tp_" in engine:  # no rank has a side of the noise of some columns
        combos = [(*combo[:7], table.OF_FULL_RANK.get(combo[7], combo[7]), *combo[8:]) for combo in combos]
    _expect_same(pool(num_ranks).run(runs_on_rank, engine, "sequential", combos), "sequential", combos)


@pytest.mark.parametrize("engine", [*table.MAIN_ENGINES, "zero3_init", "pipeline"])
def test_given_losses_leave_the_same_bits_on_a_language_model(
    pool: Callable[[int], Pool], engine: str
) -> None:
    _skip_without_deepspeed(engine)
    combos = _taken(engine, [*FEW[:4], FEW[5]])
    if engine == "pipeline":
        # In its shard mode, and in a search, each side is a forward of its own in parts of other sizes.
        combos = [combo for combo in FEW if combo[3] == "module" and combo[-1] != "search"]
    _expect_same(pool(2).run(runs_on_rank, engine, "llama", combos), "llama", combos)


EXPERT_ARMS = r"mlp\.(experts|gate)\b"


def arms_of_experts_on_rank(engine: str) -> list[str]:
    """Digests of whole weights: of each kind, stacked directions, and one at a time on shards."""
    runs: list[Combo] = [
        (F32, (3, 1), "adalezo", "module", "rademacher", "two_sided", "raw", "sgd", "all", "none"),
        (BF16, (2, 1), "uniform", "shard", "gaussian", "two_sided", "raw", "momentum", "all", "none"),
    ]
    options = {"arms": EXPERT_ARMS, "self_check": False}
    with remembered_noise():
        weights = [
            final_weights(engine, kind, run, given=True, **options) for kind in EXPERTS for run in runs
        ]
    return [digest(of_run) for of_run in weights]


def check_experts_on_rank(engine: str) -> None:
    """SelfCheckError if a router or the experts of a layer, arms of their own, do not move the loss."""
    for kind in EXPERTS:
        optimizer = table.optimizer(wrap(engine, build(kind)), arms=EXPERT_ARMS)
        optimizer.prepare(rows_for(kind, 1), loss_of)


@pytest.mark.parametrize(("engine", "ranks"), [*((name, 2) for name in table.MAIN_ENGINES), ("hsdp_2x2", 4)])
def test_given_losses_leave_the_same_bits_on_experts(
    pool: Callable[[int], Pool], engine: str, ranks: int
) -> None:
    _skip_without_deepspeed(engine)
    (alone,) = pool(1).run(arms_of_experts_on_rank, "replicated")
    assert len(set(alone)) == len(alone)
    assert pool(ranks).run(arms_of_experts_on_rank, engine) == [alone] * ranks
    pool(ranks).run(check_experts_on_rank, engine)


def test_the_bits_do_depend_on_what_they_should() -> None:
    """A digest of nothing, or losses that do not reach the weights, would make all above pass."""
    base: Combo = (
        ("bfloat16", "stochastic"), (3, 1), "adalezo", "module", "rademacher", "two_sided", "raw", "sgd",
        "all", "none",
    )  # fmt: skip
    others: list[Combo] = [
        (("bfloat16", "kahan"), *base[1:]),
        (("bfloat16", "nearest"), *base[1:]),
        (base[0], (2, 1), *base[2:]),
        (base[0], (3, 3), *base[2:]),
        (*base[:2], "dense", *base[3:]),
        *((*base[:4], noise, *base[5:]) for noise in table.NOISES if noise != "rademacher"),
        *((*base[:5], estimator, *base[6:]) for estimator in table.ESTIMATORS if estimator != "two_sided"),
        *((*base[:6], shape, *base[7:]) for shape in table.COEFFICIENTS if shape != "raw"),
        *((*base[:7], rule, *base[8:]) for rule in table.RULES if rule not in ("sgd", *table.OF_FULL_RANK)),
        *((*base[:4], "lozo", *base[5:7], rule, *base[8:]) for rule in ("momentum", "lozo_m")),
        *((*base[:4], "tezo", *base[5:7], rule, *base[8:]) for rule in ("adam", "tezo_adam")),
        (*base[:8], "small", "none"),
        *((*base[:9], besides) for besides in table.BESIDES if besides != "none"),
    ]
    start = digest(dict(build("sequential", torch.bfloat16).named_parameters()))
    assert len({start, *(bits_of_reference("sequential", c) for c in [base, *others])}) == 2 + len(others)


# End to end: the losses are the model's own.


def trajectory_on_rank(engine: str, kind: str, combo: Combo) -> dict[str, Any]:
    import torch.distributed as dist

    weights = final_weights(engine, kind, combo, given=False)
    return {"digest": digest(weights), "weights": weights if dist.get_rank() == 0 else None}


@cache
def trajectory_of_reference(kind: str, combo: Combo) -> tuple[dict[str, Any], float, float]:
    """Final weights, the farthest that one moved, and the largest loss on the way."""
    before = dict(build(kind).named_parameters())
    after, losses = weights_of_reference(kind, combo, given=False)
    moved = max(float((after[name] - before[name].detach()).abs().max()) for name in before)
    return after, moved, max(losses)


# AdaLeZO learns from slopes: see the comment in test_reference.py.
GAIN = {"dense": 1.0, "uniform": 1.0, "adalezo": 70.0, "adalezo_both": 70.0, "fitted_adalezo": 250.0}


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [
        *PLACES,
        *((engine, 2) for engine in ("fsdp2_offload", "zero3_init", "zero2")),
        *((engine, 4) for engine in ("hsdp_2x2", "zero3_2x2")),
    ],
)
@pytest.mark.parametrize(
    ("sampler", "directions", "mode", "mask", "besides"),
    [
        ("dense", (1, 1), "module", "all", "none"),
        ("adalezo", (3, 1), "module", "all", "none"),
        ("uniform", (4, 2), "shard", "small", "none"),
        ("dense", (2, 1), "module", "all", "anchor"),
        ("dense", (1, 1), "module", "all", "search"),
        ("uniform", (2, 1), "module", "all", "window"),
        ("adalezo", (3, 1), "shard", "all", "outputs"),
        ("fitted_adalezo", (8, 4), "module", "all", "none"),
    ],
)
def test_own_losses_give_the_trajectory_of_the_reference(
    pool: Callable[[int], Pool],
    engine: str,
    num_ranks: int,
    sampler: str,
    directions: tuple[int, int],
    mode: str,
    mask: str,
    besides: str,
) -> None:
    _skip_without_deepspeed(engine)
    combo: Combo = (
        ("float32", "stochastic"), directions, sampler, mode, "rademacher", "two_sided", "raw", "sgd", mask,
        besides,
    )  # fmt: skip
    results = pool(num_ranks).run(trajectory_on_rank, engine, "llama", combo)
    assert len({r["digest"] for r in results}) == 1
    expected, moved, loss = trajectory_of_reference("llama", combo)
    tolerance = weight_tolerance(STEPS, LR, EPS, loss, gain=GAIN[sampler])
    assert moved > 20 * tolerance / GAIN[sampler]
    for name, weight in results[0]["weights"].items():
        error = float((weight - expected[name]).abs().max())
        assert error <= tolerance, f"{name} is off by {error}, tolerance {tolerance}"


@needs_deepspeed
def test_no_engine_is_left_out() -> None:
    """Every engine that workers.py can make is in one of the tables above."""
    import workers

    tested = {
        *table.MAIN_ENGINES,
        "zero3_init",
        "pipeline",
        *(e for names in table.MORE_ENGINES.values() for e in names),
    }
    assert tested == set(workers.ENGINES)
