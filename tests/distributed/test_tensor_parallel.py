"""Tensor parallelism, alone and with FSDP2 around it: the run of one process, on layers that ranks cut.

Every combination of parts on a small net is in test_same_bits.py; here are language models, cut by the plan
that transformers has for them, and what else a run needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from injected import Injected, remembered_noise
from models import build, cut, loss_of, rows_for
from reference import weight_tolerance
from tiny_run import as_on_one_process, write_config
from torch import Tensor, nn
from workers import Pool, auto_tp, deepspeed_engine, digest, launch, scratch_folder, whole_weights, wrap

from zo_dist.checkpoint import save_model
from zo_dist.engines import read_ds_config
from zo_dist.engines.auto_tp import LAYOUT
from zo_dist.engines.build import autotp_engine
from zo_dist.engines.pieces import piece_of, span_in
from zo_dist.params import Runs
from zo_dist.planning.collectives import Counted
from zo_dist.snapshot import load_snapshot, save_snapshot

PoolOf = Callable[[int], Pool]

STEPS, ROWS, LR, EPS, DIRECTIONS = 20, 4, 2e-3, 2.0**-6, 2
KINDS = ("llama_in_two", "qwen3_in_two")
# dtype, rounding, law, rule, mode.
Run = tuple[str, str, str, str, str]
RUNS: list[Run] = [
    ("bfloat16", "stochastic", "rademacher", "sgd", "module"),
    ("bfloat16", "stochastic", "gaussian", "adam", "shard"),
    ("float32", "stochastic", "gaussian", "sgd", "module"),
    ("float32", "stochastic", "rademacher", "momentum", "shard"),
    ("bfloat16", "kahan", "gaussian", "momentum", "module"),
    ("bfloat16", "stochastic", "flipout", "sgd", "module"),
]


def by_plan(model: Any, replicas: int) -> Any:
    """The model as transformers loads it: cut in two, the replicas of that sharded."""
    import torch.distributed as dist
    from transformers.distributed.configuration_utils import DistributedConfig

    with scratch_folder() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        config = DistributedConfig(tp_size=2, fsdp_size=replicas)
        loaded = type(model).from_pretrained(
            folder, dtype=next(model.parameters()).dtype, distributed_config=config
        )
    assert any(
        getattr(p, "placements", ())[-1:] and p.to_local().shape[1:] != p.shape[1:]
        for p in loaded.parameters()
    )
    return loaded


def make(engine: str, kind: str, run: Run) -> Any:
    dtype, rounding, noise, rule, mode = run
    model = build(kind, table.dtype_of(dtype))
    model = by_plan(model, int(engine[-1])) if engine.startswith("plan") else wrap(engine, model)
    options = {"noise": noise, "rule": rule, "perturb": mode, "rounding": rounding}
    return table.optimizer(model, lr=LR, eps=EPS, directions=DIRECTIONS, **options)


def rows_of(optimizer: Any, kind: str) -> dict[str, Tensor]:
    group, groups = optimizer.engine.group, optimizer.engine.num_groups
    return cut(rows_for(kind, ROWS), group * ROWS // groups, (group + 1) * ROWS // groups)


def trained(engine: str, kind: str, run: Run, given: bool, steps: int = STEPS) -> Any:
    """After `steps` on known losses, or on the model's own; the self-check comes first."""
    optimizer = make(engine, kind, run)
    rows = rows_of(optimizer, kind)
    optimizer.prepare(rows, loss_of)
    loss = Injected(optimizer.perturb, DIRECTIONS) if given else loss_of
    for _ in range(steps):
        optimizer.step_batch(rows, loss)
    return optimizer


def bits(engine: str, kind: str, runs: list[Run]) -> list[tuple[str, str]]:
    """Of each run the whole weights, and those of the model that it saves."""
    import torch.distributed as dist

    found = []
    with remembered_noise():
        for run in runs:
            optimizer = trained(engine, kind, run, given=True)
            with scratch_folder() as folder:
                save_model(optimizer.engine, folder / "saved")
                saved = type(optimizer.engine.module).from_pretrained(folder / "saved", dtype="auto")
                dist.barrier()
            found.append((digest(whole_weights(optimizer)), digest(dict(saved.named_parameters()))))
    return found


@cache
def expected_bits(pool: PoolOf, kind: str) -> list[tuple[str, str]]:
    (found,) = pool(1).run(bits, "replicated", kind, RUNS)
    return found


@pytest.mark.parametrize(
    ("engine", "num_ranks", "kind"),
    [
        ("plan_1", 2, "llama_in_two"),
        ("tp_2", 2, "qwen3_in_two"),
        ("plan_2", 4, "qwen3_in_two"),
        ("fsdp2_tp_2x2", 4, "llama_in_two"),
        ("autotp", 2, "llama_in_two"),
        ("autotp", 2, "llama_tied"),
        ("autotp", 2, "opt"),
        # The second rank has no head's keys and values.
        ("autotp", 2, "llama"),
        ("autotp", 2, "llama_in_three"),
        ("autotp", 4, "qwen3_in_two"),
    ],
)
def test_given_losses_leave_the_bits_of_one_process(
    pool: PoolOf, engine: str, num_ranks: int, kind: str
) -> None:
    expected = expected_bits(pool, kind)
    assert len({weights for weights, _ in expected}) == len(RUNS)
    assert all(weights == saved for weights, saved in expected)
    assert pool(num_ranks).run(bits, engine, kind, RUNS) == [expected] * num_ranks


def own(engine: str, kind: str, mode: str) -> tuple[str, dict[str, Tensor], float]:
    import torch.distributed as dist

    run = ("float32", "stochastic", "rademacher", "sgd", mode)
    optimizer = trained(engine, kind, run, given=False)
    weights = whole_weights(optimizer)
    loss = optimizer.engine.exchange([optimizer.step_batch(rows_of(optimizer, kind), loss_of)]).max()
    return digest(weights), weights if dist.get_rank() == 0 else {}, float(loss)


@pytest.mark.parametrize("mode", table.MODES)
@pytest.mark.parametrize(("engine", "num_ranks"), [("plan_1", 2), ("fsdp2_tp_2x2", 4), ("autotp", 2)])
def test_own_losses_give_the_run_of_one_process(pool: PoolOf, engine: str, num_ranks: int, mode: str) -> None:
    kind = KINDS[0]
    ((_, expected, last),) = pool(1).run(own, "replicated", kind, mode)
    results = pool(num_ranks).run(own, engine, kind, mode)
    assert len({name for name, _, _ in results}) == 1
    # The loss falls from its start, which is below this.
    start = build(kind)
    loss, weights = loss_of(start, rows_for(kind, ROWS))
    tolerance = weight_tolerance(STEPS, LR, EPS, max(last, float((loss.sum() / weights.sum()).detach())))
    moved = max(float((expected[n] - p.detach()).abs().max()) for n, p in start.named_parameters())
    assert moved > 20 * tolerance
    for name, weight in results[0][1].items():
        assert float((weight - expected[name]).abs().max()) <= tolerance, name


# Snapshots: what one engine wrote, another goes on from.


def saved_by(engine: str, kind: str, run: Run, folder: str) -> str:
    optimizer = trained(engine, kind, run, given=True, steps=4)
    save_snapshot(optimizer, folder)
    return continued(optimizer, kind)


def loaded_by(engine: str, kind: str, run: Run, path: str) -> str:
    optimizer = make(engine, kind, run)
    load_snapshot(optimizer, path)
    return continued(optimizer, kind)


def continued(optimizer: Any, kind: str) -> str:
    """The weights, and all that is kept beside them, show in the weights of three more steps."""
    optimizer.prepare(rows_of(optimizer, kind), loss_of)
    loss = Injected(optimizer.perturb, DIRECTIONS)
    for _ in range(3):
        optimizer.step_batch(rows_of(optimizer, kind), loss)
    return digest(whole_weights(optimizer))


PLACES = [("replicated", 1), ("fsdp2", 2), ("tp_2", 2), ("fsdp2_tp_2x2", 4), ("autotp", 4)]


@pytest.mark.parametrize("source", range(len(PLACES)))
def test_any_engine_goes_on_from_the_snapshot_of_another(pool: PoolOf, tmp_path: Any, source: int) -> None:
    kind, run = KINDS[0], ("bfloat16", "kahan", "rademacher", "adam", "module")
    engine, num_ranks = PLACES[source]
    expected = pool(num_ranks).run(saved_by, engine, kind, run, str(tmp_path))[0]
    for engine, num_ranks in PLACES:
        path = str(tmp_path / "step-00000004")
        assert pool(num_ranks).run(loaded_by, engine, kind, run, path) == [expected] * num_ranks


# What a step sends.


def float32_gathers(kind: str, gathers_a_weight: bool) -> tuple[list[int], int]:
    """What a step, or a gather of one weight, makes by gathers of float32; and how often it adds up."""
    optimizer = make("tp_2", kind, RUNS[2])
    rows = rows_of(optimizer, kind)
    optimizer.step_batch(rows, loss_of)
    with Counted() as counted:
        if gathers_a_weight:
            param = next(p for p in optimizer.params if p.name.endswith("down_proj.weight"))
            with optimizer.engine.whole(param):
                pass
        else:
            optimizer.step_batch(rows, loss_of)
    gathers = [c for c in counted.calls if "gather" in c[0] and c[3] == torch.float32]
    return [made for _, made, _, _ in gathers], sum("reduce" in c[0] for c in counted.calls)


def test_a_step_gathers_no_weight(pool: PoolOf) -> None:
    """Activations are added up, scalars exchanged. The same count sees the gather of a weight."""
    for gathered, sums in pool(2).run(float32_gathers, KINDS[0], False):
        assert not gathered
        assert sums > 0
    for gathered, _ in pool(2).run(float32_gathers, KINDS[0], True):
        assert gathered


# Wrong use.


def with_rows_of_its_own(engine: str, kind: str) -> None:
    import torch.distributed as dist

    optimizer = make(engine, kind, RUNS[0])
    optimizer.step_batch(rows_for(kind, ROWS, seed=dist.get_rank()), loss_of)


@pytest.mark.parametrize(("engine", "num_ranks"), [("tp_2", 2), ("fsdp2_tp_2x2", 4)])
def test_other_rows_in_a_group_are_refused(pool: PoolOf, engine: str, num_ranks: int) -> None:
    for error in pool(num_ranks).errors(with_rows_of_its_own, engine, KINDS[0]):
        assert error.startswith("ValueError: rank 1 was given other rows than rank 0")
        assert f"each of the {num_ranks // 2} groups its own" in error


def with_part(**options: Any) -> None:
    table.optimizer(wrap("tp_2", build(KINDS[0])), **options)


def factored() -> None:
    with_part(noise="lozo", rule="lozo_m")


def curved() -> None:
    with_part(estimator="three_sided", perturb="module")


def carried() -> None:
    with_part(noise="zo_adamu", perturb="module")


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        (factored, "set factored to false"),
        (curved, "use perturb: shard"),
        (carried, "use perturb: shard"),
    ],
)
def test_what_cannot_be_done_on_some_columns_is_refused(
    pool: PoolOf, part: Callable[[], None], remedy: str
) -> None:
    for error in pool(2).errors(part):
        assert error.startswith("ValueError")
        assert remedy in error


def with_a_norm_of_its_own() -> None:
    import torch.distributed as dist

    model = wrap("tp_2", build(KINDS[0]))
    with torch.no_grad():
        model.model.norm.weight[3] += dist.get_rank()
    table.optimizer(model)


def test_whole_weights_that_differ_in_a_group_are_refused(pool: PoolOf) -> None:
    for error in pool(2).errors(with_a_norm_of_its_own):
        assert "ranks disagree on the starting weights: model.norm.weight" in error


def by_deepspeed(kind: str, stage: int = 0, **cuts: Any) -> None:
    """An engine of the user's own."""
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}}
    table.optimizer(deepspeed_engine(build(kind), config | {"tensor_parallel": {"autotp_size": 2, **cuts}}))


def head_in_parts() -> None:
    by_deepspeed(KINDS[0], vocab_parallel_lm_head=True)


def tied_by_plan() -> None:
    """What DeepSpeed's defaults make of a tied model."""
    by_deepspeed("llama_tied")


def nothing_to_cut() -> None:
    _in_columns("no such layer")


def column_head() -> None:
    _in_columns(r".*lm_head\.weight$")


def embeddings() -> None:
    _in_columns(r".*embed_tokens\.weight$")


def _in_columns(pattern: str) -> None:
    columns = {"patterns": [pattern], "partition_type": "column"}
    cuts = {"use_default_specs": False, "layer_specs": [columns]}
    table.optimizer(auto_tp(build(KINDS[0]), partition_config=cuts))


def at_stage_3() -> None:
    by_deepspeed(KINDS[0], stage=3)


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        (head_in_parts, "set tensor_parallel.vocab_parallel_lm_head to false"),
        (tied_by_plan, "set tensor_parallel.vocab_parallel_lm_head to false"),
        (nothing_to_cut, "see the patterns of tensor_parallel.partition_config"),
        (column_head, "gather_output of the head's partition_config"),
        (embeddings, "take them out of tensor_parallel.partition_config"),
        (at_stage_3, "set the stage to 0"),
    ],
)
def test_what_autotp_leaves_unclear_is_refused(pool: PoolOf, made: Callable[[], None], remedy: str) -> None:
    for error in pool(2).errors(made):
        assert error.startswith("ValueError")
        assert remedy in error


def frozen_norms() -> tuple[list[str], set[torch.dtype]]:
    """What is trained of a model with frozen norms of queries and keys, and the dtypes of its buffers."""
    model = build("qwen3_in_two")
    for name, param in model.named_parameters():
        param.requires_grad_("_norm" not in name)
    read = {"bf16": {"enabled": True}, "tensor_parallel": {"autotp_size": 2}}
    engine = autotp_engine(model, read_ds_config(read, hidden_size=16, micro_batch=1, num_ranks=2))
    optimizer = table.optimizer(engine)
    optimizer.step_batch(rows_for("qwen3_in_two", ROWS), loss_of)
    assert {p.param.dtype for p in optimizer.params} == {torch.bfloat16}
    return [p.name for p in optimizer.params], {b.dtype for b in model.buffers()}


def test_autotp_leaves_frozen_weights_and_float32_buffers(pool: PoolOf) -> None:
    whole = build("qwen3_in_two")
    names = [name for name, _ in whole.named_parameters() if "_norm" not in name]
    assert pool(2).run(frozen_norms) == [(names, {torch.float32})] * 2


def process_with(engine: str) -> int:
    assert type(wrap(engine, build("llama"))).__name__ == "DeepSpeedEngine"
    return os.getpid()


@pytest.mark.parametrize("engine", ["zero0", "zero3"])
def test_ranks_forget_an_autotp_engine(pool: PoolOf, engine: str) -> None:
    pool(2).stop()
    assert pool(2).run(process_with, "autotp") == pool(2).run(process_with, engine)


def unsupported() -> None:
    auto_tp(build("gpt2"))


def test_what_autotp_does_not_cut_is_refused(pool: PoolOf) -> None:
    for error in pool(2).errors(unsupported):
        assert error.startswith("ValueError: tensor_parallel.autotp_size is 2")
        assert "GPT2LMHeadModel" in error


def test_deepspeed_writes_where_it_cut_under_this_name() -> None:
    constants = pytest.importorskip("deepspeed.checkpoint.constants")
    assert constants.DS_AUTOTP_UC_META == LAYOUT


# By command.

AUTOTP = {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("engine", [{"kind": "fsdp2", "tensor_ranks": 2}, {"deepspeed": "ds.json"}])
def test_a_run_by_command_is_that_of_one_process(tmp_path: Path, engine: dict[str, Any]) -> None:
    if "deepspeed" in engine:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(AUTOTP))
        engine = {"kind": "deepspeed", "deepspeed": str(file)}
    assert as_on_one_process(tmp_path, engine)["ranks"] == 2


@pytest.mark.parametrize(
    ("tensor_ranks", "model", "words"),
    [
        (
            3,
            "llama",
            "engine.tensor_ranks is 3; it must divide the number of ranks, 2, and those of",
        ),
        (2, "gpt2", "add `base_model_tp_plan`"),
    ],
)
def test_what_no_plan_cuts_is_refused(tmp_path: Path, tensor_ranks: int, model: str, words: str) -> None:
    config = write_config(tmp_path, engine={"kind": "fsdp2", "tensor_ranks": tensor_ranks})
    if model == "gpt2":
        build(model).save_pretrained(tmp_path / "model")
    done = launch([["train", str(config)]] * 2)
    assert all(rank.returncode for rank in done)
    assert words in "".join(rank.stderr for rank in done)


# Where pieces lie: torch says it, by cutting the numbers of the elements.


def numbers(shape: tuple[int, ...], placement: Any) -> tuple[bool, Any]:
    """Does the span of a piece number its elements as they are? And its runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    param: Any = nn.Parameter(distribute_tensor(whole, mesh, [placement]), requires_grad=False)
    span = span_in(piece_of("w", param), "w", param.to_local())
    there = [span.number(j) for j in range(span.flat.numel())]
    back = [span.place(number) for number in there]
    return there == span.flat.tolist() and back == list(range(len(there))), span.runs


def test_a_span_numbers_its_elements_as_torch_cuts_them(pool: PoolOf) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    for shape, placement, runs in (
        ((6, 4), Replicate(), None),
        ((6, 4), Shard(0), None),
        ((7, 4), Shard(0), None),
        ((6, 4), Shard(1), Runs(2, 4)),
        ((3, 8, 5), Shard(1), Runs(20, 40)),
        ((3, 2, 8), Shard(2), Runs(4, 8)),
        ((8, 3), _StridedShard(0, split_factor=2), Runs(6, 12)),
        ((3, 8, 5), _StridedShard(1, split_factor=2), Runs(10, 20)),
        ((3, 8), _StridedShard(-1, split_factor=2), Runs(2, 4)),
    ):
        assert pool(2).run(numbers, shape, placement) == [(True, runs)] * 2, (shape, placement)
    # In 3 and 2 columns.
    results = pool(2).run(numbers, (4, 5), Shard(1))
    assert results == [(True, Runs(3, 5)), (True, Runs(2, 5))]
