"""A step of the real code without values, as one of up to thousands of ranks: what plan computes, counted.

The engine, FSDP2, DeepSpeed and `ZeroOrder.step_batch` run as they do in training. Weights are fake tensors,
which have a shape and a storage that occupies nothing; collectives go to torch's fake process group, where
this process is rank 0 and no other exists.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig

from zo_dist import kernels
from zo_dist.batches import rows_of_rank
from zo_dist.composite import Composite
from zo_dist.engines import Engine
from zo_dist.engines.build import fsdp2_mesh, shard_with_fsdp2, zero3_engine, zero3_group
from zo_dist.methods import DenseConfig
from zo_dist.optimizer import ZeroOrder
from zo_dist.params import frozen_params
from zo_dist.planning.collectives import Counted, split
from zo_dist.planning.formulas import Mode
from zo_dist.planning.meta import Rows, Tracer, batch_of, without_values
from zo_dist.planning.plan import Plan, Planned, optimizer_of, outputs_of, unfilled
from zo_dist.probes import RowLoss
from zo_dist.state import tensors_of

# Of memory, beside what is planned.
TOLERANCE = 0.1

ENGINES = ["replicated", "fsdp2"]
NOT_RUN = "what is offloaded is not run"
if importlib.util.find_spec("deepspeed"):
    ENGINES.append("zero3")
else:
    NOT_RUN += ", and ZeRO-3 neither, as DeepSpeed is not installed"

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """What one step of a mode did on rank 0, beside what was planned of it.

    `traffic`: by the names of `formulas.Traffic`. `bytes`: of weights, state and what kahan keeps, and the
    most that there was besides at one time of a forward. (A write goes in pieces, which are smaller on a CPU
    than those that are planned.) `seconds`: what the dry run took.
    """

    planned: Planned
    traffic: Mapping[str, int]
    bytes: int
    seconds: float

    @property
    def differing(self) -> dict[str, tuple[int, int]]:
        """`{name: (counted, planned)}` of what is not as planned: traffic exactly, memory by `TOLERANCE`."""
        assert self.planned.traffic is not None
        planned = {name: getattr(self.planned.traffic, name) for name in self.traffic}
        differing = {k: (self.traffic[k], planned[k]) for k in planned if self.traffic[k] != planned[k]}
        if abs(self.bytes - self.planned_bytes) > TOLERANCE * self.planned_bytes:
            differing["bytes"] = self.bytes, self.planned_bytes
        return differing

    @property
    def planned_bytes(self) -> int:
        assert self.planned.memory is not None
        return self.planned.memory.held + self.planned.memory.forward

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.planned.name,
            "perturb": self.planned.mode.perturb,
            "traffic": dict(self.traffic),
            "bytes": self.bytes,
            "differing": self.differing,
            "seconds": round(self.seconds, 1),
        }


def dry_run(plan: Plan, shape: PretrainedConfig) -> Iterator[Stepped]:
    """One step of each mode that was planned, as rank 0; with every arm drawn in `module` mode.

    Of replicated weights, FSDP2 and ZeRO-3 (over all ranks or in groups) on the GPU: copies from the host are
    made where there is a GPU alone, so offloaded modes are passed over, and ZeRO-3 where DeepSpeed is not
    installed. ValueError where a process group exists, where ranks would have different numbers of rows (one
    rank stands for all), for a projection, for a learned scale, which is a function of the weights' values,
    and where DeepSpeed runs on GPUs in this process already; it stays on the CPU afterwards. Cost: some 2 ms
    for each module that the step runs; under ZeRO-3 for twice as many, and .5 ms for each weight and rank: it
    takes apart what it gathers.
    """
    config, count = plan.config, plan.cluster.count
    if dist.is_initialized():
        raise ValueError("--dry-run stands for all ranks by itself: start it without torchrun or deepspeed")
    if config.train.rows % count:
        raise ValueError(
            f"train.rows is {config.train.rows}: --dry-run has one rank stand for all {count}, so they must "
            f"have equally many rows (train.rows={-(-config.train.rows // count) * count})"
        )
    if config.optimizer.projection is not None:
        raise ValueError("optimizer.projection is set, whose searches --dry-run does not step: leave it out")
    if config.optimizer.scale.name == "learned":
        raise ValueError("optimizer.scale is learned: it follows the weights' values, which --dry-run lacks")
    runs = [p for p in plan.modes if p.memory and p.mode.engine in ENGINES and not p.mode.offload]
    if not runs:
        raise ValueError(f"--dry-run has nothing to run: {NOT_RUN}")
    if any(each.mode.engine == "zero3" for each in runs):
        _require_cpu()
    for each in runs:
        with _fake_ranks(count), _deepspeed_alone(count) if each.mode.engine == "zero3" else nullcontext():
            stepped = _stepped(plan, shape, each)
        yield stepped


def _stepped(plan: Plan, shape: PretrainedConfig, planned: Planned) -> Stepped:
    start = time.perf_counter()
    config, count = plan.config, plan.cluster.count
    mode, fake = planned.mode, FakeTensorMode(allow_non_fake_inputs=True)
    model = _model(plan, shape, mode, fake)
    if mode.perturb == "module":
        # The forward that a plan's memory is of.
        settings = dataclasses.replace(config.optimizer, sampler=DenseConfig())
        config = dataclasses.replace(config, optimizer=settings)
    optimizer = optimizer_of(config, model, mode.perturb)
    first, last = rows_of_rank(0, count, config.train.rows)
    micro = config.train.micro_rows or last - first
    with fake:
        rows = Rows(last - first, plan.facts["length"], plan.facts["answer"], first, config.train.rows)
        batch, loss = batch_of(rows, _CPU)
    batches = [{k: t[at : at + micro] for k, t in batch.items()} for at in range(first, last, micro)]
    held = _held(optimizer)
    peak = Peak([*held, *batch.values()], shape.get_text_config().vocab_size)
    without_values(optimizer.noise, peak)
    # With an anchor, a step after the anchor's own; with a jacobian one that has another before it; under
    # ZeRO-3 one after that from which it learns.
    earlier = optimizer.anchor.every or optimizer.jacobian.used
    steps = 2 if earlier or mode.engine == "zero3" else 1

    def row_loss(model: nn.Module, some: Mapping[str, Tensor]) -> Tensor:
        with peak.watched(), fake:
            out = loss(model, some)
        # Real numbers, which differ, so that no coefficient is 0.
        return torch.arange(1.0, 1.0 + len(out[0] if isinstance(out, tuple) else out))

    told: RowLoss = row_loss
    if outputs := outputs_of(config):
        told = Composite(
            lambda m, b: row_loss(m, b)[:, None].expand(-1, outputs), lambda o, _: o[:, 0], outputs
        )
    with Counted() as counted, torch.no_grad(), peak:
        for _ in range(steps):
            counted.calls.clear()
            peak.bytes = 0
            optimizer.step_batch(batches, told)
    dtype = config.engine.torch_compute_dtype or config.model.torch_dtype
    weights, others = split(counted.calls, dtype, mode.ranks if mode.engine != "replicated" else 1)
    return Stepped(
        planned=planned,
        traffic={
            "gathers": len(weights),
            "elements": sum(call[1] for call in weights),
            "put_in": sum(call[2] for call in weights) // dtype.itemsize,
            "exchanges": len(others),
            "scalars": sum(call[2] for call in others),
        },
        bytes=sum(t.numel() * t.element_size() for t in held) + peak.bytes,
        seconds=time.perf_counter() - start,
    )


def _model(plan: Plan, shape: PretrainedConfig, mode: Mode, fake: FakeTensorMode) -> nn.Module:
    config = plan.config
    model = unfilled(config, shape, config.model.torch_dtype)
    # They ask the process group for their ranks by real numbers.
    mesh = fsdp2_mesh(_CPU, mode.ranks) if mode.engine == "fsdp2" else None
    group = zero3_group(mode.ranks) if mode.engine == "zero3" else None
    with fake:
        model = model.to_empty(device=_CPU)
        # Emptied one by one.
        model.tie_weights()  # type: ignore[operator]
        if mesh is not None:
            return shard_with_fsdp2(model, mesh, compute_dtype=config.engine.torch_compute_dtype)
        return zero3_engine(model, plan.ds, group) if mode.engine == "zero3" else model


def _held(optimizer: ZeroOrder) -> list[Tensor]:
    """What this rank holds between steps."""
    engine = optimizer.engine
    params = [*optimizer.params, *frozen_params(engine.module, engine.shape_of)]
    held = [*(span.flat for span in engine.spans(params)), *engine.module.buffers()]
    return [*held, *tensors_of(optimizer.beside).values()]


class Peak(Tracer):  # type: ignore[no-untyped-call]
    """The most bytes that storages made inside had while it was `watched`: `bytes`. `outside` do not count.

    FSDP2 empties and fills the storages that it gathers into, so sizes are asked for again at each operator.
    """

    def __init__(self, outside: Sequence[Tensor], vocabulary: int | None) -> None:
        super().__init__(outside, vocabulary)
        self._inside: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes, self._watching = 0, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._watching:
            alive = [storage() for storage in self._inside.values()]
            self.bytes = max(self.bytes, sum(s.nbytes() for s in alive if s is not None))
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if isinstance(tensor, FakeTensor) and storage._cdata not in self._storages:
            self._inside[storage._cdata] = weakref.ref(storage)
        super()._follow(tensor)

    def _freed(self, key: int) -> None:
        super()._freed(key)
        self._inside.pop(key, None)


@contextmanager
def _fake_ranks(count: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `count`; what it gathers is its own part, from each."""
    from torch.distributed._tools import fake_collectives  # noqa: F401  (collectives of fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)  # type: ignore[no-untyped-call,unused-ignore]
    # Weights without values have copies without values; and it stands for GPUs, on which linear layers are
    # shifted in larger pieces.
    uncompared = patch.object(Engine, "compare_copies", lambda self, pieces, holders: None)
    try:
        with uncompared, patch.multiple(kernels, PART=kernels.GPU_PART, HELD=kernels.GPU_HELD):
            yield
    finally:
        dist.destroy_process_group()


def _require_cpu() -> None:
    """Have DeepSpeed, which settles that once, run on the CPU; ValueError if it has settled otherwise."""
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        from deepspeed.accelerator import get_accelerator

        device = get_accelerator().device_name()
    if device != "cpu":
        raise ValueError(f"DeepSpeed runs on {device} in this process: --dry-run wants DS_ACCELERATOR=cpu")


@contextmanager
def _deepspeed_alone(count: int) -> Iterator[None]:
    """Inside `_fake_ranks`: DeepSpeed without a launcher, its operator for CPU ranks, and values."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    with ExitStack() as stack:
        told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count)}
        stack.enter_context(patch.dict(os.environ, told))
        # It stands for GPUs, which compute in float16.
        stack.enter_context(patch.object(get_accelerator(), "is_fp16_supported", lambda: True))
        # By name it would be found in torch itself.
        backend = importlib.import_module("deepspeed.comm.torch")
        stack.enter_context(patch.object(backend, "build_shm_op", lambda: None))
        # It compares the order of modules by numbers, which fake tensors do not have.
        coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
        stack.enter_context(
            patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda numbers: None)
        )
        # What it keeps is of the group that goes.
        stack.enter_context(patch.object(groups, "_WORLD_GROUP", None))
        yield
