"""Each rank holds some of the layers: a pipeline by `torch.distributed.pipelining`, forward only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from zo_dist.engines.agreement import fingerprint
from zo_dist.engines.base import Engine
from zo_dist.engines.replicated import ReplicatedEngine
from zo_dist.engines.stages import Left, Stage, cut_into_stage, trial
from zo_dist.params import Param, Span, canonical_name, evaluating, require_contiguous, unwrap

_STAGE = "_zo_dist_stage"


def pipeline(model: nn.Module, num_micro_batches: int, device: torch.device | None = None) -> nn.Module:
    """Cut a causal language model of transformers, whole on each rank, into one stage per rank; returns it.

    Rank s of S keeps layers `s L / S ... (s + 1) L / S - 1` of L, the first also what runs before them and
    the last what runs after. All other weights lose their memory, and what stays moves to `device`.
    `ZeroOrder` takes the result; every rank gives the same rows to `step_batch`. All probes of a batch flow
    through the ranks in at most `num_micro_batches` (M) parts of equally many rows, so that a rank waits for
    (S - 1) / (M + S - 1) of the time. A weight tied between embeddings and head is on the first rank and on
    the last.

    Every rank must call it. Cost: a forward of two tokens of the whole model, and one of the pipeline, which
    must give the same logits. Raises ValueError on every rank for more ranks than layers, ranks whose weights
    differ, and models that cannot be cut: whose layers are no chain, with one tensor handed on and no
    weights between them, or with quantised weights.
    """
    module = unwrap(model)
    with Engine(module, device or next(module.parameters()).device).jointly():
        if stage_of(module) is not None:
            raise ValueError("this model is a stage of a pipeline already")
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches is {num_micro_batches}; it must be at least 1")
        for name, param in module.named_parameters():
            if param.device.type == "meta" or hasattr(param, "placements"):
                raise ValueError(
                    "pipeline takes a model that is whole on each rank; this one is sharded or on meta"
                )
            require_contiguous(canonical_name(name), param)
    whole = ReplicatedEngine(module)
    whole.require_equal("the pipeline", {"num_micro_batches": num_micro_batches})
    with whole.jointly():
        stage, logits = cut_into_stage(module, whole.rank, whole.num_ranks, num_micro_batches)
    setattr(module, _STAGE, stage)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type != "meta":
            tensor.data = tensor.data.to(device or whole.device)
    _require_same_logits(PipelineEngine(module), logits)
    return module


def stage_of(module: nn.Module) -> Stage | None:
    """Which stage a module is that `pipeline` cut."""
    return getattr(module, _STAGE, None)


class PipelineEngine(Engine):
    """Whole layers on one rank each. A forward sends hidden states from rank to rank, a step scalars besides.

    All ranks take the same rows, which count once, and the last alone knows their losses.
    """

    name = "pipeline"
    # Its parts hold other rows of the stacked batch each.
    shares_prefix = False

    def __init__(self, module: nn.Module) -> None:
        stage = stage_of(module)
        assert stage is not None
        self._stage, self._parts = stage, _Parts(stage)
        here = [param for param in module.parameters() if param.device.type != "meta"]
        super().__init__(module, here[0].device)
        self.teller_of = [self.num_ranks - 1] * self.num_ranks
        self._schedule: tuple[object, PipelineStage, ScheduleGPipe] | None = None
        named = {canonical_name(name): param for name, param in module.named_parameters()}
        held = self.exchange([float(param.device.type != "meta") for param in named.values()]).bool()
        ranks = {name: held[:, i].nonzero().flatten().tolist() for i, name in enumerate(named)}
        self._first_holder = {name: of_name[0] for name, of_name in ranks.items()}
        for name, of_name in ranks.items():
            # Tied weights.
            if len(of_name) > 1:
                mine, self.has_copies = self.rank in of_name, True
                bits = fingerprint(named[name]) if mine else 0
                self.require_equal("the starting weights", {name: bits}, of_name if mine else [self.rank])

    def here(self, params: Iterable[Param]) -> list[Param]:
        some = [(p, tuple(o for o in p.owners if o.module in self._stage.runs)) for p in params]
        return [replace(param, owners=owners) for param, owners in some if owners]

    def _span(self, param: Param) -> Span | None:
        weight = param.param.detach()
        return None if weight.device.type == "meta" else Span(param.name, weight.view(-1), 0)

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        weight = param.param.detach()
        if weight.device.type == "meta":
            weight = torch.empty_like(weight, device=self.device)
        dist.broadcast(weight, self._first_holder[param.name])
        yield weight

    def evaluate(self, part: Callable[[int, int], Tensor], rows: int, width: int) -> Tensor:
        size = -(-rows // self._stage.num_micro_batches)
        # Of equal sizes, as what is received: the last may begin with rows of the one before it.
        windows = [(start, start + size) for start in (min(i, rows - size) for i in range(0, rows, size))]
        hidden = self._stage.hidden_of(lambda: part(*windows[0]))
        self._parts.begin(part, windows, hidden.shape)
        stage, schedule = self._schedule_for(len(windows), hidden)
        try:
            out = schedule.eval(number=torch.arange(len(windows)))
        except RuntimeError as error:
            # torch's own says no more than that a stage failed.
            raise error.__cause__ or error from None
        finally:
            # What went through is kept for a backward pass otherwise.
            stage.clear_runtime_states()
        result = torch.zeros(rows, width, dtype=torch.float64)
        if self._stage.is_last:
            for (start, stop), values in zip(windows, torch.split(out, size), strict=True):
                result[start:stop] = values
        return result

    def _schedule_for(self, count: int, hidden: Tensor) -> tuple[PipelineStage, ScheduleGPipe]:
        """One that sends tensors like `hidden`: torch's have fixed shapes, and agree on them when new."""
        key = count, hidden.shape, hidden.dtype
        if self._schedule is None or self._schedule[0] != key:
            place = self._stage.index, self._stage.num_stages, self.device
            like = torch.empty_like(hidden, device="meta")
            stage = PipelineStage(self._parts, *place, input_args=like, output_args=like)
            self._schedule = key, stage, ScheduleGPipe(stage, count)
        return self._schedule[1:]


class _Parts(nn.Module):
    """What torch's schedule runs: one part of the rows, from what was received to what is sent on."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage

    def begin(
        self, part: Callable[[int, int], Tensor], windows: list[tuple[int, int]], sent: torch.Size
    ) -> None:
        self._part, self._windows, self._sent = part, windows, sent

    def forward(self, received: Tensor | None = None, *, number: Tensor) -> Tensor:
        self._stage.received = received
        try:
            values = self._part(*self._windows[int(number)])
        except Left as left:
            if left.hidden.shape != self._sent:
                raise RuntimeError(
                    f"hidden states of shape {tuple(left.hidden.shape)} follow some of {tuple(self._sent)}: "
                    "give the model inputs of one length for all rows of a batch"
                ) from None
            return left.hidden.contiguous()
        finally:
            self._stage.received = None
        if not self._stage.is_last:
            raise RuntimeError("the loss function did not run the model's layers")
        return values.to("cpu", torch.float64)


def _require_same_logits(engine: PipelineEngine, logits: Tensor) -> None:
    """ValueError on every rank unless the pipeline gives the logits that the whole model gave."""

    def part(start: int, stop: int) -> Tensor:
        return trial(engine.module, engine.device).view(1, -1)

    with torch.no_grad(), evaluating(engine.module):
        got = engine.evaluate(part, 1, logits.numel())
    with engine.jointly():
        expected = logits.to("cpu", torch.float64).view(1, -1)
        near = torch.allclose(got, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
        # The same operations on the same numbers: what is allowed for is another device's arithmetic.
        if engine.rank == engine.num_ranks - 1 and not near:
            raise ValueError(
                "this model cannot be cut into a pipeline: its stages give other logits than the whole, so "
                "its layers get more from each other than hidden states"
            )
