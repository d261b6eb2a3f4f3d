"""A config file becomes a Config, or an error that names the key, the value and what is legal."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import build, loss_of, rows_for

import zo_dist
from benchmarks.accuracy import METHODS, QUICKSTART
from zo_dist.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    load_config,
)
from zo_dist.learn_scale import new_nets
from zo_dist.methods import (
    AdaLeZOConfig,
    AnyCoefficients,
    AnyRule,
    AnySampler,
    AnyScale,
    AnyStructure,
    LearnedScaleConfig,
)
from zo_dist.params import trainable_params
from zo_dist.scale import save_nets
from zo_dist.schedule import lr_share
from zo_dist.structure import noise_of
from zo_dist.train import build_optimizer

BASE = """
model: {source: m}
data: {task: sst2, source: d}
optimizer: {lr: 1e-6}
train: {steps: 10}
"""
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(BASE)
    return path


def test_defaults_and_yaml_floats(path: Path) -> None:
    config = load_config(path)
    assert config.optimizer.lr == 1e-6  # YAML 1.1 would read a string
    assert config.engine.kind == "auto"
    assert isinstance(config.optimizer.sampler.build(), zo_dist.Dense)


def test_overrides_are_typed_and_the_last_one_wins(path: Path) -> None:
    config = load_config(
        path,
        [
            "optimizer.sampler={name: adalezo, clip: .inf}",
            "optimizer.sampler.ratio=1",
            "train.micro_rows=4",
            "train.micro_rows=null",
            "model.parameters=layers\\.1\\.",
            "optimizer.lr=2E-3",
        ],
    )
    assert config.optimizer.sampler == AdaLeZOConfig(ratio=1.0, clip=math.inf)
    assert config.train.micro_rows is None
    assert config.model.parameters == "layers\\.1\\."
    assert config.optimizer.lr == 2e-3


@pytest.mark.parametrize(
    ("section", "made"),
    [
        ("null", None),
        ("{name: flipout}", zo_dist.Flipout()),
        ("{name: orthogonal}", zo_dist.Orthogonal()),
        ("{name: low_rank, rank: 3, refresh: 7}", zo_dist.LowRank(rank=3, refresh=7)),
        ("{name: low_rank, fixed: true}", zo_dist.LowRank(fixed=True)),
    ],
)
def test_a_structure_is_made_of_its_section(path: Path, section: str, made: object) -> None:
    config = load_config(path, [f"optimizer.structure={section}"])
    optimizer = build_optimizer(config, build("sequential"))
    expected = noise_of("rademacher", 0, True, made, {})  # type: ignore[arg-type]
    assert optimizer.noise.kind == expected.kind


def test_arms_are_those_of_the_expression(path: Path) -> None:
    config = load_config(path, ["optimizer.arms=second"])
    names = [arm.name for arm in build_optimizer(config, build("sequential")).arms]
    assert names == ["0", "2", "2.second", "3", "4", "5"]


def test_written_out_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optimizer.sampler={name: adalezo, clip: .inf}", "optimizer.lr=1e-7"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.rl=1", ["unknown key optimizer.rl", "lr"]),
        ("optimiser.lr=1", ["unknown key optimiser", "optimizer"]),
        ("train.steps=many", ["train.steps", "'many'", "an integer"]),
        ("train.steps=1.5", ["train.steps", "1.5", "an integer"]),
        ("train.steps=true", ["train.steps", "True", "an integer"]),
        ("optimizer.lr=1" + "0" * 400, ["optimizer.lr", "401 digits"]),
        ("optimizer.compile=1", ["optimizer.compile", "true or false"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "a number"]),
        ("optimizer.lr=0", ["optimizer.lr", "above 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan"]),
        ("optimizer.eps=-1e-3", ["optimizer.eps", "above 0"]),
        ("optimizer.eps=.nan", ["optimizer.eps", "nan"]),
        ("optimizer.eps=.inf", ["optimizer.eps", "finite"]),
        ("optimizer.perturb=weights", ["optimizer.perturb", "module", "shard"]),
        ("optimizer.rounding=up", ["stochastic", "kahan", "nearest"]),
        ("optimizer.sampler={name: bandit}", ["optimizer.sampler.name", "dense, uniform, adalezo"]),
        ("optimizer.sampler={name: dense, ratio: 0.1}", ["unknown key optimizer.sampler.ratio"]),
        ("optimizer.sampler={name: uniform, ratio: 0.1}", ["unknown key", "sparsity"]),
        ("optimizer.sampler={name: adalezo, ratio: 0}", ["optimizer.sampler.ratio is 0.0", "(0, 1]"]),
        ("optimizer.sampler={name: adalezo, ratio: 1.1}", ["ratio is 1.1", "(0, 1]"]),
        ("optimizer.sampler=adalezo", ["optimizer.sampler is 'adalezo'"]),
        ("optimizer.directions=17", ["optimizer.directions is 17", "train.rows"]),
        ("optimizer.directions_per_row=2", ["directions_per_row is 2", "divide directions (1)"]),
        ("optimizer.directions_per_row=0", ["directions_per_row is 0", "at least 1"]),
        ("data.train=0", ["data.train is 0"]),
        ("data.train=15", ["train.rows is 16", "data.train (15)"]),
        ("data.validation=-1", ["data.validation"]),
        ("train.warmup_steps=10", ["train.warmup_steps is 10", "below steps"]),
        ("train.final_fraction=2", ["train.final_fraction", "[0, 1]"]),
        ("train.final_fraction=0.1", ["train.final_fraction is 0.1", "schedule is constant", "linear"]),
        ("engine.kind=fsdp", ["auto, replicated, fsdp2, deepspeed"]),
        ("engine.kind=deepspeed", ["engine.deepspeed is null", "ds_config.json"]),
        ("engine.shard_ranks=2", ["engine.shard_ranks is 2", "kind is auto", "kind to fsdp2", "to null"]),
        (
            "optimizer.rule={name: momentum, factored: true}",
            ["factored is true", "structure LowRank"],
        ),
        (
            "optimizer.structure={name: low_rank, orthonormal: true}",
            ["orthonormal", "gaussian"],
        ),
        ("optimizer={lr: 1, directions: 70000}", ["directions is 70000", "at most 65535"]),
        ("engine={kind: fsdp2, shard_ranks: 0}", ["engine.shard_ranks is 0", "at least 1"]),
        (
            "engine={kind: fsdp2, compute_dtype: bf16}",
            ["engine.compute_dtype is 'bf16'", "bfloat16, float16"],
        ),
        (
            "engine={kind: replicated, compute_dtype: bfloat16}",
            ["engine.compute_dtype is bfloat16", "kind is replicated", "kind to fsdp2", "model.dtype"],
        ),
        (
            "engine={kind: deepspeed, deepspeed: ds.json, offload_to_cpu: true}",
            ["engine.offload_to_cpu is True", "kind is deepspeed", "to false", "offload_param.device is cpu"],
        ),
        (
            "engine={kind: fsdp2, tensor_ranks: 2, shard_ranks: 2}",
            ["engine.shard_ranks is 2", "tensor_ranks is 2", "or shard_ranks to null"],
        ),
        (
            "engine={kind: fsdp2, tensor_ranks: 2, offload_to_cpu: true}",
            ["engine.offload_to_cpu is True", "tensor_ranks to null, or offload_to_cpu to false"],
        ),
        ("engine={kind: fsdp2, tensor_ranks: 1}", ["engine.tensor_ranks is 1", "at least 2"]),
        ("engine.tensor_ranks=2", ["engine.tensor_ranks is 2", "kind to fsdp2", "autotp_size"]),
        ("model.dtype=bf16", ["model.dtype", "'bf16'", "bfloat16, float16, float32"]),
        ("model=opt", ["model is 'opt'"]),
        ("train.steps", ["not of the form section.key=value"]),
        ("train.steps=[1", ["not valid YAML"]),
        ("train.steps.more=1", ["train.steps is 10"]),
    ],
)
def test_mistakes_are_named(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        load_config(path, [override])
    for word in words[1:]:
        assert word in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_what_benchmarks_run_are_settings(method: str) -> None:
    assert load_config(QUICKSTART, METHODS[method]).optimizer.lr > 0


KEYS = sorted(
    {
        *Config(
            model=ModelConfig(source="m"),
            data=DataConfig(task="sst2", source="d"),
            optimizer=OptimizerConfig(lr=1e-6, sampler=AdaLeZOConfig()),
            train=TrainConfig(steps=10),
        ).flat(),
        *("model", "optimizer.sampler", "train.step", "engine.kind.x", "nothing", "data."),
    }
)
VALUES = [
    *(
        "null",
        "true",
        "no",
        "-1",
        "0",
        "1",
        "7",
        "0.5",
        "-0.0",
        ".nan",
        ".inf",
        "1e400",
        "99999999999999999999",
    ),
    *("''", "text", "adalezo", "fsdp2", "bfloat16", "[]", "[1, 2]", "{}", "{name: dense}", "{a: 1}", "0x10"),
    *("2026-11-22", "~", "!!python/object:os.system x", "{", "&a [*a]", "'1'", "\\u0000", "1_000", "\t"),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_any_value_of_any_key_is_taken_or_refused_by_name(path: Path, changes: list[tuple[str, str]]) -> None:
    """No other exception, nothing ignored: what is taken is in the config and reads back the same."""
    overrides = [f"{key}={value}" for key, value in changes]
    refused: ValueError | None = None
    try:
        config = load_config(path, overrides)
    except ValueError as error:
        refused = error
    if refused is not None:
        words = [word for key, _ in changes for word in key.split(".")]
        assert any(word in str(refused) for word in words), str(refused)
        return
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml())
    assert repr(load_config(again)) == repr(config)
    key, value = changes[-1]
    if key in config.flat() and value in ("0", "1", "7", "0.5"):
        assert config.flat()[key] == float(value) or config.flat()[key] == value


def test_a_key_given_twice_is_an_error(path: Path) -> None:
    path.write_text(BASE + "data: {task: boolq, source: d}\n")
    with pytest.raises(ValueError, match="'data' is given twice"):
        load_config(path)


def test_missing_keys_and_files(path: Path, tmp_path: Path) -> None:
    path.write_text(BASE.replace("lr: 1e-6", ""))
    with pytest.raises(ValueError, match=r"optimizer\.lr is missing"):
        load_config(path)
    path.write_text(BASE.replace("model: {source: m}", ""))
    with pytest.raises(ValueError, match=r"model\.source is missing"):
        load_config(path)
    path.write_text("just words")
    with pytest.raises(ValueError, match="mapping of sections"):
        load_config(path)
    with pytest.raises(ValueError, match="no config file"):
        load_config(tmp_path / "none.yaml")


def test_the_schedule_warms_up_and_ends_at_its_fraction() -> None:
    def shares(**options: object) -> list[float]:
        config = TrainConfig(steps=6, **options)  # type: ignore[arg-type]
        return [round(lr_share(step, config), 6) for step in range(7)]

    assert shares() == [1.0] * 7
    assert shares(schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert shares(schedule="linear", final_fraction=0.4)[-1] == 0.4
    cosine = shares(schedule="cosine", final_fraction=0.1)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == 1.0
    assert cosine[-1] == 0.1


CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_of_the_repository_reads(path: Path) -> None:
    """And none writes where another does, where it would be taken for the same run."""
    assert load_config(path).train.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_takes_steps(path: Path, tmp_path: Path) -> None:
    """On a model of a hundred weights, in the dtype of the recipe and with its rows."""
    config = load_config(path)
    model = build("sequential", config.model.torch_dtype)
    if isinstance(config.optimizer.scale, LearnedScaleConfig):
        # It is learnt for its model.
        params = trainable_params(model, lambda p: p.shape)
        save_nets(tmp_path / "scale", new_nets(len(params), seed=0), params, 240, {})
        config = load_config(path, [f"optimizer.scale.path={tmp_path / 'scale'}"])
    if config.optimizer.projection is not None:
        # This model has other names. The third step is one of a search.
        search = {"parameters": "null", "every": 2, "iterations": 1}
        config = load_config(path, [f"optimizer.projection.{key}={value}" for key, value in search.items()])
    optimizer = build_optimizer(config, model)
    moves = 0
    for step in range(4):
        count = config.train.anchor_rows if optimizer.anchor.due(step) else None
        rows = rows_for("sequential", count or config.train.rows, seed=step, dtype=config.model.torch_dtype)
        optimizer.step_batch(rows, loss_of)
        # With an lr of 1e-7, few of so few 16-bit weights move, or none: an arm of 8 of them may leave both
        # losses the same, and there is nothing between them and an anchor.
        moves += any(scale for scales in optimizer.record.scales for scale in scales)
    assert moves >= (1 if optimizer.anchor.every else 3)
    assert optimizer.skipped == 0


SECTIONS = [
    section
    for kinds in (AnySampler, AnyCoefficients, AnyRule, AnyScale, AnyStructure)
    for section in get_args(kinds)
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_what_a_section_leaves_out_is_as_the_class_has_it(section: Any) -> None:
    """And it has all of its options, but for weight decay, which has a key beside the rules."""
    of_class = {n: p.default for n, p in inspect.signature(section.makes).parameters.items()}
    of_class.pop("weight_decay", None)
    absent = inspect.Parameter.empty, dataclasses.MISSING
    of_section = {field.name: field.default for field in dataclasses.fields(section) if field.name != "name"}
    assert of_section.keys() == of_class.keys()
    for name, default in of_section.items():
        assert default == of_class[name] or (default in absent and of_class[name] in absent), name


@pytest.mark.parametrize(("part", "kinds"), [("sampler", AnySampler), ("rule", AnyRule)])
def test_every_sampler_and_rule_has_a_recipe(part: str, kinds: Any) -> None:
    used = {type(getattr(load_config(path).optimizer, part)) for path in CONFIGS}
    assert used == set(get_args(kinds))
