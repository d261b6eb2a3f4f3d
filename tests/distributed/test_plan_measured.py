"""What `zo-dist plan` computes, against real runs: collectives and bytes exactly, memory within a tenth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import LENGTH, build, loss_of, rows_for
from planned import EITHER_WAY, config_of, mode_of, wide_llama
from transformers import AutoModelForCausalLM
from workers import Pool, deepspeed_engine, freed_at_once, needs_deepspeed

import zo_dist
from benchmarks import memory
from zo_dist.engines import DsConfig, read_ds_config
from zo_dist.planning.collectives import Counted, split
from zo_dist.planning.dry_run import dry_run
from zo_dist.planning.hardware import parse_cluster
from zo_dist.planning.plan import make_plan, outputs_of
from zo_dist.tasks import choice_loss
from zo_dist.train import build_optimizer

# Rows of a step on each rank.
ROWS = 4

SHARD = {"perturb": "shard"}
SETTINGS: dict[str, dict[str, Any]] = {
    **EITHER_WAY,
    "shard": {"directions": 3, **SHARD},
    **{f"{name}, shard": EITHER_WAY[name] | SHARD for name in ("directions per row", "conservative")},
    # Ranks that hold parts of the weights have it in this way alone.
    **{name: EITHER_WAY[name] | SHARD for name in ("curvature", "perturbation momentum")},
}


def ds_of(engine: str, model: Any, num_ranks: int) -> DsConfig:
    """`zero3` prefetches a fraction of a layer (the "auto" of transformers), `zero3_ahead` all there is."""
    zero: dict[str, Any] = {"stage": 3}
    if engine == "zero3":
        zero["stage3_prefetch_bucket_size"] = "auto"
    width, dtype = model.config.hidden_size, model.dtype
    return read_ds_config(
        {"zero_optimization": zero}, hidden_size=width, micro_batch=1, num_ranks=num_ranks, dtype=dtype
    )


def sharded(engine: str, model: Any) -> Any:
    """As `zo-dist train` shards it."""
    import torch.distributed as dist

    from zo_dist.engines.build import fsdp2_mesh, shard_with_fsdp2, zero3_engine, zero3_group

    if engine == "zero3_hsdp":
        return zero3_engine(model, ds_of(engine, model, dist.get_world_size()), zero3_group(2))
    if engine.startswith("zero3"):
        return deepspeed_engine(model, ds_of(engine, model, dist.get_world_size()).config)
    return shard_with_fsdp2(model, fsdp2_mesh(torch.device("cpu"), 2 if engine == "hsdp" else None))


def counted_step(engine: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    config = config_of(rows=ROWS * dist.get_world_size(), **settings)
    dtype = config.model.torch_dtype
    optimizer = build_optimizer(config, sharded(engine, build(kind, dtype)))
    batch = rows_for(kind, ROWS, seed=dist.get_rank())
    micro = config.train.micro_rows or ROWS
    batches = [{k: v[s : s + micro] for k, v in batch.items()} for s in range(0, ROWS, micro)]
    outputs, loss = outputs_of(config), loss_of
    if outputs:
        # As that of the task, in numbers.
        loss = zo_dist.Composite(lambda m, b: loss_of(m, b)[0][:, None], lambda o, _: o[:, 0], outputs)
    # The anchor's own step, and what ZeRO-3 learns from its first forwards.
    for _ in range(4):
        optimizer.step_batch(batches, loss)
    with Counted() as counted:
        optimizer.step_batch(batches, loss)
    # What one rank puts in, of weights: FSDP2 and ZeRO-3 gather by the same operator as scalars.
    weights, others = split(counted.calls, dtype, 2)
    rule = [t for kept in optimizer.rule.kept.values() for t in kept.values()]
    state = [*rule, *optimizer.steering.kept.values(), *optimizer.anchor.weights.values()]
    spans = optimizer.engine.spans(optimizer.params)
    return {
        "gathers": len(weights),
        "elements": sum(c[1] for c in weights),
        "put_in": sum(c[2] for c in weights) // dtype.itemsize,
        "exchanges": len(others),
        "scalars": sum(c[2] for c in others),
        "state": sum(t.nbytes for t in state),
        "lost": sum(t.nbytes for t in optimizer.rounding.lost.values()),
        "weights": sum(span.flat.nbytes for span in spans),
    }


KINDS = ("llama", "llama_tied", "opt", "mixtral")


@pytest.mark.parametrize(
    ("engine", "num_ranks", "kinds", "settings"),
    [
        *[("fsdp2", 2, ("llama_tied",), each) for each in SETTINGS],
        *[pytest.param("zero3", 2, ("llama_tied",), each, marks=needs_deepspeed) for each in SETTINGS],
        ("fsdp2", 2, KINDS, "dense"),
        pytest.param("zero3", 2, KINDS, "dense", marks=needs_deepspeed),
        pytest.param("zero3_ahead", 2, KINDS, "dense", marks=needs_deepspeed),
        ("hsdp", 4, ("llama",), "dense"),
        pytest.param("zero3_hsdp", 4, ("llama",), "dense", marks=needs_deepspeed),
    ],
)
def test_bytes_and_collectives_are_those_of_a_real_step(
    pool: Callable[[int], Pool], engine: str, num_ranks: int, kinds: tuple[str, ...], settings: str
) -> None:
    for kind in kinds:
        measured, *_ = pool(num_ranks).run(counted_step, engine, kind, SETTINGS[settings])
        kept_by = "zero3" if engine.startswith("zero3") else "fsdp2"
        section: dict[str, Any] = {}
        if engine.endswith("hsdp"):
            kinds = {"fsdp2": {"kind": "fsdp2"}, "zero3": {"kind": "deepspeed", "deepspeed": "ds.json"}}
            section = {**kinds[kept_by], "shard_ranks": 2}
        config = config_of(rows=ROWS * num_ranks, engine=section, **SETTINGS[settings])
        model = build(kind)
        plan = make_plan(
            config,
            model.config,
            parse_cluster(f"{num_ranks}xA100-40G"),
            length=LENGTH,
            answer=LENGTH - 1,
            ds=ds_of(engine, build(kind, config.model.torch_dtype), num_ranks),
        )
        planned = mode_of(plan, kept_by, config.optimizer.perturb)
        sent, kept = planned.traffic, planned.memory
        assert sent is not None, planned.refused
        assert kept is not None
        assert measured == {
            "gathers": sent.gathers,
            "elements": sent.elements,
            "put_in": sent.put_in,
            "exchanges": sent.exchanges,
            "scalars": sent.scalars,
            "state": kept.state,
            "lost": kept.lost,
            "weights": kept.weights - sum(b.nbytes for b in model.buffers()),
        }, kind
        (without_values,) = dry_run(dataclasses.replace(plan, modes=(planned,)), model.config)
        assert without_values.traffic.items() <= measured.items()


# Of the larger model, on each rank.
WIDE_ROWS, WIDE_LENGTH = 2, 128


def one_step(engine: str, settings: dict[str, Any], layers: int) -> Callable[[], float]:
    """What does a step of the larger model, after it has done three."""
    import torch.distributed as dist

    config = config_of(rows=WIDE_ROWS * dist.get_world_size(), **settings)
    model = AutoModelForCausalLM.from_config(wide_llama(layers), dtype=config.model.torch_dtype).eval()
    optimizer = build_optimizer(config, sharded(engine, model))
    ids = torch.randint(100, (WIDE_ROWS, WIDE_LENGTH))
    options = torch.tensor([[1, 2]] * WIDE_ROWS)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "option_ids": options}
    batch["label"] = torch.zeros(WIDE_ROWS, dtype=torch.int64)
    for _ in range(3):
        optimizer.step_batch(batch, choice_loss)
    return lambda: optimizer.step_batch(batch, choice_loss)


def peak_of_a_step(engine: str, settings: dict[str, Any]) -> int:
    """Bytes above what the process had before there was a model."""
    with freed_at_once():
        one_step(engine, settings, layers=1)  # what is loaded and compiled once
        memory.settled()
        before = memory.resident_bytes()
        return memory.peak_bytes(one_step(engine, settings, layers=6), torch.device("cpu")) - before


PLAIN = {"dtype": "bfloat16", "directions": 2}


@pytest.mark.parametrize(
    ("engine", "num_ranks", "settings", "perturb"),
    [
        *(("fsdp2", 2, PLAIN, perturb) for perturb in ("module", "shard")),
        *(pytest.param("zero3", 2, PLAIN, perturb, marks=needs_deepspeed) for perturb in ("module", "shard")),
        ("fsdp2", 2, EITHER_WAY["adam, kahan"], "module"),
        pytest.param("zero3", 2, EITHER_WAY["adam, kahan"], "shard", marks=needs_deepspeed),
        ("hsdp", 4, PLAIN, "module"),
    ],
)
def test_peak_memory_is_that_of_a_real_step(
    pool: Callable[[int], Pool], engine: str, num_ranks: int, settings: dict[str, Any], perturb: str
) -> None:
    """76 M weights in bfloat16, of which a rank holds half: 10% are 16 MB and more."""
    settings = {**settings, "perturb": perturb, "compile": True}
    measured = max(pool(num_ranks).run(peak_of_a_step, engine, settings))
    section = {"kind": "fsdp2", "shard_ranks": 2} if engine == "hsdp" else None
    config = config_of(rows=num_ranks * WIDE_ROWS, engine=section, **settings)
    ranks = parse_cluster(f"{num_ranks}xA100-40G")
    with torch.device("meta"):
        ds = ds_of(engine, AutoModelForCausalLM.from_config(wide_llama(), dtype=torch.bfloat16), num_ranks)
    plan = make_plan(config, wide_llama(), ranks, length=WIDE_LENGTH, ds=ds)
    planned = mode_of(plan, "zero3" if engine == "zero3" else "fsdp2", perturb).memory
    assert planned is not None
    assert measured == pytest.approx(planned.total, rel=0.1), planned
