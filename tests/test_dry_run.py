"""What a dry run counts of the code itself, beside what is planned; distributed/ has it beside real runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from planned import EITHER_WAY, config_of, wide_llama
from workers import HAVE_DEEPSPEED, Pool, environment, needs_deepspeed

from zo_dist.cli import main
from zo_dist.planning.dry_run import ENGINES, Stepped, dry_run
from zo_dist.planning.hardware import parse_cluster
from zo_dist.planning.plan import Plan, make_plan

LENGTH = 64
SETTINGS: dict[str, dict[str, Any]] = {
    **EITHER_WAY,
    "low rank": {"noise": "gaussian", "structure": {"name": "low_rank", "rank": 2, "refresh": 5}},
    "orthogonal": {"structure": {"name": "orthogonal"}, "directions": 4},
    "float16": {"dtype": "float16", "perturb": "module"},
    "anchor, every other step": {"directions": 2, "anchor": {"every": 2}, "perturb": "module"},
    "cast": {"engine": {"kind": "fsdp2", "compute_dtype": "bfloat16"}},
}


def plan_of(ranks: int, rows: int = 4, kinds: tuple[str, ...] = (), **settings: Any) -> Plan:
    config = config_of(rows=rows * ranks, **settings)
    cluster = parse_cluster(f"{ranks}xA100-40G")
    if config.engine.kind == "fsdp2":
        kinds = ("fsdp2",)
    engines = dict.fromkeys(kinds, False) or None
    return make_plan(config, wide_llama(2), cluster, length=LENGTH, engines=engines)


def stepped(*args: Any, **settings: Any) -> list[Stepped]:
    before = {**os.environ}, torch.nn.functional.linear
    found = list(dry_run(plan_of(*args, **settings), wide_llama(2)))
    assert not dist.is_initialized()
    assert ({**os.environ}, torch.nn.functional.linear) == before
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_does_what_is_planned(settings: str) -> None:
    """Bytes and collectives exactly, and memory too: both follow every storage of the same forward."""
    found = stepped(16 if settings == "dense" else 4, **SETTINGS[settings])
    gathered = {each.planned.name: each.traffic["elements"] for each in found}
    sharded = ["FSDP2", "ZeRO-3"] if HAVE_DEEPSPEED and settings != "cast" else ["FSDP2"]
    for name in sharded:
        assert (f"{name}, HSDP 2 x 8" in gathered) == (settings == "dense")
        assert gathered[name] > 0
    assert gathered.get("replicated", 0) == 0
    for each in found:
        assert each.differing == {}
        # By 3% where a probe of the plan has more rows than any of rank 0's. The write's float32 buffer,
        # which is kept from the first of two steps, is none of the forward's.
        kept = 2**22 if SETTINGS[settings].get("anchor") or each.planned.mode.engine == "zero3" else 0
        assert each.bytes - kept == pytest.approx(each.planned_bytes, rel=0.03)


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [
        (2, ("replicated", "fsdp2", "zero3")),
        # ZeRO-3 takes what it gathers apart by rank, 50,000 pieces here.
        (1024, ("replicated", "fsdp2")),
        pytest.param(64, ("zero3",), marks=needs_deepspeed),
    ],
)
def test_any_number_of_ranks(ranks: int, kinds: tuple[str, ...]) -> None:
    found = stepped(ranks, rows=1, kinds=kinds, perturb="module")
    assert {each.planned.mode.engine for each in found} == {*kinds} & {*ENGINES}
    for each in found:
        assert each.differing == {}, each.planned.name
        if each.planned.mode.engine != "replicated":
            assert each.traffic["elements"] > 0
            assert each.traffic["elements"] == pytest.approx(each.traffic["put_in"] * each.planned.mode.ranks)


def test_what_is_not_as_planned_is_told() -> None:
    (first, *_) = stepped(2, directions=2)
    planned = first.planned
    assert planned.traffic is not None
    assert planned.memory is not None
    traffic = dataclasses.replace(planned.traffic, scalars=planned.traffic.scalars + 8)
    memory = dataclasses.replace(planned.memory, weights=2 * planned.memory.weights)
    wrong = dataclasses.replace(
        first, planned=dataclasses.replace(planned, traffic=traffic, memory=memory)
    ).differing
    assert wrong["scalars"] == (first.traffic["scalars"], traffic.scalars)
    assert set(wrong) == {"scalars", "bytes"}


PLAN = ["plan", "smollm2-135m", "--gpus", "8xA100-40G", "--dry-run", "optimizer.perturb=module"]


@pytest.mark.parametrize(
    ("engine", "gathers"), [("fsdp2", 31), pytest.param("zero3", 152, marks=needs_deepspeed)]
)
def test_the_command(engine: str, gathers: int, capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--engine", engine, "--length", "32", "--json", "train.rows=8"])
    told = json.loads(capsys.readouterr().out)
    (of_run,) = told["dry_run"]
    (mode,) = told["modes"]
    assert of_run["traffic"].items() <= mode["traffic"].items()
    assert of_run["traffic"]["gathers"] == gathers
    assert of_run["differing"] == {}
    main([*PLAN, "--engine", engine, "--length", "32", "train.rows=8"])
    assert "Dry run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_of_30b_on_64_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "opt-30b", "--gpus", "64xA100-40G", "--dry-run", "--engine", "fsdp2", "--length", "32"]
    main([*plan, "--json", "train.rows=64", "optimizer.perturb=module"])
    told = json.loads(capsys.readouterr().out)
    ways = {each["name"]: each for each in told["dry_run"]}
    assert ways.keys() == {mode["name"] for mode in told["modes"] if not mode["refused"]}
    for each in ways.values():
        assert each["differing"] == {}
        # Every weight of 48 layers, the embeddings and the norm, once.
        assert each["traffic"]["elements"] > 29e9
        assert each["traffic"]["gathers"] >= 49


@needs_deepspeed
def test_what_deepspeed_tells_is_not_in_the_json(tmp_path: Path) -> None:
    given = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "dump_state": True}
    (tmp_path / "ds.json").write_text(json.dumps(given | {"train_batch_size": 8}))
    options = ["--length", "32", "--json", "--deepspeed", str(tmp_path / "ds.json")]
    command = [sys.executable, "-m", "zo_dist", *PLAN, *options]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment()})
    assert [each["differing"] for each in json.loads(ended.stdout)["dry_run"]] == [{}], ended.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["train.rows=12"], "train.rows=16"),
        (["--engine", "zero3", "--offload", "train.rows=8"], "nothing to run"),
    ],
)
def test_what_cannot_be_run_is_refused(
    more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, *more]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [({"scale": {"name": "learned", "path": "s"}}, "values"), ({"projection": {"every": 5}}, "searches")],
)
def test_what_a_step_does_not_show_is_refused(options: dict[str, Any], words: str) -> None:
    config = dataclasses.replace(plan_of(2).config, optimizer=config_of(rows=2, **options).optimizer)
    with pytest.raises(ValueError, match=words):
        list(dry_run(dataclasses.replace(plan_of(2), config=config), wide_llama(2)))


def in_a_group(plan: Plan) -> list[Stepped]:
    return list(dry_run(plan, wide_llama(2)))


def test_it_wants_no_process_group(pool: Callable[[int], Pool]) -> None:
    for error in pool(2).errors(in_a_group, plan_of(2)):
        assert "without torchrun" in error
