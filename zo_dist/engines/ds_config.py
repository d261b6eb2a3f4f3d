"""Read a DeepSpeed config as users have it, and keep what forward-only training may build.

Every key is kept, changed with a note, dropped with a note, or refused with a remedy (tables in
ds_keys.py). DeepSpeed itself ignores an unknown top-level key and reads `"auto"` as its default, so
`bf16.enabled: "auto"` becomes float32.
Sources: deepspeed 0.19.8 runtime/config.py, runtime/zero/config.py, runtime/precision_config.py,
runtime/engine.py (`DeepSpeedZeRoOffload`); transformers 5.23 integrations/deepspeed.py (`"auto"`).
"""

import base64
import binascii
import copy
import importlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_dist.engines import ds_keys
from zo_dist.engines.ds_keys import check_keys, count, drop, find, flag, names, section, show

_16_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}
_THRESHOLD = "stage3_param_persistence_threshold"
_LINEAR = "memory_efficient_linear"


class _DuplicateKeyError(ValueError):
    """A key given twice in one object."""


@dataclass(frozen=True, kw_only=True)
class DsConfig:
    """A DeepSpeed config without `"auto"`, gradients or optimizer, and what was done to get there.

    `dtype` is None if neither the config nor the caller names one; zero.Init then builds float32.
    """

    stage: int
    config: dict[str, Any]
    notes: tuple[str, ...]
    dtype: torch.dtype | None
    offload_param: str  # "none", "cpu" or "nvme"
    tensor_ranks: int = 1  # over so many AutoTP cuts layers


def read_ds_config(
    source: str | Path | Mapping[str, Any],
    *,
    hidden_size: int | None,
    micro_batch: int,
    num_ranks: int,
    dtype: torch.dtype | None = None,
) -> DsConfig:
    """Turn a config (file, base64 string, mapping) into one that zeroth-order training may build.

    Raises ValueError, naming the source, for what is unreadable, unknown or spoils the estimate.
    """
    name = "DeepSpeed config" if isinstance(source, Mapping) else str(source)[:200]
    notes: list[str] = []
    try:
        if micro_batch < 1 or num_ranks < 1 or (hidden_size is not None and hidden_size < 1):
            raise ValueError(f"{micro_batch=}, {num_ranks=} and {hidden_size=} must be at least 1")
        if dtype not in (None, torch.float32, *_16_BIT.values()):
            raise ValueError(f"dtype is {dtype}; legal: torch.float32, .bfloat16, .float16")
        config = load_ds_config(source, notes)
        _rename_zero_keys(config, notes)
        cut = _take_tensor_parallel(config, num_ranks, notes)
        _refuse(config)
        nvme = find(config, "zero_optimization.offload_param.device") == "nvme"
        idle = {why: keys for why, keys in ds_keys.DROPPED.items() if why != ds_keys.NVME_ONLY or not nvme}
        drop(config, "", idle, notes)
        check_keys(config, "", [*ds_keys.KEPT.split(), *names(ds_keys.DROPPED)])
        if cut is not None:
            config["tensor_parallel"] = cut
        tensor_ranks = 1 if cut is None else cut["autotp_size"]
        stage, offload_param = _read_zero(config, hidden_size, tensor_ranks, notes)
        dtype = _read_precision(config, dtype, notes)
        if "data_types" in config:
            data_types = section(config, "data_types")
            drop(data_types, "data_types.", ds_keys.DATA_TYPES_DROPPED, notes)
            check_keys(data_types, "data_types.", ["buffer_dtype", "keep_in_fp32_modules"])
        _set_batch_sizes(config, micro_batch, num_ranks, notes)
        _drop_autos(config, "", notes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return DsConfig(
        stage=stage,
        config=config,
        notes=tuple(notes),
        dtype=dtype,
        offload_param=offload_param,
        tensor_ranks=tensor_ranks,
    )


def load_ds_config(source: str | Path | Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The keys as they are written: of a mapping, a file in JSON or Hjson, or base64 of it. Adds to `notes`.

    ValueError, without the source's name, where it is none of these or has a key twice.
    """
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    try:
        if os.path.isfile(source):
            text = Path(source).read_text(encoding="utf-8-sig")
        else:
            text = base64.b64decode(str(source), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, OSError) as error:
        raise ValueError("not a file that reads as UTF-8, nor a base64 string") from error
    try:
        config = _parse(text, notes)
    except _DuplicateKeyError as error:
        lines = [
            str(number)
            for number, line in enumerate(text.splitlines(), start=1)
            if re.search(rf"(?<!\w){re.escape(str(error))}\"?'?\s*:", line)
        ]
        where = f"{error} is on lines {', '.join(lines)}"
        raise ValueError(f"duplicate key {error} in one object ({where})") from None
    if not isinstance(config, dict) or not text.strip():
        raise ValueError("line 1, column 1: not a JSON object")
    return config


def _parse(text: str, notes: list[str]) -> Any:
    """Read JSON, else the Hjson that DeepSpeed reads (comments, trailing commas)."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error})"
    try:
        config = importlib.import_module("hjson").loads(text, object_pairs_hook=_without_duplicates)
    except ImportError:
        raise ValueError(f"{problem}; DeepSpeed reads comments through the package hjson") from None
    except _DuplicateKeyError:
        raise
    except ValueError as error:
        raise ValueError(f"{problem}, nor the Hjson that DeepSpeed reads ({error})") from None
    notes.append(f"read as Hjson, as DeepSpeed does; transformers would refuse: {problem}")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _DuplicateKeyError(key)
    return dict(pairs)


def _rename_zero_keys(config: dict[str, Any], notes: list[str]) -> None:
    if isinstance(config.get("zero_optimization"), bool):
        stage = int(config["zero_optimization"])
        notes.append(f"zero_optimization: {show(stage == 1)} -> stage {stage} (the form before stages)")
        config["zero_optimization"] = {"stage": stage}
    zero = section(config, "zero_optimization")
    for old, new in ds_keys.ZERO_RENAMED.items():
        if old in zero:
            if new in zero:
                raise ValueError(f"zero_optimization has both {old} and {new}; keep the second")
            notes.append(f"zero_optimization.{old}: renamed {new}")
            zero[new] = zero.pop(old)
    for old in ("cpu_offload_param", "cpu_offload_params"):
        if old in zero:
            if "offload_param" in zero:
                raise ValueError(f"zero_optimization has {old} and offload_param; keep the second")
            device = "cpu" if flag(zero.pop(old), f"zero_optimization.{old}") else "none"
            notes.append(f'zero_optimization.{old}: renamed offload_param.device = "{device}"')
            zero["offload_param"] = {"device": device}


def _take_tensor_parallel(config: dict[str, Any], num_ranks: int, notes: list[str]) -> dict[str, Any] | None:
    """The block of AutoTP, out of the config, where it cuts layers: with each rank's logits whole."""
    key, prefix = "tensor_parallel.autotp_size", "tensor_parallel."
    size = find(config, key)
    if size in (None, "auto") or (size := count(size, key)) <= 1:
        return None
    if num_ranks % size:
        raise ValueError(f"{key} is {size}; it must divide the number of ranks, {num_ranks}")
    cut: dict[str, Any] = config.pop("tensor_parallel") | {"autotp_size": size}
    drop(cut, prefix, ds_keys.TENSOR_DROPPED, notes)
    check_keys(cut, prefix, [*ds_keys.TENSOR_KEPT.split(), *names(ds_keys.TENSOR_DROPPED)])
    was = cut.get("vocab_parallel_lm_head")
    if was is not False:
        notes.append(f"{prefix}vocab_parallel_lm_head: {show(was)} -> false (losses take whole logits)")
    return cut | {"vocab_parallel_lm_head": False}


def _refuse(config: Mapping[str, Any]) -> None:
    for reason, keys in ds_keys.REFUSED.items():
        for key in keys.split():
            value = find(config, key)
            if isinstance(value, Mapping):
                value = value.get("enabled", bool(value))
            if value not in (None, "auto") and flag(value, key):
                raise ValueError(f"{key} is {show(find(config, key))}; legal: off. {reason}")
    for reason, keys in ds_keys.REFUSED_ABOVE_ONE.items():
        for key in keys.split():
            value = find(config, key)
            if value not in (None, "auto") and count(value, key, least=-1) > 1:
                raise ValueError(f"{key} is {value}; legal: 1. {reason}")


def _read_zero(
    config: dict[str, Any], hidden_size: int | None, tensor_ranks: int, notes: list[str]
) -> tuple[int, str]:
    zero, prefix = section(config, "zero_optimization"), "zero_optimization."
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"{prefix}stage is {show(stage)}; legal: 0, 1, 2, 3")
    drop(zero, prefix, ds_keys.ZERO_DROPPED, notes)
    check_keys(zero, prefix, [*ds_keys.ZERO_KEPT.split(), *names(ds_keys.ZERO_DROPPED)])
    if zero.get("stage3_prefetch_bucket_size") == "auto" and hidden_size is not None:
        zero["stage3_prefetch_bucket_size"] = size = int(0.9 * hidden_size * hidden_size)
        notes.append(f'{prefix}stage3_prefetch_bucket_size: "auto" -> {size} (0.9 * hidden_size^2)')
    for keys, check in ((ds_keys.ZERO_FLAGS, flag), (ds_keys.ZERO_COUNTS, count)):
        for key in keys.split():
            if zero.get(key) not in (None, "auto"):
                zero[key] = check(zero[key], prefix + key)
    device = "none"
    if zero.get("offload_param") is not None:
        offload = section(zero, "offload_param")
        device = offload.get("device", "none")
        if device != "nvme":
            drop(offload, f"{prefix}offload_param.", ds_keys.OFFLOAD_DROPPED, notes)
        elif not offload.get("nvme_path"):
            raise ValueError(f"{prefix}offload_param.nvme_path is unset; legal: a folder on the NVMe disk")
        known = ["device", "pin_memory", *names(ds_keys.OFFLOAD_DROPPED)]
        check_keys(offload, f"{prefix}offload_param.", known)
        if device not in ("auto", "none", "cpu", "nvme"):
            raise ValueError(f"{prefix}offload_param.device is {show(device)}; legal: none, cpu, nvme")
    if stage == 3 and tensor_ranks > 1:
        raise ValueError(ds_keys.AUTOTP_AT_STAGE_3)
    if stage < 3:
        if tensor_ranks == 1:
            notes.append(f"{prefix}stage = {stage}: all weights are on every rank, without DeepSpeed")
        elif stage:
            # DeepSpeed builds the others with an optimizer only.
            notes.append(f"{prefix}stage: {stage} -> 0 (no optimizer to shard)")
            zero["stage"] = stage = 0
        unused = " ".join(key for key in zero if key != "stage")
        drop(zero, prefix, {"only stage 3 shards weights": unused}, notes)
        return stage, "none"
    if zero.get(_THRESHOLD) != 0:
        was = show(zero[_THRESHOLD]) if _THRESHOLD in zero else "unset"
        notes.append(f"{prefix}{_THRESHOLD}: {was} -> 0 (kept gathered, a weight hides writes)")
        zero[_THRESHOLD] = 0
    if zero.get(_LINEAR):
        notes.append(f"{prefix}{_LINEAR}: {show(zero[_LINEAR])} -> false (it spares a backward pass memory)")
    # By itself it would replace torch.nn.functional.linear, for the rest of the process.
    zero[_LINEAR] = False
    return stage, "none" if device == "auto" else device


def _read_precision(
    config: dict[str, Any], dtype: torch.dtype | None, notes: list[str]
) -> torch.dtype | None:
    if "bfloat16" in config:
        if "bf16" in config:
            raise ValueError("both bf16 and bfloat16 are given; keep bf16")
        config["bf16"] = config.pop("bfloat16")
        notes.append("bfloat16: renamed bf16")
    given: dict[str, bool] = {}
    for key in [key for key in _16_BIT if key in config]:
        block = section(config, key)
        drop(block, f"{key}.", ds_keys.PRECISION_DROPPED, notes)
        check_keys(block, f"{key}.", ["enabled", "auto_cast", *names(ds_keys.PRECISION_DROPPED)])
        if block.get("enabled") == "auto":
            block["enabled"] = dtype is _16_BIT[key]
            why = "no dtype is given" if dtype is None else f"dtype is {dtype}"
            notes.append(f'{key}.enabled: "auto" -> {show(block["enabled"])} ({why})')
        elif "enabled" in block:
            block["enabled"] = given[key] = flag(block["enabled"], f"{key}.enabled")
    if all(given.get(key) for key in _16_BIT):
        raise ValueError("bf16.enabled and fp16.enabled are both true; legal: one. Drop one block")
    for key, kind in _16_BIT.items():
        if dtype is not None and given.get(key, dtype is kind) != (dtype is kind):
            raise ValueError(
                f'{key}.enabled is {show(given[key])}, but dtype is {dtype}; set it to "auto", or '
                "change the dtype"
            )
        if dtype is kind and not config.get(key, {}).get("enabled"):
            config.setdefault(key, {})["enabled"] = True
            notes.append(f"{key}.enabled: unset -> true (dtype is {dtype})")
        if given.get(key):
            dtype = kind
    return dtype


def _set_batch_sizes(config: dict[str, Any], micro_batch: int, num_ranks: int, notes: list[str]) -> None:
    for key, value, reason in (
        ("train_micro_batch_size_per_gpu", micro_batch, "rows of one forward on one rank"),
        ("gradient_accumulation_steps", 1, "zo_dist adds up losses over its own micro-batches"),
        ("train_batch_size", micro_batch * num_ranks, f"{micro_batch} x {num_ranks} ranks"),
    ):
        was = config.get(key, value)
        config[key] = value
        if was != value:
            notes.append(f"{key}: {show(was)} -> {value} ({reason})")


def _drop_autos(block: dict[str, Any], prefix: str, notes: list[str]) -> None:
    for key, value in list(block.items()):
        if isinstance(value, dict):
            _drop_autos(value, f"{prefix}{key}.", notes)
        elif value in (None, "auto") or (isinstance(value, list) and "auto" in value):
            notes.append(f"{prefix}{key}: {show(block.pop(key))} dropped (DeepSpeed's default)")
