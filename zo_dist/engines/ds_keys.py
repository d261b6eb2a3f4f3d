"""What zeroth-order training does with each key of a DeepSpeed config: tables for ds_config.py.

A table maps a reason to the keys it covers, separated by spaces. The keys are those of deepspeed
0.19.8 (runtime/config.py, runtime/zero/config.py, runtime/precision_config.py) and older ones that
users' files still hold.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

KEPT = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    zero_optimization fp16 bf16 bfloat16 data_types comms_logger log_level dump_state
    memory_breakdown disable_python_gc vocabulary_size"""

NVME_ONLY = "used with NVMe only"

DROPPED = {
    "zo_dist has its own update rules and learning-rate schedules": "optimizer scheduler",
    "no gradient is computed": """gradient_clipping communication_data_type prescale_gradients
        gradient_predivide_factor gradient_allreduce_op managed_gradient_accumulation
        sparse_gradients fp32_allreduce activation_checkpointing eigenvalue""",
    "no DeepSpeed optimizer is built": """zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer disable_allgather allgather_size graph_harvesting""",
    # Their timers and hooks also start in forward() and are freed in step().
    "reported by the DeepSpeed engine's step(), which never runs": """steps_per_print timers
        wall_clock_breakdown flops_profiler tensorboard wandb csv_monitor comet""",
    "zo_dist writes its own checkpoints": "checkpoint datastates_ckpt nebula",
    "zo_dist loads its own data and counts rows over all ranks": """dataloader_drop_last
        elasticity data_parallel_size""",
    NVME_ONLY: "aio",
    "it searches settings for back-propagation; see `zo-dist plan`": "autotuning",
    "this config leaves it off": """amp torch_autocast msamp compression_training
        quantize_training weight_quantization sparse_attention progressive_layer_drop
        curriculum_learning data_efficiency hybrid_engine expert_parallel tensor_parallel
        pipeline sequence_parallel_size""",
    "it serves a kind of parallelism that zo_dist does not run": """
        seq_parallel_communication_data_type use_data_before_expert_parallelism""",
    "engine.compile() is never called": "compile",
}

# overlap_comm stays: without an optimizer it still picks the stream of the weight gathers.
ZERO_COUNTS = """stage3_prefetch_bucket_size stage3_max_live_parameters stage3_max_reuse_distance
    stage3_module_granularity_threshold stage3_param_persistence_threshold
    zero_hpz_partition_size"""
ZERO_FLAGS = """overlap_comm stage3_gather_16bit_weights_on_model_save
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential memory_efficient_linear
    override_module_apply log_trace_cache_warnings enable_sanity_checks zero_quantized_weights
    zero_quantized_nontrainable_weights"""
ZERO_KEPT = f"{ZERO_COUNTS} {ZERO_FLAGS} stage offload_param leaf_module"

ZERO_DROPPED = {
    "no gradient is computed": """reduce_bucket_size reduce_scatter contiguous_gradients
        compute_grad_norm round_robin_gradients use_multi_rank_bucket_allreduce
        ignore_unused_parameters find_unused_parameters zero_quantized_gradients
        zeropp_loco_param""",
    "no DeepSpeed optimizer is built": """offload_optimizer cpu_offload
        cpu_offload_use_pin_memory zenflow sub_group_size allgather_partitions
        allgather_bucket_size parameter_alignment legacy_stage1
        save_muon_momentum_buffer_in_memory""",
    "zo_dist writes its own checkpoints": """load_from_fp32_weights elastic_checkpoint
        pipeline_loading_checkpoint""",
    "no parameter stays gathered, so there is nothing to bound": """
        stage3_model_persistence_threshold""",
    "this config leaves it off": "mics_shard_size mics_hierarchical_params_gather",
}

# DeepSpeed takes each stage3_ key without its prefix as well.
ZERO_RENAMED = {
    key.removeprefix("stage3_"): key
    for key in [*ZERO_KEPT.split(), "stage3_model_persistence_threshold"]
    if key.startswith("stage3_")
} | {"stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save"}

OFFLOAD_DROPPED = {NVME_ONLY: "nvme_path buffer_count buffer_size max_in_cpu"}

TENSOR_KEPT = """autotp_size tp tensor_parallel partition_config preset_model tp_overlap_comm
    vocab_parallel_lm_head"""
TENSOR_DROPPED = {
    "zo_dist has its own losses": "vocab_parallel_ce_backend",
    "bf16.enabled and fp16.enabled decide it": "dtype",
    "what ranks hold is on their device": "keep_module_on_host",
    "kernels are not replaced": "replace_with_kernel_inject kernel_inject",
    "DeepSpeed finds it itself": "injection_policy_tuple",
}
AUTOTP_AT_STAGE_3 = (
    "tensor_parallel.autotp_size cuts layers over ranks, and zero_optimization.stage 3 shards what is left: "
    "what a rank holds then is not known here; set the stage to 0, or remove tensor_parallel"
)

PRECISION_DROPPED = {
    "there is no gradient to scale or to check": """loss_scale loss_scale_window
        initial_scale_power hysteresis consecutive_hysteresis min_loss_scale check_grad_overflow
        check_overflow immediate_grad_update""",
    "no DeepSpeed optimizer is built": """fp16_master_weights_and_grads
        bf16_master_weights_and_grads bf16_optimizer_states""",
}

DATA_TYPES_DROPPED = {
    "no gradient is computed": "grad_accum_dtype",
    "bf16.enabled and fp16.enabled decide it": "param_dtype",
}

# The reason ends with the remedy.
REFUSED = {
    "DeepSpeed removed Apex AMP; enable bf16 or fp16": "amp",
    "autocast reuses its first 16-bit copy of a weight, so a second probe would not see its own "
    "perturbation; enable bf16 or fp16": "torch_autocast",
    "8-bit weights are coarser than a perturbation; enable bf16 or fp16": "msamp",
    "quantised weights hide a perturbation, and DeepSpeed removed it; remove it": """
        compression_training quantize_training""",
    "quantised weights hide a perturbation; remove it": "weight_quantization",
    "DeepSpeed removed it; remove it, and attention is dense": "sparse_attention",
    "all probes of a step must run the same layers; remove it": "progressive_layer_drop",
    "it changes the batches, and zo_dist loads its own data; remove it": """curriculum_learning
        data_efficiency""",
    "its generation keeps a second copy of the weights; remove it": "hybrid_engine",
    "ranks would own different experts; remove it, and name the MoE blocks in "
    "zero_optimization.leaf_module": "expert_parallel",
    "its selective gather keeps weights gathered, which hides writes to their shards; set it to "
    "false": "compile.deepcompile",
    "rounding each gather to 8 bits is coarser than a perturbation; set it to false": """
        zero_optimization.zero_quantized_weights""",
    "what it quantises depends on what was frozen when the model was built, and 8-bit shards "
    "cannot be exported; set it to false": "zero_optimization.zero_quantized_nontrainable_weights",
    "DeepSpeed removed MiCS; remove it": "zero_optimization.mics_hierarchical_params_gather",
}

REFUSED_ABOVE_ONE = {
    "DeepSpeed cuts no layer by it; set tensor_parallel.autotp_size": """
        tensor_parallel.tp_size tensor_parallel.tp.tp_size tensor_parallel.tensor_parallel.tp_size""",
    "each rank is one data-parallel replica to zo_dist; remove it and shard by ZeRO stage 3": """
        sequence_parallel_size pipeline.stages""",
    "DeepSpeed removed MiCS; to shard inside a node, pass its process group to zero.Init, or use "
    "FSDP2 with a (replicate, shard) mesh": "zero_optimization.mics_shard_size",
    "gathers would read the secondary copy, which a write to the shard does not reach; to shard "
    "inside a node, pass its process group to zero.Init, or use FSDP2 with a (replicate, shard) "
    "mesh": "zero_optimization.zero_hpz_partition_size",
}


def drop(block: dict[str, Any], prefix: str, table: Mapping[str, str], notes: list[str]) -> None:
    """Remove the keys of the table, with one note for each reason."""
    for reason, keys in table.items():
        gone = [f"{prefix}{key} = {show(block.pop(key))}" for key in keys.split() if key in block]
        if gone:
            notes.append(f"dropped {', '.join(gone)}: {reason}")


def check_keys(block: Mapping[str, Any], prefix: str, known: Iterable[str]) -> None:
    """Raise ValueError for a key that is not known, naming the nearest ones."""
    known = list(known)
    for key in block:
        if key not in known:
            near = ", ".join(difflib.get_close_matches(str(key), known)) or "none; remove it"
            raise ValueError(f"unknown key {prefix}{key}; nearest known: {near}")


def section(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, made if absent."""
    value = parent.setdefault(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {show(value)}; legal: an object")
    return value


def find(config: Any, key: str) -> Any:
    """Return the value under a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def flag(value: Any, key: str) -> bool:
    """Return a truth value in one of the forms that DeepSpeed's pydantic models take."""
    forms = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in forms:
        raise ValueError(f"{key} is {show(value)}; legal: true, false")
    return forms[str(value).lower()]


def count(value: Any, key: str, least: int = 0) -> int:
    """Return an integer, which a config may write as 5e8 or "500000000"."""
    try:
        if not isinstance(value, bool) and int(value) == float(value) >= least:
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{key} is {show(value)}; legal: an integer of at least {least}")


def names(table: Mapping[str, str]) -> list[str]:
    """Return all keys of a table."""
    return " ".join(table.values()).split()


def show(value: Any) -> str:
    """Return a value as JSON, on one line and cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
