"""The training program end to end: its result, its files, and what it says to bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
import yaml
from tiny_run import launch, result_of, tiny_config, write_config, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from workers import Pool

from zo_dist.batches import StepBatches
from zo_dist.cli import main
from zo_dist.config import Config, load_config
from zo_dist.engines import Engine
from zo_dist.settings import build
from zo_dist.tasks import EncodedRow
from zo_dist.train import prepare, run_training

ZERO3 = str(Path(__file__).parent.parent / "configs" / "ds_zero3.json")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run in one process, and its result."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(write_config(folder, train={"tensorboard": True}))]) == 0
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return folder, result


def test_a_run_leaves_its_files(one_process: tuple[Path, dict[str, Any]]) -> None:
    folder, result = one_process
    run = folder / "run"
    words = "accuracy_before accuracy_after loss_before loss_after steps seconds engine ranks"
    assert list(result) == words.split()
    assert (result["steps"], result["engine"], result["ranks"]) == (3, "replicated", 1)
    assert (run / "run.png").stat().st_size > 5000
    assert list((run / "tensorboard").iterdir())
    assert load_config(run / "config.yaml") == load_config(folder / "config.yaml", ["train.tensorboard=true"])
    events = [(r["event"], r.get("step"), r.get("split")) for r in records(run)]
    assert events == [
        ("run", None, None),
        ("eval", 0, "test"),
        ("step", 1, None),
        ("step", 2, None),
        ("eval", 2, "validation"),
        ("step", 3, None),
        ("eval", 3, "validation"),
        ("eval", 3, "test"),
        ("stop", None, None),
    ]
    step = records(run)[2]
    assert step["lr"] == 1e-3
    assert step["lr_factor"] == 1.0
    assert step["drawn"] == [2] * len(records(run)[0]["arms"])


def test_the_saved_model_gives_the_evaluated_score(one_process: tuple[Path, dict[str, Any]]) -> None:
    folder, result = one_process
    saved = folder / "run" / "last"
    assert main(["eval", str(saved), str(folder / "config.yaml")]) == 0
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert model.dtype == torch.float32
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.weight,
        AutoModelForCausalLM.from_pretrained(folder / "model").model.layers[0].mlp.up_proj.weight,
    )
    # By hand, one row at a time: no padding, no splits of ours but the rows.
    from zo_dist.data import load_data

    data = load_data(load_config(folder / "config.yaml").data, tokenizer, 48)
    correct, loss = 0.0, 0.0
    for row in data.test:
        with torch.no_grad():
            logits = model(torch.tensor([row.sequences[0][:-1]])).logits[0, -1]
        scores = logits[[tokens[-1] for tokens in row.sequences]].log_softmax(0)
        correct += float(scores.argmax() == row.label)
        loss -= float(scores[row.label])
    assert result["accuracy_after"] == correct / len(data.test)
    assert result["loss_after"] == pytest.approx(loss / len(data.test), rel=1e-5)


def test_a_run_folder_is_evaluated_with_its_own_config(
    one_process: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = one_process
    assert main(["eval", str(folder / "run"), "data.test=11"]) == 0
    assert result_of(capsys.readouterr().out)["rows"] == 11


def test_a_run_on_shards_is_evaluated_by_one_process(
    one_process: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = one_process
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    path = tmp_path / "shards.yaml"
    path.write_text(yaml.safe_dump(settings | {"engine": {"kind": "fsdp2", "shard_ranks": 2}}))
    assert main(["eval", str(folder / "run" / "last"), str(path)]) == 0
    assert result_of(capsys.readouterr().out)["rows"] == settings["data"]["test"]
    # Unless the engine is named.
    assert main(["eval", str(folder / "run" / "last"), str(path), "engine.kind=fsdp2"]) == 2
    assert "there is no process group" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fsdp2", []),
        ("replicated", ["engine.kind=replicated"]),
        ("fsdp2", ["engine.kind=fsdp2", "engine.shard_ranks=1"]),
        ("deepspeed", ["--deepspeed", ZERO3]),
        ("deepspeed", ["--deepspeed", ZERO3, "engine.kind=deepspeed", "engine.shard_ranks=1"]),
        ("replicated", ["--deepspeed", ZERO3.replace("zero3", "zero2")]),
    ],
    ids=["fsdp2", "replicated", "hsdp", "zero3", "zero3 in groups", "zero2"],
)
def test_two_ranks_train_the_same_run(
    one_process: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, args: list[str]
) -> None:
    folder, expected = one_process
    done = launch(["train", str(folder / "config.yaml"), f"train.output={tmp_path / 'run'}", *args])
    assert done.returncode == 0, done.stderr[-3000:]
    result = result_of(done.stdout)
    assert (result["engine"], result["ranks"]) == (name, 2)
    # The same rows, directions and noise; what differs is how many rows a forward multiplies at once.
    for key in ("loss_before", "loss_after"):
        assert result[key] == pytest.approx(expected[key], rel=1e-5)
    one = AutoModelForCausalLM.from_pretrained(folder / "run" / "last").state_dict()
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").state_dict()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-4, atol=1e-5)


def train_on_rank(path: Path, overrides: list[str]) -> dict[str, Any]:
    """How the model that a config asks for is sharded, and the result of training it."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    ranks = Engine(torch.nn.Identity(), torch.device("cpu"))
    config = load_config(path, overrides)
    model: Any = prepare(config, ranks).model
    groups = [model, *model.model.layers]
    # On CPU ranks offloading changes nothing that can be seen from outside FSDP2.
    policies = [group._get_fsdp_state()._fsdp_param_group.offload_policy for group in groups]
    result = run_training(config, ranks)
    return {
        "placements": {f"{p.placements} on {p.device_mesh.mesh.tolist()}" for p in model.parameters()},
        "offloaded": all(isinstance(policy, CPUOffloadPolicy) for policy in policies),
        "result": {key: value for key, value in result.items() if key != "seconds"},
    }


def test_sharding_keys_reach_the_model(
    one_process: tuple[Path, dict[str, Any]], pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    """HSDP, offload and a compute dtype in one run, from the config to the saved weights."""
    folder, expected = one_process
    overrides = ["engine.kind=fsdp2", "engine.shard_ranks=2", "engine.offload_to_cpu=true"]
    overrides += ["engine.compute_dtype=bfloat16", f"train.output={tmp_path / 'run'}"]
    results = pool(4).run(train_on_rank, folder / "config.yaml", overrides)
    for got in results:
        assert got == results[0]
        assert got["placements"] == {"(Replicate(), Shard(dim=0)) on [[0, 1], [2, 3]]"}
        assert got["offloaded"]
    # bfloat16 in the forward, float32 in the weights that were stored, written and saved.
    loss = results[0]["result"]["loss_before"]
    assert loss != pytest.approx(expected["loss_before"], rel=1e-6)
    assert loss == pytest.approx(expected["loss_before"], rel=1e-2)
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").state_dict()
    for key, weight in after.items():
        assert not torch.equal(weight, before[key])
        assert not torch.equal(weight, weight.bfloat16().float())


def test_more_ranks_than_rows_and_uneven_micro_batches(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"rows": 1, "eval_micro_rows": 100}, optimizer={"directions": 1})
    done = launch(["train", str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    path = write_config(tmp_path, train={"rows": 5, "micro_rows": 2, "existing": "replace"})
    done = launch(["train", str(path), "--deepspeed", ZERO3])
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rank_without_rows_of_a_task_of_one_option(tmp_path: Path) -> None:
    rows = [
        {"context": "A cat sat.", "question": f"Who sat {i}?", "title": "t", "answers": {"text": ["A cat"]}}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_config(tmp_path, data={"task": "squad"}, train={"rows": 1}, optimizer={"directions": 1})
    done = launch(["train", str(path), "data.max_new_tokens=2", "train.eval_every=0"])
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_home_folder_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_config(tmp_path, train={"output": "~/run", "save_best": False, "eval_every": 0})
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_what_lies_in_the_folder_of_a_new_run_stays(tmp_path: Path) -> None:
    mine = tmp_path / "run" / "report"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    path = write_config(tmp_path, train={"save_best": False, "eval_every": 0, "steps": 1})
    assert main(["train", str(path)]) == 0
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_only_the_named_parameters_move(tmp_path: Path) -> None:
    path = write_config(tmp_path, model={"parameters": r"layers\.[12]\.mlp"}, train={"save_best": False})
    assert main(["train", str(path)]) == 0
    assert records(tmp_path / "run")[0]["trained_parameters"] == 2 * 3 * 32 * 48
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "last").state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "layers.1.mlp" in name or "layers.2.mlp" in name}
    assert not (tmp_path / "run" / "best").exists()


def test_long_rows_are_truncated_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    with rows.open("a") as file:
        for _ in range(10):
            file.write(json.dumps({"text": "dull " * 60, "label": 0}) + "\n")
    path = write_config(tmp_path, data={"train": 40, "validation": 10, "test": 20})
    assert main(["train", str(path)]) == 0
    assert records(tmp_path / "run")[0]["rows_truncated"] == 10
    assert "10 of 70 rows were longer than 48 tokens" in caplog.text


def test_time_limit_stops_the_run(tmp_path: Path) -> None:
    path = write_config(tmp_path, train={"steps": 10_000, "max_seconds": 0.5, "eval_every": 0})
    assert main(["train", str(path)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["steps"] < 10_000
    assert result["seconds"] >= 0.5


def _bad_label(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"text": "fine", "label": 7}\n' * 60)
    return {}


def _empty(folder: Path) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text("")
    return {}


def _no_config(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"model": {"source": str(folder / "empty")}}


BAD_INPUT = {
    "unknown key": (lambda _: {"train": {"step": 3}}, "unknown key train.step; did you mean steps"),
    "wrong type": (lambda _: {"train": {"steps": "3"}}, "train.steps is '3'"),
    "eps": (lambda _: {"optimizer": {"eps": 0}}, "optimizer.eps is 0.0"),
    "lr": (lambda _: {"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan"),
    "ratio": (
        lambda _: {"optimizer": {"sampler": {"name": "adalezo", "ratio": 2}}},
        "optimizer.sampler.ratio is 2.0; it must lie in (0, 1]",
    ),
    "labels outside the verbaliser": (_bad_label, "legal values: 0, 1"),
    "empty data set": (_empty, "rows.jsonl holds no row"),
    "too few rows": (lambda _: {"data": {"train": 4000}}, "ask for fewer"),
    "missing model": (lambda _: {"model": {"source": "./nowhere"}}, "there is nothing at"),
    "folder without a model": (_no_config, "model.source: cannot load"),
    "missing data": (lambda _: {"data": {"source": "/nowhere.jsonl"}}, "there is nothing at"),
    "unknown task": (lambda _: {"data": {"task": "sst3"}}, "did you mean 'sst2'"),
    "groups that shard nothing": (
        lambda _: {
            "engine": {"kind": "deepspeed", "deepspeed": ZERO3.replace("zero3", "zero2"), "shard_ranks": 2}
        },
        "ds_zero2.json is of stage 2, which shards no weights",
    ),
    "pattern that matches nothing": (
        lambda _: {"model": {"parameters": "layer_9"}},
        "'layer_9', which is found in no parameter's name",
    ),
    "no regular expression": (lambda _: {"model": {"parameters": "("}}, "not a regular expression"),
    "missing ds_config": (lambda _: {"engine": {"deepspeed": "none.json"}}, "no file 'none.json'"),
    "no launcher": (lambda _: {"engine": {"kind": "fsdp2"}}, "torchrun"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BAD_INPUT[name]
    tiny_config(tmp_path)
    path = write_config(tmp_path, **change(tmp_path))
    assert main(["train", str(path)]) == 2
    errors = capsys.readouterr().err
    assert words in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert "error: there is no config file 'nowhere.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            [["{config}", "optimizer.seed=0"], ["{config}", "optimizer.seed=1"]],
            "ranks disagree on the config: optimizer.seed",
        ),
        # Rank 0 tells what went wrong on rank 1.
        ([["{config}"], ["none.yaml"]], "rank 1 failed: there is no config file"),
        ([["{config}", "train.steps=0"]] * 2, "train.steps is 0"),
    ],
    ids=["different settings", "a file missing on one rank", "the same mistake on all"],
)
def test_a_mistake_on_some_rank_stops_all(tmp_path: Path, args: list[list[str]], words: str) -> None:
    config = str(write_config(tmp_path))
    ended = workers.launch([["train", *(arg.format(config=config) for arg in mine)] for mine in args])
    errors = "".join(rank.stderr for rank in ended)
    assert [rank.returncode for rank in ended] == [2, 2], errors
    assert f"error: {words}" in errors.replace("stopped because ", "")
    assert errors.count("error: ") == 1


def _batches(rank: int, num_ranks: int, rows: int = 23, **options: Any) -> StepBatches:
    lengths = [3 + (7 * i) % 11 for i in range(rows)]
    encoded = [EncodedRow(((i, *[1] * n), (i, *[1] * n)), (1, 1), 0) for i, n in enumerate(lengths)]
    settings = {"rows_per_step": 5, "micro_rows": None, "length_pool": 1, "seed": 3} | options
    cpu = torch.device("cpu")
    return StepBatches(encoded, **settings, rank=rank, num_ranks=num_ranks, pad_id=0, fast=False, device=cpu)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("options", [{}, {"length_pool": 2}, {"micro_rows": 2}], ids=str)
def test_ranks_cut_the_same_batches(num_ranks: int, options: dict[str, Any]) -> None:
    def ids(batches: StepBatches, step: int) -> list[int]:
        found = []
        for batch in batches[step]:
            tokens, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
            found += [int(t[m.bool()][0]) for t, m in zip(tokens, mask, strict=True)]
            assert len(tokens) <= (options.get("micro_rows") or 5)
        return found

    whole = _batches(0, 1, **options)
    cut = [_batches(k, num_ranks, **options) for k in range(num_ranks)]
    for step in (0, 1, 5, 3, 4, 9):
        assert [i for batches in cut for i in ids(batches, step)] == ids(whole, step)
    epoch = [i for step in range(4) for i in ids(whole, step)]
    assert len(set(epoch)) == 20  # every row at most once per epoch
    assert epoch != [i for step in range(4, 8) for i in ids(whole, step)]


def test_length_pools_save_padding() -> None:
    def padded(length_pool: int) -> int:
        batches = _batches(0, 1, rows=200, length_pool=length_pool)
        return sum(batches[step][0]["input_ids"].numel() for step in range(40))

    assert padded(8) < 0.85 * padded(1)


def test_the_tiny_config_is_one(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    assert build(Config, tiny_config(tmp_path)).train.rows == 4
