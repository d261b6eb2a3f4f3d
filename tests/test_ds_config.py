"""Existing DeepSpeed configs, in the forms users have them, and what becomes of each."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zo_dist.engines import ds_keys
from zo_dist.engines.ds_config import DsConfig, read_ds_config

CONFIGS = Path(__file__).parent.parent / "configs"
HIDDEN = 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def read(source: Any, dtype: torch.dtype | None = BF16, hidden: int | None = HIDDEN) -> DsConfig:
    return read_ds_config(source, hidden_size=hidden, micro_batch=4, num_ranks=1, dtype=dtype)


def user_file(stage: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"ds_zero{stage}.json").read_text())
    return config


def zero3(**keys: Any) -> dict[str, Any]:
    return {"train_batch_size": "auto", "zero_optimization": {"stage": 3, **keys}}


# The forms below: the Trainer's documentation, `accelerate config`, DeepSpeed's own examples
# (DeepSpeedExamples, tutorials), and files written for releases back to 0.3.
ACCELERATE_PLUGIN = {  # what DeepSpeedPlugin(zero_stage=3) builds without a file
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "nvme_path": None},
        "offload_param": {"device": "none", "nvme_path": None},
        "stage3_gather_16bit_weights_on_model_save": False,
    },
    "gradient_clipping": 1.0,
    "steps_per_print": float("inf"),
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}
ACCELERATE_FP16 = {"fp16": {"enabled": "auto", "auto_cast": True, "loss_scale": 0.0}}
DS_CHAT = {  # DeepSpeed-Chat, utils/ds_utils.py
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
        "stage3_param_persistence_threshold": 1e4,
        "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7,
        "memory_efficient_linear": False,
    },
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
    "tensorboard": {"enabled": False, "output_path": "out/", "job_name": "step1"},
}
DS_CIFAR = {  # DeepSpeedExamples, training/cifar
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1000}},
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "bf16": {"enabled": False},
    "fp16": {"enabled": True, "fp16_master_weights_and_grads": False, "loss_scale_window": 500},
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 0,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": 50000000,
        "reduce_bucket_size": 50000000,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
}
OLD_BERT = {  # bing_bert before stages
    "train_batch_size": 4096,
    "optimizer": {"type": "OneBitAdam", "params": {"lr": 4e-3, "freeze_step": 2000}},
    "fp32_allreduce": True,
    "zero_optimization": True,
    "disable_allgather": True,
    "allgather_size": 500000000,
    "fp16": {"enabled": True},
}
OLD_ZERO3 = zero3(  # transformers 4.5
    cpu_offload=True,
    cpu_offload_params=True,
    cpu_offload_use_pin_memory=True,
    stage3_gather_fp16_weights_on_model_save=True,
    sub_group_size=1e14,
)

# name -> (config, dtype asked for, words that must be among the notes)
ACCEPTED: dict[str, tuple[dict[str, Any], torch.dtype | None, list[str]]] = {
    "trainer zero 0": (user_file(0), BF16, ["stage = 0", "dropped optimizer", "WarmupDecayLR"]),
    "trainer zero 1": (user_file(1), FP16, ["stage = 1", 'fp16.enabled: "auto" -> true']),
    "trainer zero 2": (user_file(2), FP32, ["stage = 2", "offload_optimizer", "overlap_comm"]),
    "trainer zero 3": (
        user_file(3),
        BF16,
        [
            'stage3_prefetch_bucket_size: "auto" -> 943718',
            'stage3_param_persistence_threshold: "auto" -> 0',
            'bf16.enabled: "auto" -> true',
            'fp16.enabled: "auto" -> false',
            "fp16.loss_scale = 0",
            'train_batch_size: "auto" -> 4',
            "reduce_bucket_size",
            "wall_clock_breakdown = false",
        ],
    ),
    "trainer zero 3 without a dtype": (user_file(3), None, ["-> false (no dtype is given)"]),
    "accelerate plugin": (ACCELERATE_PLUGIN, BF16, ["unset -> 0", "steps_per_print = Infinity"]),
    "accelerate fp16": (zero3() | ACCELERATE_FP16, FP16, ["fp16.loss_scale = 0.0"]),
    "deepspeed-chat": (DS_CHAT, None, ["10000 -> 0", "tensorboard", "hybrid_engine", "64 -> 4"]),
    "deepspeed cifar": (DS_CIFAR, FP16, ["cpu_offload = false", "fp16_master_weights_and_grads"]),
    "bert before stages": (OLD_BERT, None, ["true -> stage 1", "OneBitAdam", "fp32_allreduce"]),
    "zero 3 of 0.3.14": (
        OLD_ZERO3,
        FP16,
        ["renamed offload_param.device", "renamed stage3_gather_16bit", "cpu_offload = true"],
    ),
    "accumulation": (
        zero3() | {"gradient_accumulation_steps": 16},
        BF16,
        ["gradient_accumulation_steps: 16 -> 1 (zo_dist adds up"],
    ),
    "offload with nvme leftovers": (
        zero3(offload_param={"device": "cpu", "nvme_path": "/local_nvme", "buffer_count": 5}),
        BF16,
        ['offload_param.nvme_path = "/local_nvme"'],
    ),
    "nvme": (
        zero3(offload_param={"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 5})
        | {"aio": {"block_size": 1048576}},
        BF16,
        [],
    ),
    "other autos": (
        zero3(stage3_max_live_parameters="auto", offload_param={"device": "auto"})
        | {"data_types": {"keep_in_fp32_modules": "auto", "grad_accum_dtype": "fp32"}},
        BF16,
        ['max_live_parameters: "auto" dropped', "offload_param.device", "keep_in_fp32_modules"],
    ),
    "names without stage3_": (zero3(param_persistence_threshold=1e6), BF16, ["1000000 -> 0"]),
    "a linear layer for backward passes": (
        zero3(memory_efficient_linear=True),
        BF16,
        ["memory_efficient_linear: true -> false"],
    ),
    "threshold already 0": (zero3(stage3_param_persistence_threshold=0), BF16, ['"auto" -> 4']),
    "bfloat16": (zero3() | {"bfloat16": {"enabled": True}}, None, ["bfloat16: renamed bf16"]),
    "no precision block": (zero3(), BF16, ["bf16.enabled: unset -> true"]),
    "nothing but a batch": ({"train_batch_size": 8}, None, ["stage = 0", "train_batch_size: 8"]),
    "zero++ gradients": (
        zero3(zero_quantized_gradients=True, zero_hpz_partition_size=1),
        BF16,
        ["zero_quantized_gradients = true: no gradient"],
    ),
    "removed features left off": (
        zero3(mics_shard_size=-1)
        | {"amp": {"enabled": "auto", "opt_level": "auto"}, "elasticity": {"enabled": False}}
        | {"curriculum_learning": {"enabled": False}, "sparse_gradients": False},
        BF16,
        ["mics_shard_size = -1", "amp", "elasticity", "curriculum_learning", "sparse_gradients"],
    ),
    "activation checkpointing, monitors": (
        zero3() | {"activation_checkpointing": {}, "wandb": {"enabled": True}, "aio": {}},
        BF16,
        ["activation_checkpointing", "wandb", "never runs", "aio"],
    ),
    "tensor parallel of one": (
        zero3() | {"tensor_parallel": {"autotp_size": 1}, "pipeline": {"stages": "auto"}},
        BF16,
        ["tensor_parallel", "pipeline"],
    ),
}

# name -> (config, dtype asked for, words of the error)
REFUSED: dict[str, tuple[dict[str, Any], torch.dtype | None, list[str]]] = {
    "qwZ": (zero3(zero_quantized_weights=True), BF16, ["zero_quantized_weights", "to false"]),
    "qwZ as a string": (zero3(zero_quantized_weights="true"), BF16, ["zero_quantized_weights"]),
    "qwZ, frozen": (
        zero3(zero_quantized_nontrainable_weights=True),
        BF16,
        ["zero_quantized_nontrainable_weights", "frozen"],
    ),
    "hpZ": (zero3(zero_hpz_partition_size=8), BF16, ["is 8; legal: 1", "zero.Init", "FSDP2"]),
    "MiCS": (zero3(mics_shard_size=4), BF16, ["mics_shard_size", "removed MiCS", "zero.Init"]),
    "nvme without a folder": (
        zero3(offload_param={"device": "nvme"}),
        BF16,
        ["nvme_path is unset", "folder"],
    ),
    "nvme misspelt": (zero3(offload_param={"device": "ssd"}), BF16, ["ssd", "legal: none, cpu, nvme"]),
    "stage 4": ({"zero_optimization": {"stage": 4}}, BF16, ["stage is 4", "0, 1, 2, 3"]),
    "stage as text": ({"zero_optimization": {"stage": "3"}}, BF16, ['stage is "3"']),
    "both precisions": (
        zero3() | {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        None,
        ["bf16.enabled and fp16.enabled"],
    ),
    "dtype against the file": (
        zero3() | {"bf16": {"enabled": True}},
        FP16,
        ["bf16.enabled is true", "torch.float16", '"auto"'],
    ),
    "16 bits switched off": (zero3() | {"bf16": {"enabled": False}}, BF16, ["is false"]),
    "float64": (zero3(), torch.float64, ["float64", "legal"]),
    "tensor parallel": (zero3() | {"tensor_parallel": {"autotp_size": 4}}, BF16, ["autotp_size"]),
    "tensor parallel, inner": (zero3() | {"tensor_parallel": {"tp": {"tp_size": 2}}}, BF16, ["tp"]),
    "sequence parallel": (zero3() | {"sequence_parallel_size": 2}, BF16, ["sequence_parallel"]),
    "pipeline": (zero3() | {"pipeline": {"stages": 4}}, BF16, ["pipeline.stages is 4"]),
    "deepcompile": (zero3() | {"compile": {"deepcompile": True}}, BF16, ["deepcompile", "gather"]),
    "autocast": (zero3() | {"torch_autocast": {"enabled": True}}, BF16, ["torch_autocast", "bf16"]),
    "apex": ({"amp": {"enabled": True, "opt_level": "O1"}}, BF16, ["amp", "enable bf16"]),
    "experts": (zero3() | {"expert_parallel": {"enabled": True}}, BF16, ["leaf_module"]),
    "sparse attention": (
        {"sparse_attention": {"mode": "fixed", "block": 16}},
        BF16,
        ["sparse_attention", "dense"],
    ),
    "compression": (
        {"compression_training": {"weight_quantization": {"shared_parameters": {}}}},
        BF16,
        ["compression_training"],
    ),
    "curriculum": ({"curriculum_learning": {"enabled": True}}, BF16, ["curriculum_learning"]),
    "data efficiency": ({"data_efficiency": {"enabled": True}}, BF16, ["data_efficiency"]),
    "layer drop": ({"progressive_layer_drop": {"enabled": True}}, BF16, ["same layers"]),
    "misspelt": ({"zero_optimisation": {"stage": 3}}, BF16, ["zero_optimisation", "zero_optimiz"]),
    "misspelt below": (zero3(stage3_max_live_parameter=1), BF16, ["stage3_max_live_parameters"]),
    "misspelt offload": (zero3(offload_param={"devise": "cpu"}), BF16, ["devise", "device"]),
    "misspelt fp16": (zero3() | {"fp16": {"enable": True}}, FP16, ["fp16.enable", "enabled"]),
    "a flag for a block": (zero3() | {"fp16": True}, FP16, ["fp16 is true", "object"]),
    "no zero object": ({"zero_optimization": None}, BF16, ["zero_optimization is null"]),
    "text for a number": (zero3(stage3_max_live_parameters="1B"), BF16, ['"1B"', "integer"]),
    "number for a flag": (zero3(overlap_comm=2), BF16, ["overlap_comm is 2", "true, false"]),
    "old and new offload": (
        zero3(cpu_offload_param=True, offload_param={"device": "cpu"}),
        BF16,
        ["cpu_offload_param and offload_param"],
    ),
    "old and new gather": (
        zero3(
            stage3_gather_fp16_weights_on_model_save=True,
            stage3_gather_16bit_weights_on_model_save=True,
        ),
        BF16,
        ["stage3_gather_fp16_weights_on_model_save", "keep the second"],
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    source, dtype, words = ACCEPTED[name]
    before = json.dumps(source)
    result = read(source, dtype)
    notes = "\n".join(result.notes)
    for word in words:
        assert word in notes
    assert json.dumps(source) == before, "the caller's config was written to"
    assert no_auto(result.config)
    assert result.config["train_micro_batch_size_per_gpu"] == 4
    assert result.config["train_batch_size"] == 4
    assert result.config["gradient_accumulation_steps"] == 1
    assert all("\n" not in note for note in result.notes)
    if result.stage == 3:
        assert result.config["zero_optimization"]["stage3_param_persistence_threshold"] == 0


def cut_in_two(stage: int, num_ranks: int, **keys: Any) -> DsConfig:
    source = {"tensor_parallel": {"autotp_size": 2, **keys}, "zero_optimization": {"stage": stage}}
    return read_ds_config(source, hidden_size=HIDDEN, micro_batch=4, num_ranks=num_ranks, dtype=BF16)


def test_autotp_stays_without_optimizer_and_with_whole_logits() -> None:
    result = cut_in_two(2, 4, dtype="bf16", tp_overlap_comm=True)
    assert (result.stage, result.tensor_ranks) == (0, 2)
    cut = {"autotp_size": 2, "tp_overlap_comm": True, "vocab_parallel_lm_head": False}
    assert result.config["tensor_parallel"] == cut
    notes = "\n".join(result.notes)
    for words in ("stage: 2 -> 0", "vocab_parallel_lm_head: null -> false", "dropped tensor_parallel.dtype"):
        assert words in notes
    for stage, num_ranks, words in ((3, 4, "set the stage to 0"), (0, 3, "divide the number of ranks, 3")):
        with pytest.raises(ValueError, match=words):
            cut_in_two(stage, num_ranks)
    with pytest.raises(ValueError, match="unknown key"):
        cut_in_two(0, 2, autotp=2)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    source, dtype, words = REFUSED[name]
    with pytest.raises(ValueError, match="DeepSpeed config: ") as error:
        read(source, dtype)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_second_reading_changes_nothing(name: str) -> None:
    source, dtype, _ = ACCEPTED[name]
    first = read(source, dtype)
    second = read(first.config, first.dtype)
    assert second.config == first.config
    assert (second.stage, second.offload_param) == (first.stage, first.offload_param)
    assert first.stage < 3 or second.notes == ()


@pytest.mark.parametrize("name", [name for name in ACCEPTED if read(*ACCEPTED[name][:2]).stage == 3])
def test_deepspeed_takes_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    runtime = pytest.importorskip("deepspeed.runtime.config")
    result = read(*ACCEPTED[name][:2])
    parsed = runtime.DeepSpeedConfig(result.config)
    assert parsed.zero_config.stage == 3
    assert parsed.zero_config.param_persistence_threshold == 0
    assert parsed.optimizer_name is None
    assert parsed.train_micro_batch_size_per_gpu == 4
    assert parsed.bfloat16_config.enabled == (result.dtype is BF16)
    assert parsed.float16_config.enabled == (result.dtype is FP16)
    offload = parsed.zero_config.offload_param
    assert result.offload_param == ("none" if offload is None else offload.device)


def test_every_key_of_the_installed_deepspeed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    known = {*ds_keys.ZERO_KEPT.split(), *ds_keys.names(ds_keys.ZERO_DROPPED)}
    known |= {*ds_keys.ZERO_RENAMED, "cpu_offload_param"}
    fields = set(zero.model_fields) | {f.alias for f in zero.model_fields.values() if f.alias}
    assert fields <= known
    known = {"enabled", "auto_cast", *ds_keys.names(ds_keys.PRECISION_DROPPED)}
    assert set(precision.DeepSpeedFP16Config.model_fields) <= known
    assert set(precision.DeepSpeedBF16Config.model_fields) <= known
    runtime = pytest.importorskip("deepspeed.runtime.config")
    known = {*ds_keys.KEPT.split(), *ds_keys.names(ds_keys.DROPPED)}
    assert set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= known


def test_auto_without_a_hidden_size_is_left_to_deepspeed() -> None:
    result = read(user_file(3), hidden=None)
    assert "stage3_prefetch_bucket_size" not in result.config["zero_optimization"]
    assert any('stage3_prefetch_bucket_size: "auto" dropped' in note for note in result.notes)


def test_kept_values_are_the_users() -> None:
    result = read(DS_CHAT, None)
    assert (result.stage, result.offload_param, result.dtype) == (3, "cpu", BF16)
    assert result.config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 30000000,
        "stage3_prefetch_bucket_size": 30000000,
        "memory_efficient_linear": False,
    }


def test_what_nvme_needs_is_kept() -> None:
    offload = {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 7, "buffer_size": 1000}
    result = read(zero3(offload_param=offload) | {"aio": {"queue_depth": 4}}, BF16)
    assert result.offload_param == "nvme"
    assert result.config["zero_optimization"]["offload_param"] == offload
    assert result.config["aio"] == {"queue_depth": 4}


def test_batch_is_over_all_ranks() -> None:
    result = read_ds_config(zero3(), hidden_size=None, micro_batch=3, num_ranks=8)
    assert result.config["train_batch_size"] == 24
    with pytest.raises(ValueError, match="num_ranks=0"):
        read_ds_config(zero3(), hidden_size=None, micro_batch=3, num_ranks=0)


HJSON = '{\n  // ZeRO\n  "zero_optimization": {"stage": 3,},\n  "train_batch_size": 8,\n}\n'
TEXTS = {
    "unclosed text": ('{\n"zero_optimization": {"stage": 3}, "fp16', ["line 2 column"]),
    "unclosed": ('{\n"zero_optimization": {"stage": 3}', ["line 2 column"]),
    "a list": ("[1, 2]", ["not a JSON object"]),
    "empty": ("", ["line 1"]),
    "twice": ('{"train_batch_size": 8,\n"bf16": {},\n"bf16": {}}', ["bf16", "lines 2, 3"]),
    "twice below": ('{"fp16": {"enabled": true,\n"enabled": false}}', ["enabled", "lines 1, 2"]),
    "twice in Hjson": ('{\n# a comment\n"bf16": {},\n"bf16": {}}', ["bf16", "lines 3, 4"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_unreadable_text_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    text, words = TEXTS[name]
    file = tmp_path / "ds_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"ds_config\.json: ") as error:
        read(file)
    for word in words:
        assert word in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "none.json", str(tmp_path), "ds_config.json", "x" * 5000):
        with pytest.raises(ValueError, match="not a file"):
            read(source)


def test_comments_and_base64_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(HJSON)
    result = read(str(file))
    assert result.stage == 3
    assert "transformers would refuse: not JSON (Expecting property name" in result.notes[0]
    assert "line 2 column 3" in result.notes[0]
    encoded = base64.urlsafe_b64encode(json.dumps(zero3()).encode()).decode()
    assert read(encoded).config == read(zero3()).config


def no_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return all(no_auto(item) for item in value.values())
    if isinstance(value, list):
        return all(no_auto(item) for item in value)
    return bool(value != "auto")
