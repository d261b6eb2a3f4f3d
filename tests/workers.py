"""Rank processes that live through a whole pytest session, and the models and engines tests use.

A test sends a module-level function and its arguments to every rank of a pool of 1 to 4 processes
(gloo) and gets each rank's result back. The processes are forked from one server that has imported
torch, transformers and DeepSpeed once. A call that does not come back in time, or after which the
ranks are out of step, costs the pool its life and the test its success. A pool whose ranks have gathered
many process groups makes room for a new one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

TESTS = Path(__file__).parent
CALL_TIMEOUT_S = 120.0
# Longer than any honest difference between ranks, once the first of them has raised.
_GRACE_S = 20.0
_START_TIMEOUT_S = 180.0
# Of process groups that calls have left on a rank, each with three threads that wake 100 times a second.
_MANY_GROUPS = 16

HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="deepspeed is not installed")


def runs_in(dtype: torch.dtype, engine: str) -> bool:
    """Does the engine run in this dtype here? DeepSpeed refuses float16 on a CPU that cannot compute it."""
    import torch

    if dtype != torch.float16 or not engine.startswith("zero"):
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@dataclass(frozen=True)
class Outcome:
    """What one rank did with a call: a value, or an exception by type name, text and traceback."""

    rank: int
    value: Any = None
    error: str = ""
    message: str = ""
    trace: str = ""
    groups: int = 0


class Pool:
    """`num_ranks` processes that stand for one job; started at the first call."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_TIMEOUT_S) -> list[Any]:
        """Every rank's result, in rank order; an exception on any rank fails the test."""
        outcomes = self._call(function, args, timeout)
        failed = [o for o in outcomes if o.error]
        if failed:
            self.stop()
            pytest.fail("\n".join(f"rank {o.rank} of {self.num_ranks}:\n{o.trace}" for o in failed), False)
        if max(o.groups for o in outcomes) > _MANY_GROUPS:
            self.stop()
        return [o.value for o in outcomes]

    def errors(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[str]:
        """Every rank's `"Type: message"` of a call that is to raise on all of them.

        The ranks must come out of it in step: a collective that follows has to work.
        """
        outcomes = self._call(function, args, timeout)
        calm = [o.rank for o in outcomes if not o.error]
        if calm:
            self.stop()
            raised = "\n".join(o.trace for o in outcomes if o.error)
            pytest.fail(f"ranks {calm} of {self.num_ranks} did not raise; of the others:\n{raised}", False)
        self.run(_in_step, timeout=_GRACE_S)
        return [f"{o.error}: {o.message}" for o in outcomes]

    def kill_during(self, seconds: float, function: Callable[..., Any], *args: Any) -> bool:
        """Start a call and kill -9 every rank after so many seconds; was any of them still at it?"""
        self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        time.sleep(seconds)
        caught = not all(pipe.poll() for _, pipe in self._workers)
        self.stop()
        return caught

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Outcome]:
        self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.num_ranks:
            waiting = [(r, p) for r, (_, p) in enumerate(self._workers) if r not in outcomes]
            left = deadline - time.monotonic()
            multiprocessing.connection.wait([p for _, p in waiting], max(0.0, left))
            for rank, pipe in waiting:
                if pipe.poll():
                    try:
                        outcomes[rank] = Outcome(rank, *pipe.recv())
                    except EOFError:
                        outcomes[rank] = Outcome(rank, None, "EOFError", "the process died", "it died")
                    if outcomes[rank].error:
                        deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                missing = [r for r in range(self.num_ranks) if r not in outcomes]
                self.stop()
                others = "\n".join(f"rank {o.rank}:\n{o.trace}" for o in outcomes.values() if o.error)
                pytest.fail(f"ranks {missing} of {self.num_ranks} did not come back in time\n{others}", False)
        return [outcomes[rank] for rank in range(self.num_ranks)]

    def _start(self) -> None:
        if self._workers:
            return
        context, port = _server(), _free_port()
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.num_ranks, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        deadline = time.monotonic() + _START_TIMEOUT_S
        for _, pipe in self._workers:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                pytest.fail(f"a pool of {self.num_ranks} ranks did not start in {_START_TIMEOUT_S} s", False)
            pipe.recv()


def launch(commands: list[list[str]], timeout: float = 240.0) -> list[subprocess.CompletedProcess[str]]:
    """A command for each rank of a job, arguments of `zo-dist` or a script with its own; how each rank ended.

    What torchrun does, for a tenth of the time: new processes that find in their environment what it sets,
    and no group yet; but forked from the server, so that they are spared the imports. Once a rank has
    failed the others are ended. That the launchers themselves start what they should is in test_launch.py.
    """
    context, port = _server(), _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank, args in enumerate(commands):
            place = rank, len(commands), port
            ranks.append(context.Process(target=_command, args=(args, place, folder), daemon=True))
            ranks[-1].start()
        deadline = time.monotonic() + timeout
        while left := [process.sentinel for process in ranks if process.exitcode is None]:
            multiprocessing.connection.wait(left, max(0.0, deadline - time.monotonic()))
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            if time.monotonic() > deadline:
                for process in ranks:
                    process.kill()
        said = [[Path(folder, f"{rank}.{n}").read_text() for n in (1, 2)] for rank in range(len(ranks))]
    ends = zip(commands, ranks, said, strict=True)
    return [subprocess.CompletedProcess(args, p.exitcode or 0, *texts) for args, p, texts in ends]


def _server() -> Any:
    """What starts processes that have imported much already, and compiled what DeepSpeed compiles."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers_preload"])
    with _environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path])):
        forkserver.ensure_running()
    return context


def environment() -> dict[str, str]:
    """What rank processes need around them, also those that a test launches by command."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(TESTS.parent / ".torch_extensions"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": extensions,
        "HF_HUB_OFFLINE": "1",
        "PATH": path,  # for ninja
    }


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in {**environment(), **values}}
    os.environ.update({**environment(), **values})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _become(rank: int, num_ranks: int, port: int) -> None:
    """Have this process find what a launcher tells its ranks."""
    import torch

    os.environ.update(environment())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)


def _command(args: list[str], place: tuple[int, int, int], folder: str) -> None:
    from zo_dist.cli import main

    _become(*place)
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{place[0]}.{number}", os.O_WRONLY | os.O_CREAT), number)
    if not args[0].endswith(".py"):
        sys.exit(main(args))
    sys.argv = args
    runpy.run_path(args[0], run_name="__main__")


def _serve(rank: int, num_ranks: int, port: int, pipe: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    _become(rank, num_ranks, port)
    sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((function(*args), "", "", "", len(_world.pg_map)))
        except Exception as error:
            pipe.send((None, type(error).__name__, str(error), traceback.format_exc(), len(_world.pg_map)))
        if HAVE_DEEPSPEED:
            _forget_groups()


def _forget_groups() -> None:
    """DeepSpeed keeps the groups of the first AutoTP engine for all engines of a process after it."""
    from deepspeed.utils import groups

    for name in ("mpu", "mesh_device", "_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"):
        setattr(groups, name, None)


def _in_step() -> bool:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return bool(total == dist.get_world_size())


# What follows runs on the ranks (or in the test itself, as one process without a group).


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that all ranks see, gone afterwards."""
    import torch.distributed as dist

    names: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    assert names[0] is not None
    try:
        yield Path(names[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(names[0])


ENGINES = (
    "replicated",
    "ddp",
    "fsdp2",
    "hsdp_2x1",
    "hsdp_1x2",
    "hsdp_2x2",
    "fsdp2_mixed",
    "fsdp2_offload",
    "zero3",
    "zero3_init",
    "zero3_offload",
    "zero3_2x2",
    "zero0",
    "zero2",
    "pipeline",
    "tp_2",
    "tp_2x2",
    "fsdp2_tp_2x2",
)


def wrap(engine: str, model: Any) -> Any:
    """`model` (the same on every rank) as a user of the engine would hand it to `ZeroOrder`."""
    import torch

    if engine == "replicated":
        return model
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if engine == "pipeline":
        from zo_dist import pipeline

        # Divides the rows of test_same_bits.py, as often as probes repeat them.
        return pipeline(model, num_micro_batches=11)
    if engine.startswith("autotp"):
        return auto_tp(model)
    if "tp_" in engine:
        return _tensor_parallel(engine, model)
    if engine.startswith(("fsdp2", "hsdp")):
        return _fully_shard(engine, model)
    if engine == "zero3_init":
        return _through_zero_init(model)
    if engine == "zero2":  # DeepSpeed builds it with an optimizer only; a user may have one
        config = {**ds_config(model, {"stage": 0}), "zero_optimization": {"stage": 2}}
        config["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return deepspeed_engine(model, config, optimizer=optimizer)
    if engine == "zero3_2x2":
        from zo_dist.engines.build import zero3_engine, zero3_group

        return zero3_engine(model, _read_ds(model, {"stage": 3}), zero3_group(2))
    zero: dict[str, Any] = {"stage": int(engine[4])}
    if engine == "zero3_offload":
        zero["offload_param"] = {"device": "cpu"}
    return deepspeed_engine(model, ds_config(model, zero))


def auto_tp(model: Any, **settings: Any) -> Any:
    """By DeepSpeed, in two; ranks beyond hold replicas."""
    import torch

    from zo_dist.engines import read_ds_config
    from zo_dist.engines.build import autotp_engine

    source = {"tensor_parallel": {"autotp_size": 2, **settings}}
    dtype, ranks = next(model.parameters()).dtype, torch.distributed.get_world_size()
    ds = read_ds_config(source, hidden_size=16, micro_batch=1, num_ranks=ranks, dtype=dtype)
    return autotp_engine(model, ds)


def _tensor_parallel(engine: str, model: Any) -> Any:
    """By torch's `parallelize_module`, in two; the replicas of that are shards under FSDP2."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    replicas = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("data", "tp"))
    if isinstance(model, torch.nn.Sequential):
        # In 2 and 1 columns, 4 and 3 rows, 4 and 3 columns; the tied ones stay whole.
        rowwise = RowwiseParallel(input_layouts=Replicate())
        plan = {"0": rowwise, "3": ColwiseParallel(output_layouts=Replicate()), "5": rowwise}
    else:
        columns = [f"self_attn.{x}_proj" for x in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
        plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
        plan |= {f"model.layers.*.{x}": RowwiseParallel() for x in ("self_attn.o_proj", "mlp.down_proj")}
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh["tp"], plan)
    return _fully_shard(engine, model, mesh["data"]) if engine.startswith("fsdp2") else model


def _fully_shard(engine: str, model: Any, mesh: Any = None) -> Any:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    shape: tuple[int, ...] = (dist.get_world_size(),)
    if engine.startswith("hsdp"):
        shape = tuple(int(n) for n in engine.split("_")[1].split("x"))
    names = ("replicate", "shard")[-len(shape) :]
    options: dict[str, Any] = {"mesh": mesh or init_device_mesh("cpu", shape, mesh_dim_names=names)}
    if engine == "fsdp2_mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if engine == "fsdp2_offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    layers = layers_of(model)
    for layer in layers:
        fully_shard(layer, **options)
    if engine == "fsdp2_prefetch":
        for layer, following in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
    return fully_shard(model, **options)


def layers_of(model: Any) -> list[Any]:
    """The blocks that get an FSDP2 group of their own."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            return list(module)
    return [m for m in model.children() if next(m.parameters(), None) is not None][:1]


def ds_config(model: Any, zero: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = _read_ds(model, zero).config
    return config


def _read_ds(model: Any, zero: Mapping[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    from zo_dist.engines import read_ds_config

    source: dict[str, Any] = {"train_batch_size": "auto", "zero_optimization": dict(zero)}
    dtype = next(model.parameters()).dtype
    for key, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtype == kind:
            source[key] = {"enabled": True}
    ranks = dist.get_world_size()
    return read_ds_config(source, hidden_size=16, micro_batch=1, num_ranks=ranks)


def deepspeed_engine(model: Any, config: Mapping[str, Any], **options: Any) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, config=dict(config), dist_init_required=False, **options)[0]


def _through_zero_init(model: Any) -> Any:
    """As a large model is loaded: `from_pretrained` under a live `HfDeepSpeedConfig`."""
    import deepspeed
    import torch.distributed as dist
    from transformers.integrations import HfDeepSpeedConfig

    # Else zero.Init partitions for a single rank.
    deepspeed.init_distributed()
    config = ds_config(model, {"stage": 3})
    with scratch_folder() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        alive = HfDeepSpeedConfig(dict(config))
        sharded = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
        assert all(hasattr(p, "ds_id") for p in sharded.parameters()), "zero.Init did not run"
        engine = deepspeed_engine(sharded, config)
        del alive
    return engine


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, what is freed goes back to the system at once: else a peak is that of the past."""
    mallopt, threshold = ctypes.CDLL("libc.so.6").mallopt, -3  # M_MMAP_THRESHOLD, malloc.h
    mallopt(threshold, 1 << 16)
    try:
        yield
    finally:
        mallopt(threshold, 1 << 25)  # the highest there is, as for the calls before


def whole_weights(optimizer: Any) -> dict[str, Any]:
    """Every trainable weight by canonical name: a clone, whole, on this rank."""
    weights = {}
    for param in optimizer.params:
        with optimizer.engine.whole(param) as weight:
            weights[param.name] = weight.clone().reshape(param.shape)
    return weights


def digest(weights: Mapping[str, Any]) -> str:
    """One hash of the names, dtypes and bytes of some weights."""
    import hashlib

    import torch

    total = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
