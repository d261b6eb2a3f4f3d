"""What a plan says of shapes, settings and clusters, by hand where a hand can; distributed/ measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import build
from planned import EITHER_WAY, config_of, mode_of, wide_llama
from transformers import AutoModelForCausalLM

import zo_dist
from zo_dist.cli import main
from zo_dist.config import load_config
from zo_dist.planning.hardware import GPUS, parse_cluster
from zo_dist.planning.meta import Rows, busiest_rows, trace_forward, trace_step
from zo_dist.planning.plan import Plan, make_plan
from zo_dist.planning.shapes import SHAPES, read_shape

# Published: the safetensors headers of the hub repositories (Qwen3-0.6B's head is its embedding and counts
# once), and of OPT, which has none, by hand from table 1 of arXiv 2205.01068 and its 2,050 positions.
PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    source, shape = read_shape(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert read_shape(source.upper())[0] == source == SHAPES[name][0]


def small(**settings: Any) -> Plan:
    settings = {"rows": 16, "dtype": "bfloat16", **settings}
    return make_plan(config_of(**settings), wide_llama(), parse_cluster("2xA100-40G"), length=64)


def test_memory_by_hand() -> None:
    """Of a Llama: every part of FSDP2's figures, and the parts of others that differ."""
    hidden, inner, layers, kv, vocabulary = 1024, 2816, 6, 256, 8192
    of_layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * inner * hidden + 2 * hidden
    of_rest = vocabulary * hidden + hidden
    whole = layers * of_layer + of_rest
    plan = small(directions=2, rows=64)
    assert plan.facts["parameters"] == whole
    assert plan.facts["tied"]
    memory = mode_of(plan, "fsdp2", "module").memory
    buffers = 2 * 32 * 4  # rotary frequencies and their originals, float32
    # bfloat16, cut in two; every dimension here is even.
    assert memory is not None
    assert memory.weights == whole + buffers
    # The rest, one layer whole, and the buffer that it came in.
    assert memory.gathered == 2 * (of_rest + 2 * of_layer)
    # With fewer rows most is needed where a layer is copied out of its buffer, beside the last one's.
    few = mode_of(small(directions=2), "fsdp2", "module").memory
    assert few is not None
    assert few.gathered == 2 * (of_rest + 3 * of_layer)
    # The larger product's weight, for both sides of a direction; of many tokens the embedding's stays.
    assert few.scratch == 2 * 2 * inner * hidden
    assert memory.scratch == 2 * 2 * vocabulary * hidden
    # 32 rows of 64 tokens on both sides: gate and up, what is made of them, an input, and what it began with.
    tokens = 2 * 32 * 64
    least, most = 2 * tokens * (3 * inner + hidden), 2 * tokens * (4 * inner + 4 * hidden)
    assert least < memory.activations < most
    assert memory.state == memory.lost == memory.snapshot == 0
    replicated = mode_of(plan, "replicated", "module").memory
    assert replicated is not None
    assert (replicated.weights, replicated.gathered) == (2 * whole + buffers, 0)
    # 1-D weights of an odd number of elements are padded.
    shard = mode_of(plan, "zero3", "shard").memory
    assert shard is not None
    assert shard.snapshot == whole
    offloaded = mode_of(plan, "zero3", "module", offload=True).memory
    assert offloaded is not None
    assert (offloaded.weights, offloaded.host) == (buffers, 2 * whole)


def test_shards_may_have_another_dtype_than_what_is_gathered() -> None:
    same = mode_of(small(), "fsdp2", "module")
    engine = {"kind": "fsdp2", "compute_dtype": "bfloat16"}
    mixed = mode_of(small(dtype="float32", engine=engine, rule={"name": "momentum"}), "fsdp2", "module")
    assert same.memory is not None
    assert mixed.memory is not None
    buffers = 2 * 32 * 4
    assert mixed.memory.weights - buffers == 2 * (same.memory.weights - buffers)
    assert mixed.memory.activations == same.memory.activations
    assert mixed.memory.gathered == same.memory.gathered
    assert mixed.traffic == same.traffic


STATES = {
    "sgd": ({}, 0),
    "momentum": ({"rule": {"name": "momentum"}}, 4),
    "adam": ({"rule": {"name": "adam"}}, 8),
    "amsgrad": ({"rule": {"name": "adam", "amsgrad": True}}, 12),
    "kahan": ({"rounding": "kahan"}, 2),
    "anchor": ({"anchor": {"every": 10}}, 2),
    "jacobian": ({"jacobian": {}}, 0),
    "projection": ({"projection": {"every": 10, "parameters": None}}, 2),
    "projection_on_cpu": ({"projection": {"every": 10, "parameters": None, "on_cpu": True}}, 0),
    "curvature": ({"estimator": "three_sided", "curvature": {"smoothing": 0.1}, "perturb": "shard"}, 4),
    "perturbation momentum": ({"perturbation_momentum": {}, "perturb": "shard"}, 4),
}


@pytest.mark.parametrize("settings", STATES)
def test_states_by_hand(settings: str) -> None:
    """Bytes for each of the weights that a rank holds."""
    options, each = STATES[settings]
    plan = small(**options)
    memory = mode_of(plan, "fsdp2", "shard").memory
    assert memory is not None
    assert memory.state + memory.lost == each * plan.facts["parameters"] // 2


def test_a_window_is_written_whole() -> None:
    """By hand: a weight of 2 bytes is read and written, with 8 bytes for each step's group of directions."""

    def update(**options: Any) -> float:
        seconds = mode_of(small(directions=2, **options), "fsdp2", "module").seconds
        assert seconds is not None
        return seconds.update

    assert update(jacobian={"window": 3}) == pytest.approx(update() * (4 + 3 * 8) / (4 + 8))
    # Each direction draws a quarter: two of one step .44 of the weights, six of three .82.
    few = {"name": "uniform", "sparsity": 0.75}
    assert 2 < update(jacobian={"window": 3}, sampler=few) / update(sampler=few) < 3


def test_starting_weights_may_be_the_hosts() -> None:
    """Those of keys and values, of two ranks of one node; a search copies their shards."""
    keys_and_values = 2 * 2 * 6 * 256 * 1024
    plan = small(projection={"every": 10, "on_cpu": True})
    for perturb in ("module", "shard"):
        memory = mode_of(plan, "fsdp2", perturb).memory
        assert memory is not None
        assert memory.host == keys_and_values
        assert memory.snapshot == (
            keys_and_values // 2 if perturb == "module" else 2 * plan.facts["parameters"] // 2
        )


def test_momentum_of_one_side_is_small() -> None:
    options = {"structure": {"name": "low_rank", "rank": 2}, "noise": "gaussian"}
    plan = small(rule={"name": "momentum", "factored": True}, **options)
    memory = mode_of(plan, "fsdp2", "module").memory
    assert memory is not None
    # Rank numbers for each row; norms have all of theirs.
    rows = 8192 + 6 * (2 * 1024 + 2 * 256 + 2 * 2816 + 1024)
    assert memory.state == 4 * (2 * rows + 13 * 1024) // 2


def test_flops_are_those_of_the_weights_that_tokens_meet() -> None:
    plan = small(directions=1)
    hidden, inner, layers, kv, heads = 1024, 2816, 6, 256, 16
    tokens, rows = 2 * 8 * 64, 2 * 8
    matrices = layers * (2 * hidden * hidden + 2 * kv * hidden + 3 * inner * hidden)
    attention = layers * 4 * rows * 64 * 64 * heads * (hidden // heads)
    head = 2 * rows * 8192 * hidden
    rotary = 2 * 32 * 64  # position times frequency
    assert plan.facts["flops"] - (2 * tokens * matrices + attention + head) in range(rotary * rows + 1)


def test_of_experts_the_flops_are_of_those_chosen_and_the_bytes_of_all() -> None:
    model = build("mixtral").config
    plan = make_plan(config_of(rows=4), model, parse_cluster("2xA100-40G"), length=6)
    tokens, hidden, inner, layers, chosen, experts = 2 * 2 * 6, 16, 24, 2, 2, 4
    of_experts = 2 * tokens * layers * chosen * 3 * hidden * inner
    assert of_experts < plan.facts["flops"] < 2 * of_experts
    sent = mode_of(plan, "fsdp2", "module").traffic
    assert sent is not None
    assert sent.elements > layers * experts * 3 * hidden * inner


def test_a_model_that_reads_its_data_is_refused() -> None:
    shape = build("mixtral").config
    shape._experts_implementation = "eager"
    with pytest.raises(ValueError, match="depends on the values of its data"):
        make_plan(config_of(rows=4), shape, parse_cluster("2xA100-40G"), length=6)


@pytest.mark.parametrize("settings", ["curvature", "perturbation momentum"])
def test_what_is_kept_in_parts_is_refused_where_zero_order_refuses_it(settings: str) -> None:
    plan = small(**EITHER_WAY[settings])
    refused = {(p.mode.engine, p.mode.perturb) for p in plan.modes if p.refused}
    assert refused == {("fsdp2", "module"), ("zero3", "module")}
    assert "perturb: shard" in mode_of(plan, "fsdp2", "module").refused
    assert plan.recommended is not None
    assert not plan.recommended.refused


@pytest.mark.parametrize(
    "settings",
    [
        {"structure": {"name": "flipout"}},
        {"structure": {"name": "orthogonal"}},
        {"mask": {"share": 0.5}},
        {"sampler": {"name": "uniform", "sparsity": 0.5}, "directions": 4},
        {"sampler": {"name": "fitted_adalezo"}, "estimator": "one_sided"},
        {"clip_rows": 10.0, "coefficients": {"name": "rms"}, "scale": {"name": "running"}},
    ],
)
def test_every_part_of_a_step_is_planned(settings: dict[str, Any]) -> None:
    plan = small(**settings)
    assert all(p.memory and p.memory.total > p.memory.weights for p in plan.modes)


def test_fewer_arms_cost_less_time_and_no_less_memory() -> None:
    dense, few = small(directions=2), small(directions=2, sampler={"name": "adalezo", "ratio": 0.15})
    one, other = mode_of(dense, "fsdp2", "module"), mode_of(few, "fsdp2", "module")
    assert one.memory == other.memory
    assert one.seconds is not None
    assert other.seconds is not None
    assert other.seconds.noise < one.seconds.noise / 2
    assert other.seconds.update < one.seconds.update


def test_a_trace_follows_what_the_cpu_allocates() -> None:
    """Bytes of the same forward on real tensors: torch's own count of the most that was alive."""
    shape = wide_llama()
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    optimizer = zo_dist.ZeroOrder(module, self_check=False, compile=False)
    traced = trace_forward(optimizer, Rows(4, 32, 2, 0, 4))
    assert max(b.peak.logits for b in traced.borders) >= 4 * 8192 * 2
    assert all(b.at.total <= b.peak.total for b in traced.borders)
    draws = [optimizer.sampler.draw(0, 0)]
    stacked = trace_step(optimizer, draws, Rows(4, 32, 2, 0, 4))
    # Both sides of the same rows.
    assert stacked.flops == 2 * traced.flops
    # Every weight is read once for both sides, and each side's copy written; of embeddings only what is used.
    matrices = sum(p.numel() for n, p in module.named_parameters() if "embed" not in n)
    assert stacked.noise_bytes == pytest.approx(2 * 3 * (matrices + 8192 * 1024), rel=0.02)


def test_rows_of_the_busiest_rank() -> None:
    # Ranks of 2 and 3 rows; a direction has 7 / 3 of them.
    assert busiest_rows(7, 3, None, 3) == (4, 3, 1)
    assert busiest_rows(7, 3, 2, 1) == (4, 2, 2)
    assert busiest_rows(1, 4, None, 1) == (0, 1, 1)


def test_a_cluster_is_named_or_described() -> None:
    cluster = parse_cluster("16xa100-40g", hbm_gbps=1000.0)
    assert (cluster.count, cluster.nodes, cluster.gpu.hbm_gbps) == (16, 2, 1000.0)
    # Inside a node its links, between nodes all its network cards together.
    assert cluster.gather_bandwidth(8) == 300e9 * 0.8
    assert cluster.gather_bandwidth(16) == 8 * 25e9 * 0.8
    described = dict.fromkeys(("memory_gb", "hbm_gbps", "tflops", "link_gbps", "host_gbps"), 10.0)
    assert parse_cluster("4xmine", **described).gpu.source == "given"
    for text, options, reason in (
        ("A100-40G", {}, "write the number and kind"),
        ("0xA100-40G", {}, "write the number and kind"),
        ("8xA100", {}, "A100-80G"),
        ("12xA100-40G", {}, "do not fill nodes of 8"),
        ("16xL4", {}, "--network-gbps"),
        ("8xL4", {"memory_gb": -1.0}, "memory_gb is -1.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_cluster(text, **options)
    assert all(gpu.source for gpu in GPUS.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of which there is a config alone."""
    wide_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_written_is_a_config_that_trains(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "written.yaml"
    gpus = ["--gpus", "2xRTX3090", "--write", str(path)]
    assert main(["plan", str(folder), *gpus, "optimizer.directions=2", "train.rows=8"]) == 0
    shown = capsys.readouterr().out
    assert "Computed from shapes, not measured." in shown
    assert "NVIDIA Ampere GA102" in shown
    config = load_config(path)
    assert (config.model.source, config.optimizer.directions, config.train.rows) == (str(folder), 2, 8)
    assert config.train.output == "runs/written"
    # So small a model needs no sharding.
    assert config.engine.kind == "replicated"
    # The way there and back: a written config is planned as what it says.
    assert main(["plan", "--config", str(path), "--gpus", "2xRTX3090", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {m["engine"] for m in plan["modes"]} == {"replicated"}
    assert plan["recommended"] == {"name": "replicated", "perturb": "module"}
    memory = plan["modes"][0]["memory"]
    assert memory["total"] == sum(
        memory[part] for part in ("weights", "state", "lost", "gathered", "scratch", "activations", "logits")
    )


def test_zero3_is_written_with_a_deepspeed_config(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "z.yaml"
    options = ["--engine", "zero3", "--offload", "--write", str(path)]
    assert main(["plan", str(folder), "--gpus", "2xA10", *options, "optimizer.perturb=module"]) == 0
    config = load_config(path)
    assert config.engine.deepspeed == str(tmp_path / "z.ds.json")
    written = json.loads((tmp_path / "z.ds.json").read_text())
    assert written["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_a_deepspeed_config_is_followed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ds = tmp_path / "ds.json"
    content: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    ds.write_text(json.dumps({**content, "fp16": {"enabled": True}, "train_micro_batch_size_per_gpu": 3}))
    command = ["plan", str(folder), "--gpus", "2xA10", "--config", str(ds), "--json"]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {(m["engine"], m["offload"]) for m in plan["modes"]} == {("zero3", True)}
    assert (plan["model"]["dtype"], plan["model"]["rows"]) == ("float16", 6)
    # So it is when it is written as DeepSpeed reads it, with comments.
    text = json.dumps({**content, "bfloat16": {"enabled": True}, "train_batch_size": 8})
    ds.write_text("// mine\n" + text)
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {(m["engine"], m["offload"]) for m in plan["modes"]} == {("zero3", True)}
    assert (plan["model"]["dtype"], plan["model"]["rows"]) == ("bfloat16", 8)
    # What names no stage of ZeRO shards nothing.
    ds.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert main(command) == 0
    assert {m["engine"] for m in json.loads(capsys.readouterr().out)["modes"]} == {"replicated"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["opt-131b", "--gpus", "8xL4"], "opt-13b"),
        (["opt-125m", "--gpus", "8xL4", "--length", "4000"], "this model takes 2 to 2048"),
        (["opt-125m", "--gpus", "8xL4", "--answer", "300"], "the answer has 300 tokens"),
        (["opt-125m", "--gpus", "8xL4", "--offload"], "--engine fsdp2 or zero3"),
        (["opt-125m", "--gpus", "8xL4", "--assume-compute", "2"], "compute is 2.0"),
        (
            ["opt-125m", "--gpus", "8xL4", "engine.kind=fsdp2", "--engine", "fsdp2", "--offload"],
            "--offload is given, but the config has fsdp2 without it",
        ),
        (["opt-125m", "--gpus", "8xL4", "data.task=squad", "train.objective=f1"], "one forward per token"),
        (["opt-125m", "--gpus", "8xL4", "train.row=8"], "train.row"),
        (["--gpus", "8xL4"], "name a model"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_a_config_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: opt-125m\n")
    assert main(["plan", "opt-125m", "--gpus", "8xL4", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "model is 'opt-125m'; it is a section" in capsys.readouterr().err


def test_nvme_is_not_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offload = {"device": "nvme", "nvme_path": "/local_nvme"}
    config = {"zero_optimization": {"stage": 3, "offload_param": offload}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert main(["plan", "opt-125m", "--gpus", "8xL4", "--config", str(tmp_path / "ds.json")]) == 2
    assert "offload to NVMe is not planned" in capsys.readouterr().err


def test_nothing_fits_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = ["--memory-gb", "2.001", "--write", str(tmp_path / "no.yaml")]
    assert main(["plan", str(folder), "--gpus", "2xL4", *described]) == 2
    captured = capsys.readouterr()
    assert "Nothing fits." in captured.out
    assert "nothing fits" in captured.err
    assert not (tmp_path / "no.yaml").exists()


def test_models_outside_the_list_are_read_from_their_config(folder: Path) -> None:
    source, shape = read_shape(str(folder / "config.json"))
    assert source == str(folder)
    assert isinstance(shape, transformers.LlamaConfig)
    assert shape.hidden_size == wide_llama().hidden_size


def test_an_embedding_that_is_shifted_whole_is_not_beside_the_layers() -> None:
    """More tokens than an eighth of the vocabulary: its copy is made, and gone when the layers run."""
    shape = wide_llama()
    memory = {}
    for vocabulary in (40_960, 81_920):
        shape.vocab_size = vocabulary
        config = config_of(rows=128, dtype="bfloat16", directions=2)
        plan = make_plan(config, shape, parse_cluster("2xA100-40G"), length=64)
        memory[vocabulary] = mode_of(plan, "replicated", "module").memory
    small, large = memory.values()
    assert small is not None
    assert large is not None
    assert large.weights > small.weights
    assert (large.scratch, large.activations) == (small.scratch, small.activations)
