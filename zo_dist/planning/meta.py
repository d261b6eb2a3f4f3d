"""One forward of a step on the meta device: which modules run, what memory lives, what is computed.

The real code runs (the model's forward, `perturb.py`, `probes.py`, the loss) on tensors that have shapes and
no values, so whatever a model does with tied weights, grouped heads or experts is counted as it is. Three
things are replaced: noise, which would be drawn and is not; attention, which is taken as one kernel that
stores no scores; and a branch on data (is any row padded?), which is taken as False.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zo_dist.batches import rows_of_rank
from zo_dist.noise import Noise
from zo_dist.optimizer import ZeroOrder
from zo_dist.probes import StepProbes, rows_of_groups
from zo_dist.samplers import Draw
from zo_dist.state import tensors_of
from zo_dist.tasks import choice_loss, option_nll_loss
from zo_dist.trials import Trials

aten = torch.ops.aten

# Of operators whose result, or its shape, may be told by values.
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# They read as much as they give, not the whole table.
_LOOKUPS = (aten.embedding, aten.index, aten.index_select, aten.gather)


class Live(NamedTuple):
    """Bytes alive at a moment, beside weights and what is kept between steps."""

    activations: int
    logits: int
    scratch: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(slots=True)
class Border:
    """A module begins (`enters`) or ends; `at`: what lives then; `peak`: the most until the next border."""

    module: nn.Module
    enters: bool
    at: Live
    peak: Live


@dataclass(slots=True)
class Traced:
    """What one forward did: its borders in order, `(flops, bytes)` of its kernels, the bytes of its noise."""

    borders: list[Border] = field(default_factory=list)
    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)
    noise_bytes: int = 0

    @property
    def flops(self) -> int:
        return sum(flops * count for (flops, _), count in self.kernels.items())


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage made inside until it is freed, and adds up what kernels compute and move.

    `outside`: what exists before (weights, buffers, the batch), which does not count. `vocabulary`: tensors
    of so many columns are logits.
    """

    def __init__(self, outside: Sequence[Tensor], vocabulary: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        # By storage: its bytes and which part of `Live` they are; None for what is outside.
        self._storages: dict[int, tuple[int, int] | None] = {}
        for tensor in outside:
            self._storages[tensor.untyped_storage()._cdata] = None
        self._live = [0, 0, 0]
        self._uncounted = 0
        self.traced = Traced()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        out = _product(func, args)
        try:
            out = func(*args, **kwargs) if out is None else out
        except RuntimeError as error:
            if not _DATA_DEPENDENT.intersection(func.tags):
                raise
            raise ValueError(
                f"this model's forward depends on the values of its data ({func.name()}), so that its shapes "
                "cannot be told from its config alone (for experts: experts_implementation grouped_mm can)"
            ) from error
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._follow(tensor)
        if not self._uncounted:
            self._cost(func, args, kwargs, out, made)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        kind = 1 if tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary else 0
        self._storages[key] = storage.nbytes(), kind
        weakref.finalize(storage, self._freed, key)
        self._add(kind, storage.nbytes())

    def _freed(self, key: int) -> None:
        held = self._storages.pop(key)
        if held is not None:
            self._live[held[1]] -= held[0]

    def _add(self, kind: int, size: int) -> None:
        self._live[kind] += size
        borders = self.traced.borders
        if borders and sum(self._live) > borders[-1].peak.total:
            borders[-1].peak = Live(*self._live)

    def mark_scratch(self, tensor: Tensor) -> None:
        """What this tensor lies in is scratch."""
        key = tensor.untyped_storage()._cdata
        held = self._storages.get(key)
        if held is not None and held[1] != 2:
            self._live[held[1]] -= held[0]
            self._storages[key] = held[0], 2
            self._add(2, held[0])

    def _cost(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        taken = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in taken}
        if not func._schema.is_mutable and all(t.untyped_storage()._cdata in held for t in made):
            return  # a view
        packet = func._overloadpacket
        moved = [*made, *made] if packet in _LOOKUPS else [*taken, *made]
        size = sum(map(_nbytes, moved))
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet is aten._grouped_mm:
            flops = 2 * out.numel() * args[0].shape[-1]
        else:
            flops = 0
        self.traced.kernels[flops, size] += 1

    def kernel(self, flops: int, size: int) -> None:
        """One more kernel, which runs where no operator is seen."""
        self.traced.kernels[flops, size] += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, what operators compute and move is not added up; memory is."""
        self._uncounted += 1
        try:
            yield
        finally:
            self._uncounted -= 1

    def border(self, module: nn.Module, enters: bool) -> None:
        now = Live(*self._live)
        self.traced.borders.append(Border(module, enters, now, now))


def _product(func: Any, args: Any) -> Tensor | None:
    """The output of a product of matrices: torch's way to its shape is slow, and refuses float32 experts."""
    if func in (aten.mm.default, aten.addmm.default):
        left, right = args[-2:]
    elif func is aten._grouped_mm.default and args[0].ndim == 2 and args[1].ndim == 3:
        left, right = args[:2]
    else:
        return None
    out: Tensor = left.new_empty(len(left), right.shape[-1])
    return out


class FusedAttention(TorchFunctionMode):
    """torch's attention as one kernel: the output and, from a boolean mask, one of the scores' dtype."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        with self._tracer.uncounted():
            if mask is not None and mask.dtype == torch.bool:
                mask = mask.to(query.dtype)
            *batch, heads, length, _ = query.shape
            # The kernels of CPU and GPU lay heads beside each other.
            out = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        flops = 2 * out.numel() * key.shape[-2] + 2 * query.numel() * key.shape[-2]
        self._tracer.kernel(flops, sum(map(_nbytes, (query, key, value, out))))
        return out


class UnfilledNoise(Noise):
    """Noise that leaves its outputs as they are and tells the tracer what would be read and written.

    `tracer` is set by `without_values`. A noise of another structure gets this one as its base.
    """

    tracer: Tracer

    def shift(self, outs: Sequence[Tensor], weight: Tensor, *where: Any) -> None:
        self.tracer.traced.noise_bytes += _nbytes(weight) + sum(map(_nbytes, outs))
        for out in outs:
            self.tracer.mark_scratch(out)

    def shift_rows(self, table: Tensor, rows: Tensor, *where: Any) -> Tensor:
        out = table.new_empty(len(rows), table.shape[1])
        self.tracer.traced.noise_bytes += 2 * _nbytes(out)
        return out

    def accumulate(self, out: Tensor, *where: Any) -> None:
        self.tracer.traced.noise_bytes += 2 * _nbytes(out)

    def combine(self, out: Tensor, inputs: Sequence[Tensor], *where: Any) -> None:
        self.tracer.traced.noise_bytes += sum(map(_nbytes, [out, *inputs]))

    def round(self, flat: Tensor, exact: Tensor, *where: Any) -> None:
        self.tracer.traced.noise_bytes += _nbytes(flat) + _nbytes(exact)


def without_values(noise: Noise, tracer: Tracer) -> None:
    """Make `noise` an `UnfilledNoise`, whatever its structure."""
    if not isinstance(noise, UnfilledNoise):
        kind = type(noise)
        bases = (UnfilledNoise,) if kind is Noise else (kind, UnfilledNoise)
        noise.__class__ = type("UnfilledNoise", bases, {})
    noise.tracer = tracer  # type: ignore[attr-defined]
    for inner in vars(noise).values():
        if isinstance(inner, Noise):
            without_values(inner, tracer)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one forward on one rank: how many, their tokens, and how many of these are the answer's.

    `first` and `total`: where they are among all rows of the step, which decides their directions.
    """

    count: int
    length: int
    answer: int
    first: int
    total: int


def busiest_rows(total: int, ranks: int, micro: int | None, groups: int) -> tuple[int, int, int]:
    """`(first, count, forwards)` of the rank with most rows and, in its first forward, most groups.

    Each rank has those of `rows_of_rank`, in forwards of at most `micro`.
    """
    shares = [rows_of_rank(rank, ranks, total) for rank in range(ranks)]
    most = max(b - a for a, b in shares)
    count = min(micro or most, most)
    starts = [a for a, b in shares if b - a == most]
    first = max(starts, key=lambda a: len(rows_of_groups(a, count, total, groups)))
    return first, count, -(-most // count)


def trace_step(optimizer: ZeroOrder, draws: list[Draw], rows: Rows, trial: bool = False) -> Traced:
    """One stacked forward of a step, or its trial, in module mode, with these draws, on the meta device."""
    how = (Trials(), 1.0) if trial else None

    def evaluate(probes: StepProbes, batch: Mapping[str, Tensor], row_loss: Any) -> None:
        probes.by_rows([batch], row_loss, rows.first, rows.total, 1)

    return _traced(
        optimizer, rows, lambda b, f: optimizer._sums(lambda p: _done(evaluate, p, b, f), draws, 0, how)
    )


def trace_forward(optimizer: ZeroOrder, rows: Rows) -> Traced:
    """One plain forward of the rows, as a probe in shard mode is, on the meta device."""
    return _traced(optimizer, rows, lambda batch, loss: loss(optimizer.engine.module, batch))


def _done(evaluate: Any, probes: StepProbes, batch: Any, row_loss: Any) -> Tensor:
    evaluate(probes, batch, row_loss)
    return torch.zeros(())


def _traced(optimizer: ZeroOrder, rows: Rows, run: Any) -> Traced:
    module = optimizer.engine.module
    batch, loss = batch_of(rows, torch.device("meta"))
    kept = tensors_of(optimizer.beside)
    outside = [*module.parameters(), *module.buffers(), *batch.values(), *kept.values()]
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    tracer = Tracer(outside, vocabulary)
    without_values(optimizer.noise, tracer)

    def row_loss(model: nn.Module, some: Mapping[str, Tensor]) -> Tensor:
        # A second try, without a shared prefix, begins here again.
        tracer.traced = Traced()
        out = loss(model, some)
        losses = out[0] if isinstance(out, tuple) else out
        return torch.ones(len(losses))

    with ExitStack() as stack:
        for each in module.modules():
            stack.callback(each.register_forward_pre_hook(lambda m, _: tracer.border(m, True)).remove)
            stack.callback(each.register_forward_hook(lambda m, *_: tracer.border(m, False)).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(FusedAttention(tracer))
        stack.enter_context(tracer)
        run(batch, row_loss)
    return tracer.traced


def batch_of(rows: Rows, device: torch.device) -> tuple[dict[str, Tensor], Any]:
    """Rows of one sequence each, and the loss of a task whose rows they could be."""

    def integers(*shape: int) -> Tensor:
        return torch.zeros(rows.count, *shape, dtype=torch.int64, device=device)

    ids = {"input_ids": integers(rows.length), "attention_mask": integers(rows.length)}
    if rows.answer == 1:
        return {**ids, "option_ids": integers(2), "label": integers()}, choice_loss
    # As of one option for each row.
    one = {key: t.unsqueeze(1) for key, t in ids.items()}
    mask = integers(1, rows.answer).bool()
    return {
        **one,
        "option_mask": mask,
        "option_valid": integers(1).bool(),
        "label": integers(),
    }, option_nll_loss


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
