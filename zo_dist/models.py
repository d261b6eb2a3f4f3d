"""From the config to a model that is loaded, frozen where it is not trained, and sharded."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.distributed.configuration_utils import DistributedConfig

from zo_dist.checkpoint import CHECKSUMS, check_model
from zo_dist.config import Config, ModelConfig
from zo_dist.engines import DsConfig, pipeline, read_ds_config
from zo_dist.engines.build import (
    NotInPartsError,
    autotp_engine,
    fsdp2_mesh,
    reading_shards,
    require_divisor,
    require_process_group,
    shard_by_rows,
    shard_with_fsdp2,
    zero3_engine,
    zero3_group,
    zero3_loading,
)
from zo_dist.params import canonical_name
from zo_dist.tasks import resolve_model

log = logging.getLogger(__name__)

# By transformers itself: ours takes its place. (What is left out is None in 5.15, and no number.)
NO_SHARDING = DistributedConfig(tp_size=1, fsdp_size=1)


def load_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, Any]:
    """The model's tokenizer and its `transformers` config; ValueError if there is no such model."""
    source = str(resolve_model(config.source))
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    try:
        hf_config = AutoConfig.from_pretrained(source, **options)
        return AutoTokenizer.from_pretrained(source, **options), hf_config
    except (OSError, ValueError) as error:
        raise ValueError(f"model.source: cannot load {config.source!r}: {error}") from error


def check_saved(config: ModelConfig) -> None:
    """ValueError if the model is one that `save_model` wrote, and its files are not as they were."""
    path = Path(resolve_model(config.source))
    if (path / CHECKSUMS).is_file():
        start = time.perf_counter()
        names = check_model(path)
        log.info("%s: %d files are as saved (%.1f s)", path, len(names), time.perf_counter() - start)


def longest_input(hf_config: Any) -> int | None:
    """The most tokens that the model's positions allow; None where nothing says so."""
    text = hf_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def choose_engine(config: Config, num_ranks: int) -> str:
    """`replicated`, `fsdp2`, `deepspeed` or `pipeline`: what `auto` means on so many ranks."""
    if config.engine.kind != "auto":
        return config.engine.kind
    if config.engine.deepspeed is not None:
        return "deepspeed"
    return "fsdp2" if num_ranks > 1 else "replicated"


def load_model(config: Config, hf_config: Any, device: torch.device, rank: int, num_ranks: int) -> nn.Module:
    """The model as `ZeroOrder` takes it, in eval mode. Every rank must call it.

    fsdp2 and deepspeed stage 3 read of each file what this rank is to hold, but for models that
    `reading_shards` names and where fsdp2's shards are offloaded to the CPU of a GPU machine. Those go whole
    through each process's memory, or, in the dtype of their safetensors files, through pages that ranks
    share; under stage 3 without groups (`engine.shard_ranks`) rank 0 alone reads them. A pipeline's do, all.
    """
    kind = choose_engine(config, num_ranks)
    if kind == "fsdp2":
        require_process_group(kind)
        if config.engine.tensor_ranks is not None:
            return _cut_by_plan(config, hf_config, num_ranks).to(device)
        # Before the weights are read, which takes long: a mesh that cannot be is an error.
        mesh = fsdp2_mesh(device, config.engine.shard_ranks)
        if config.engine.offload_to_cpu and device.type == "cpu" and rank == 0:
            log.info("engine.offload_to_cpu changes nothing here: the ranks compute on the CPU")
        offload, compute_dtype = config.engine.offload_to_cpu, config.engine.torch_compute_dtype
        shard = partial(shard_with_fsdp2, mesh=mesh, offload_to_cpu=offload, compute_dtype=compute_dtype)
        # Read in shards, weights go to the device of the mesh, where those to be offloaded may find no room.
        whole = offload and device.type != "cpu"
        model = None if whole else _read_in_parts(config.model, shard, mesh.size(-1), rank)
        return shard(_trainable(config.model)) if model is None else model.to(device)
    if kind == "deepspeed":
        assert config.engine.deepspeed is not None
        ds = read_ds(config, hf_config, num_ranks)
        for note in ds.notes if rank == 0 else ():
            log.info("%s: %s", config.engine.deepspeed, note)
        if ds.stage == 3:
            require_process_group(kind)
            group = zero3_group(config.engine.shard_ranks)
            shard, num_shards = partial(shard_by_rows, group=group), config.engine.shard_ranks or num_ranks
            model = _read_in_parts(config.model, shard, num_shards, rank)
            if model is not None:
                return zero3_engine(model, ds, group)
            with zero3_loading(ds) if group is None else nullcontext():
                return zero3_engine(_trainable(config.model), ds, group)
        if ds.tensor_ranks > 1:
            require_process_group(kind)
            return autotp_engine(_trainable(config.model), ds)
    if kind == "pipeline":
        require_process_group(kind)
        assert config.engine.micro_batches is not None
        return pipeline(_trainable(config.model), config.engine.micro_batches, device)
    return _trainable(config.model).to(device)


def _cut_by_plan(config: Config, hf_config: Any, num_ranks: int) -> nn.Module:
    """The model, whose layers transformers cuts over `engine.tensor_ranks` ranks, and shards over the rest.

    ValueError, naming the legal numbers, where the ranks, or the model's heads, cannot be cut so; and for a
    model without a plan, from transformers.
    """
    cut, text = config.engine.tensor_ranks, hf_config.get_text_config()
    assert cut is not None
    heads = [getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    divided = math.gcd(num_ranks, *(number for number in heads if number))
    what = f"the number of ranks, {num_ranks}, and those of the model's heads, {heads}"
    require_divisor("engine.tensor_ranks", cut, divided, what, "none")
    distributed = DistributedConfig(tp_size=cut, fsdp_size=num_ranks // cut)
    return _trainable(config.model, distributed_config=distributed)


def read_ds(config: Config, hf_config: Any, num_ranks: int) -> DsConfig:
    """The DeepSpeed config that the run names, as it will be used; ValueError if it cannot be."""
    path = config.engine.deepspeed
    assert path is not None
    if not Path(path).is_file():
        raise ValueError(f"engine.deepspeed: there is no file {path!r} (looked in {Path.cwd()})")
    ds = read_ds_config(
        path,
        hidden_size=getattr(hf_config.get_text_config(), "hidden_size", None),
        micro_batch=config.train.micro_rows or -(-config.train.rows // num_ranks),
        num_ranks=num_ranks,
        dtype=config.model.torch_dtype,
    )
    if ds.stage != 3 and config.engine.shard_ranks is not None:
        raise ValueError(
            f"engine.shard_ranks is {config.engine.shard_ranks}, but {path} is of stage {ds.stage}, which "
            "shards no weights: set zero_optimization.stage to 3 there, or engine.shard_ranks to null"
        )
    return ds


def _read_in_parts(
    config: ModelConfig, shard: Callable[[nn.Module], nn.Module], num_shards: int, rank: int
) -> nn.Module | None:
    """The model as `shard` has it, of which each rank has read its part; None if it has to be read whole."""
    try:
        with reading_shards(shard, num_shards):
            return _trainable(config, distributed_config=NO_SHARDING)
    except NotInPartsError as reason:
        if rank == 0:
            log.info("%s is read whole: %s", config.source, reason)
    return None


def _trainable(config: ModelConfig, **options: object) -> nn.Module:
    """The model in memory, in eval mode, frozen where it is not trained. `options`: of `from_pretrained`.

    ValueError, before any training, if its files cannot be read or lack a weight.
    """
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(resolve_model(config.source)),
            dtype=config.torch_dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except OSError as error:
        raise ValueError(f"model.source: cannot load {config.source!r}: {error}") from error
    model: nn.Module = read[0]
    if missing := sorted(read[1]["missing_keys"]):
        raise ValueError(
            f"model.source: the files of {config.source!r} lack {len(missing)} of the model's weights, which "
            f"would be random numbers: {', '.join(missing[:5])}; name a folder that has them all"
        )
    freeze(model, config.parameters)
    return model.eval()


def freeze(module: nn.Module, pattern: str | None) -> None:
    """Leave trainable what `pattern` is found in; ValueError if that is nothing."""
    if pattern is None:
        return
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"model.parameters is {pattern!r}, not a regular expression: {error}") from error
    names = {canonical_name(name): param for name, param in module.named_parameters()}
    for name, param in names.items():
        param.requires_grad_(bool(wanted.search(name)))
    if not any(param.requires_grad for param in names.values()):
        examples = list(names)[:: max(1, len(names) // 5)]
        raise ValueError(
            f"model.parameters is {pattern!r}, which is found in no parameter's name; names look like "
            f"{', '.join(examples)}"
        )
