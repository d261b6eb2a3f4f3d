"""What a dry run counts of the code itself, beside what is planned; distributed/ has it beside real runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from planned import EITHER_WAY, config_of, wide_llama
from workers import Pool

from zo_dist.cli import main
from zo_dist.planning.dry_run import Stepped, dry_run
from zo_dist.planning.hardware import parse_cluster
from zo_dist.planning.plan import make_plan

LENGTH = 64
SETTINGS: dict[str, dict[str, Any]] = {
    **EITHER_WAY,
    "low rank": {"noise": "gaussian", "structure": {"name": "low_rank", "rank": 2, "refresh": 5}},
    "orthogonal": {"structure": {"name": "orthogonal"}, "directions": 4},
    "cast": {"engine": {"kind": "fsdp2", "compute_dtype": "bfloat16"}},
}


def stepped(ranks: int, rows: int = 4, **settings: Any) -> list[Stepped]:
    config = config_of(rows=rows * ranks, **settings)
    cluster = parse_cluster(f"{ranks}xA100-40G")
    engines = {"fsdp2": False} if config.engine.kind == "fsdp2" else None
    plan = make_plan(config, wide_llama(2), cluster, length=LENGTH, engines=engines)
    found = list(dry_run(config, wide_llama(2), plan.modes, ranks, LENGTH, 1))
    assert not dist.is_initialized()
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_does_what_is_planned(settings: str) -> None:
    """Bytes and collectives exactly, and memory too: both follow every storage of the same forward."""
    found = stepped(16 if settings == "dense" else 4, **SETTINGS[settings])
    gathered = {each.planned.name: each.traffic["elements"] for each in found}
    assert ("FSDP2, HSDP 2 x 8" in gathered) == (settings == "dense")
    assert gathered.pop("replicated", 0) == 0 < gathered["FSDP2"]
    for each in found:
        assert each.differing == {}
        # By 3% where a probe of the plan has more rows than any of rank 0's.
        assert each.bytes == pytest.approx(each.planned_bytes, rel=0.03)


@pytest.mark.parametrize("ranks", [2, 1024])
def test_any_number_of_ranks(ranks: int) -> None:
    found = stepped(ranks, rows=1, perturb="module")
    for each in found:
        assert each.differing == {}, each.planned.name
        if each.planned.mode.engine == "fsdp2":
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


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--engine", "fsdp2", "--length", "32", "--json", "train.rows=8"])
    told = json.loads(capsys.readouterr().out)
    (of_run,) = told["dry_run"]
    (mode,) = told["modes"]
    assert of_run["traffic"].items() <= mode["traffic"].items()
    assert of_run["traffic"]["gathers"] == 31
    assert of_run["differing"] == {}
    main([*PLAN, "--engine", "fsdp2", "--length", "32", "train.rows=8"])
    assert "Dry run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["train.rows=12"], "train.rows=16"),
        (["--engine", "zero3", "train.rows=8"], "nothing to run"),
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
    config = config_of(rows=2, **options)
    with pytest.raises(ValueError, match=words):
        list(dry_run(config, wide_llama(2), (), 2, LENGTH, 1))


def in_a_group() -> list[Stepped]:
    return list(dry_run(config_of(rows=2), wide_llama(2), (), 2, LENGTH, 1))


def test_it_wants_no_process_group(pool: Callable[[int], Pool]) -> None:
    for error in pool(2).errors(in_a_group):
        assert "without torchrun" in error
