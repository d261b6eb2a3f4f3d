"""A model of which each rank reads its part is, bit for bit, the one that a process reads whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import KINDS, build, loss_of, rows_for
from planned import wide_llama
from tiny_run import write_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from workers import Pool, digest, freed_at_once, needs_deepspeed, whole_weights

DS_ZERO3 = str(Path(__file__).parents[2] / "configs" / "ds_zero3.json")
ENGINES = {"fsdp2": {"kind": "fsdp2"}, "zero3": {"kind": "deepspeed", "deepspeed": DS_ZERO3}}
FILES = ("one file", "files of some weights", "without the head's names", "pickled")


def write(path: Path, kind: str, files: str, dtype: torch.dtype) -> Path:
    model = build(kind, dtype)
    if files == "without the head's names":
        model.base_model.save_pretrained(path)
    elif files == "pickled":
        model.config.save_pretrained(path)
        GenerationConfig().save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    else:
        model.save_pretrained(path, max_shard_size="4KB" if files == "files of some weights" else "1GB")
    return path


def whole(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return {
        "weights": digest(dict(model.named_parameters())),
        "buffers": digest(dict(model.named_buffers())),
        "tied": model.get_input_embeddings().weight is model.lm_head.weight,
    }


def held(param: Any) -> torch.Tensor:
    """What this rank has of a weight, as it lies in memory."""
    part: torch.Tensor = param.ds_tensor if hasattr(param, "ds_tensor") else param.to_local()
    return part


def in_parts(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """What a rank has: read, then trained for a step whose every write is large, then read again."""
    import torch.distributed as dist

    from zo_dist import ZeroOrder
    from zo_dist.config import load_config
    from zo_dist.models import load_model
    from zo_dist.params import unwrap

    config = load_config(config_path, overrides)
    hf_config = AutoConfig.from_pretrained(config.model.source)
    results = []
    for _ in range(2):
        model = load_model(config, hf_config, torch.device("cpu"), dist.get_rank(), dist.get_world_size())
        module: Any = unwrap(model)
        placed = list(module.parameters())
        assert not any(held(p).is_meta for p in placed)
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        for p in placed:
            p.requires_grad_(True)
        # Its start-up check sees whether writes reach the next forward.
        optimizer = ZeroOrder(model, lr=1.0)
        results.append(
            {
                "weights": digest(whole_weights(optimizer)),
                "buffers": digest(dict(module.named_buffers())),
                "tied": module.get_input_embeddings().weight is module.lm_head.weight,
                "frozen": sorted(frozen),
                "training": module.training,
            }
        )
        # FSDP2 must not put a shard elsewhere at the first forward, as for a weight that it manages twice.
        before = [held(p).data_ptr() for p in placed if held(p).numel()]
        optimizer.step_batch(rows_for("llama", 3), loss_of)
        assert [held(p).data_ptr() for p in placed if held(p).numel()] == before
        assert digest(whole_weights(optimizer)) != results[-1]["weights"]
    assert results[0] == results[1], "a step wrote to the files that were read"
    return results[0]


def config_for(folder: Path, source: Path, dtype: torch.dtype, engine: str, **options: Any) -> str:
    model = {"source": str(source), "dtype": str(dtype).removeprefix("torch.")}
    return str(write_config(folder, model=model, engine={**ENGINES[engine], **options}))


on_each_engine = pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])


@on_each_engine
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sequential"])
def test_ranks_read_what_one_process_reads(
    pool: Callable[[int], Pool], tmp_path: Path, kind: str, num_ranks: int, engine: str
) -> None:
    source = write(tmp_path / "source", kind, "files of some weights", torch.float32)
    path = config_for(tmp_path, source, torch.bfloat16, engine)
    expected = {**whole(source, torch.bfloat16), "frozen": [], "training": False}
    assert pool(num_ranks).run(in_parts, path, []) == [expected] * num_ranks


@on_each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("files", FILES)
def test_whatever_the_files_are_and_their_dtype(
    pool: Callable[[int], Pool], tmp_path: Path, files: str, dtype: torch.dtype, engine: str
) -> None:
    source = write(tmp_path / "source", "llama_tied", files, dtype)
    path = config_for(tmp_path, source, torch.float32, engine)
    pattern = r"layers\.1\."
    result = pool(2).run(in_parts, path, [f"model.parameters={pattern}"])[0]
    names = dict(build("llama_tied").named_parameters())
    assert result["frozen"] == sorted(name for name in names if "layers.1." not in name)
    assert {key: result[key] for key in ("weights", "buffers", "tied")} == whole(source, torch.float32)


@on_each_engine
def test_replicas_of_shards_read_their_shard(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    source = write(tmp_path / "source", "qwen3", "one file", torch.bfloat16)
    path = config_for(tmp_path, source, torch.bfloat16, engine, shard_ranks=2)
    expected = {**whole(source, torch.bfloat16), "frozen": [], "training": False}
    assert pool(4).run(in_parts, path, []) == [expected] * 4


@needs_deepspeed
def test_offloaded_partitions_hold_what_was_read(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "gpt2", "one file", torch.bfloat16)
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    path = config_for(tmp_path, source, torch.bfloat16, "zero3", deepspeed=str(tmp_path / "ds.json"))
    expected = {**whole(source, torch.bfloat16), "frozen": [], "training": False}
    assert pool(2).run(in_parts, path, []) == [expected] * 2


@on_each_engine
def test_a_weight_that_the_files_lack_is_an_error(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    model = build("llama")
    del model.model.layers[1].mlp.up_proj.weight
    model.save_pretrained(tmp_path / "source")
    path = config_for(tmp_path, tmp_path / "source", torch.float32, engine)
    for message in pool(2).errors(in_parts, path, []):
        assert "lack 1 of the model's weights" in message
        assert "model.layers.1.mlp.up_proj.weight" in message


def dtypes_of_an_engine() -> tuple[torch.dtype, torch.dtype]:
    """Of the partitions and of the logits, where the config has another dtype than the model."""
    from zo_dist.engines import read_ds_config
    from zo_dist.engines.build import zero3_engine

    source = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    ds = read_ds_config(source, hidden_size=16, micro_batch=1, num_ranks=2)
    engine: Any = zero3_engine(build("llama"), ds)
    (dtype,) = {held(p).dtype for p in engine.module.parameters()}
    with torch.no_grad():
        return dtype, engine(rows_for("llama", 2)["input_ids"]).logits.dtype


@needs_deepspeed
def test_a_model_is_partitioned_in_the_dtype_of_the_config(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(dtypes_of_an_engine) == [(torch.bfloat16, torch.bfloat16)] * 2


def rows_over_gpus_alone() -> None:
    import torch.distributed as dist

    from zo_dist.engines.build import shard_by_rows

    shard_by_rows(build("llama").to("meta"), dist.new_group(backend="cuda:gloo"))


def test_a_group_that_takes_no_cpu_tensors_is_refused(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).errors(rows_over_gpus_alone):
        assert 'init_process_group("cpu:gloo,cuda:nccl")' in message


def loading(config_path: str) -> Callable[[], Any]:
    """What loads the model of a config on this rank."""
    import torch.distributed as dist

    from zo_dist.config import load_config
    from zo_dist.models import load_model

    config = load_config(config_path, [])
    hf_config = AutoConfig.from_pretrained(config.model.source)
    place = torch.device("cpu"), dist.get_rank(), dist.get_world_size()
    return lambda: load_model(config, hf_config, *place)


def peak_of_loading(config_path: str) -> int:
    """Bytes that loading needs at most, above what the process had before."""
    from benchmarks import memory

    load = loading(config_path)
    with freed_at_once():
        memory.settled()
        before = memory.resident_bytes()
        return memory.peak_bytes(load, torch.device("cpu")) - before


def peak_of_private_bytes(config_path: str) -> int:
    """Of loading: bytes that are no pages of files, above what the process had before."""
    from benchmarks import memory
    from zo_dist.memory import proc_status

    load = loading(config_path)
    with freed_at_once():
        memory.settled()
        before, most, ended = proc_status("RssAnon"), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.001):
                most.append(proc_status("RssAnon"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            model = load()
        finally:
            ended.set()
            watcher.join()
        # The model is still held: what it needs of its own is in it.
        assert model is not None
        return max(*most, proc_status("RssAnon")) - before


@on_each_engine
def test_shards_in_the_dtype_of_the_files_are_pages_of_these(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    model = AutoModelForCausalLM.from_config(wide_llama(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="40MB")
    numel = sum(p.numel() for p in model.parameters())
    path = config_for(tmp_path, tmp_path / "source", torch.bfloat16, engine)
    pool(2).run(peak_of_private_bytes, path)  # what is imported once
    # .3 MB and 7 MB where this was written: ZeRO-3 cuts a weight flat whose rows do not divide. A rank's
    # shard alone is 76 MB.
    assert numel > 70e6
    assert max(pool(2).run(peak_of_private_bytes, path)) < 20e6


def private_bytes_of_loads(config_path: str) -> int:
    """The most that one of some loads leaves, as processes of the command line allocate."""
    from benchmarks import memory
    from zo_dist.memory import keep_freed, proc_status

    load, left = loading(config_path), []
    with pytest.MonkeyPatch.context() as patch:
        # Of this test alone: what measures memory after it in this process sets the C library itself.
        patch.setattr("zo_dist.memory._keeping", [])
        keep_freed()
        for _ in range(6):
            memory.settled()
            before = proc_status("RssAnon")
            model = load()
            left.append(proc_status("RssAnon") - before)
            del model
    return max(left)


@on_each_engine
def test_what_is_freed_while_a_model_is_loaded_does_not_add_up(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    """In holes that the next weight does not fit into: in some processes, and then for every weight."""
    model = AutoModelForCausalLM.from_config(wide_llama(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    path = config_for(tmp_path, tmp_path / "source", torch.bfloat16, engine)
    pool(2).run(private_bytes_of_loads, path)  # what is imported once
    assert max(pool(2).run(private_bytes_of_loads, path)) < 20e6


@on_each_engine
def test_a_rank_needs_no_more_than_its_shard_and_the_bytes_it_reads(
    pool: Callable[[int], Pool], tmp_path: Path, engine: str
) -> None:
    model = AutoModelForCausalLM.from_config(wide_llama(), dtype=torch.float16)
    model.save_pretrained(tmp_path / "source", max_shard_size="40MB")
    numel = sum(p.numel() for p in model.parameters())
    path = config_for(tmp_path, tmp_path / "source", torch.float32, engine)
    pool(2).run(peak_of_loading, path)  # what is imported once
    largest = max(p.numel() for p in model.parameters())
    # Half of 76 M weights in float32, half of the file's pages, which stay mapped, and the weights that
    # transformers reads ahead, no more than two of the largest: 295 MB. One that is read whole takes 456 MB.
    limit = numel // 2 * (4 + 2) + 2 * largest * 4
    assert max(pool(2).run(peak_of_loading, path)) < limit
