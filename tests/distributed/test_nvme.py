"""Weights on NVMe: the bits of a run are those of one without, and only what is drawn is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import loss_of, rows_for
from workers import Pool, digest, needs_deepspeed, whole_weights

STEPS = 20


def have_async_io() -> bool:
    if importlib.util.find_spec("deepspeed") is None:
        return False
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


@pytest.fixture(scope="module")
def async_io() -> None:
    """Compile DeepSpeed's op before ranks wait for it."""
    if not have_async_io():
        pytest.skip("DeepSpeed's async_io needs deepspeed and libaio (libaio-dev)")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)


def model_of_wide_layers() -> Any:
    """Of whose weights DeepSpeed leaves some, below 1 MiB on a rank, in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@contextmanager
def counted(module: Any) -> Iterator[dict[str, int]]:
    """Bytes that DeepSpeed reads from and writes to its files inside, without their padding."""
    swapper = next(p.nvme_swapper for p in module.parameters() if p.ds_tensor.final_location is not None)
    count, swap_in, swap_out = {"read": 0, "written": 0}, swapper.swap_in, swapper._swap_out

    def reading(params: Any, *args: Any, **options: Any) -> Any:
        count["read"] += sum(on_nvme(p) for p in params)
        return swap_in(params, *args, **options)

    def writing(params: Any, *args: Any, **options: Any) -> Any:
        count["written"] += sum(on_nvme(p) for p in params)
        return swap_out(params, *args, **options)

    swapper.swap_in, swapper._swap_out = reading, writing
    try:
        yield count
    finally:
        del swapper.swap_in, swapper._swap_out


def on_nvme(param: Any) -> int:
    """Bytes of a parameter that this rank has there."""
    return 0 if param.ds_tensor.final_location is None else int(param.ds_tensor.ds_numel) * 4


def engine_of(model: Any, path: str | None, buffer_size: int = 1 << 20) -> Any:
    import torch.distributed as dist

    from zo_dist.engines import read_ds_config
    from zo_dist.engines.build import zero3_engine

    zero: dict[str, Any] = {"stage": 3}
    if path is not None:
        zero["offload_param"] = {"device": "nvme", "nvme_path": path, "buffer_size": buffer_size}
    ds = read_ds_config(
        {"zero_optimization": zero}, hidden_size=512, micro_batch=1, num_ranks=dist.get_world_size()
    )
    return zero3_engine(model, ds)


def with_small_buffers(path: str) -> None:
    engine_of(model_of_wide_layers(), path, buffer_size=1000)


def without_libaio(path: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: False)
        engine_of(model_of_wide_layers(), path)


@needs_deepspeed
def test_a_machine_without_libaio_is_told_what_to_install(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    for message in pool(1).errors(without_libaio, str(tmp_path)):
        assert "apt-get install libaio-dev" in message


@pytest.mark.usefixtures("async_io")
def test_a_weight_above_the_buffers_is_an_error(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    for message in pool(2).errors(with_small_buffers, str(tmp_path)):
        assert "buffer_size is 1000 elements" in message
        assert "524288" in message


def train(path: str | None, perturb: str, folder: str) -> dict[str, Any]:
    from zo_dist import AdaLeZO, ZeroOrder
    from zo_dist.snapshot import load_snapshot, save_snapshot

    model = model_of_wide_layers()
    optimizer = ZeroOrder(
        engine_of(model, path), lr=1e-3, sampler=AdaLeZO(ratio=0.4), perturb=perturb, directions=1
    )
    result: dict[str, Any] = {"losses": [], "io": []}
    total = sum(map(on_nvme, model.parameters()))
    for step in range(STEPS):
        batch = rows_for("llama", 2, seed=step)
        if path is None or step == 0:
            result["losses"].append(optimizer.step_batch(batch, loss_of))
            continue
        with counted(model) as count:
            result["losses"].append(optimizer.step_batch(batch, loss_of))
        arms = {arm for arms in optimizer.record.arms for arm in arms}
        drawn = sum(on_nvme(p.param) for arm in arms for p in optimizer.arms[arm].params)
        # In shards both shifts are written, and taken back, before the update.
        forwards, writes = (1, 1) if perturb == "module" else (2, 5)
        expected = {"read": forwards * total + writes * drawn, "written": writes * drawn}
        result["io"].append((count, expected | {"forwards": forwards * total}))
    result["weights"] = digest(whole_weights(optimizer))
    prints = optimizer.engine.fingerprints(optimizer.params)
    result["prints"] = prints
    saved = save_snapshot(optimizer, folder)
    optimizer.step_batch(rows_for("llama", 2, seed=STEPS), loss_of)
    assert optimizer.engine.fingerprints(optimizer.params) != prints
    load_snapshot(optimizer, saved)
    assert optimizer.engine.fingerprints(optimizer.params) == prints
    return result


@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize("perturb", ["module", "shard"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_on_nvme_has_the_bits_of_one_in_memory(
    pool: Callable[[int], Pool], tmp_path: Path, num_ranks: int, perturb: str
) -> None:
    in_memory = pool(num_ranks).run(train, None, perturb, str(tmp_path / "memory"), timeout=300)
    path = str(tmp_path / "nvme")
    swapped = pool(num_ranks).run(train, path, perturb, str(tmp_path / "swapped"), timeout=300)
    for key in ("losses", "weights", "prints"):
        assert swapped[0][key] == in_memory[0][key]
    for rank in swapped:
        for count, expected in rank["io"]:
            assert expected["written"] > 0
            assert count["written"] == expected["written"]
            # DeepSpeed may fetch a weight too early, drop it, and read it once more in the same forward.
            assert expected["read"] <= count["read"] <= expected["read"] + expected["forwards"]
