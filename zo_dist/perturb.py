"""How the loss at shifted weights is evaluated, without the stored weights being touched or lost.

`ModulePerturbation` (the default): a drawn parameter is shifted in a scratch copy while the module
that owns it runs, so the stored weights stay as they are and all probes travel in one forward.
`ShardPerturbation`: the local shards of one direction are shifted in place before a forward and put
back from a snapshot after it; for objectives that read weights outside the module that owns them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zo_dist.engines.pieces import added_up, like, local_of, span_in
from zo_dist.params import Owner, Param, Runs, Span
from zo_dist.parts import (
    Probe,
    Scratch,
    Shifts,
    corrected,
    is_own,
    linear,
    looked_up,
    looks_up_few,
    writes_in_place,
)
from zo_dist.prefix import SharedPrefix, wrapped_forwards
from zo_dist.rows import Merged, rows_per_row, take

Live = Sequence[tuple[Probe, int]]  # the probes that an input carries along dim 0, with their rows
# An owner's shifted parameters; None where it makes its own of them, a part at a time.
Copies = list[tuple[Owner, Tensor]] | None

# Larger owners are not copied for both sides at once.
_LARGE = 1 << 24


class ModulePerturbation:
    """Shifts weights inside the forward of the modules that own them.

    Cost: one pass over each drawn weight per probe, a scratch copy of the largest owner, no traffic.
    Engine hooks (a ZeRO-3 gather, an FSDP2 unshard) run around the wrapped forward, so what is
    shifted is the gathered weight. With `layers` (the model's repeated blocks in order), those before
    the first drawn one run once.
    """

    def __init__(
        self,
        params: Sequence[Param],
        shifts: Shifts,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        self._shifts, self._scratch = shifts, Scratch()
        self._owned: dict[nn.Module, list[tuple[Owner, Param]]] = {}
        for param in params:
            for owner in param.owners:
                self._owned.setdefault(owner.module, []).append((owner, param))
        self._prefix = SharedPrefix(layers, self._owned)
        self._live: Live = ()
        self._ran: set[nn.Module] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the owners' forwards; on leaving, also by an exception, put everything back."""
        with wrapped_forwards(self._owned, self._wrapped), self._prefix.installed():
            yield

    @contextmanager
    def probes(self, live: Live, pieces: Sequence[tuple[int, int]] = ()) -> Iterator[None]:
        """The forward inside carries the given probes along dim 0, in order, with these numbers of rows.

        `pieces`: the row range of the batch that each probe repeats, for the shared prefix. Raises
        RuntimeError on leaving if a drawn parameter's owner never ran.
        """
        self._live, self._ran = tuple(live), set()
        try:
            with self._prefix.rows(pieces):
                yield
        finally:
            # The head's scratch, made last, would be beside the next forward's layers.
            self._live, self._scratch = (), Scratch()
        drawn = frozenset().union(*(probe.drawn for probe, _ in live))
        for param in {p.name: p for owned in self._owned.values() for _, p in owned}.values():
            if param.name in drawn and not any(owner.module in self._ran for owner in param.owners):
                raise RuntimeError(
                    f"parameter {param.name} was drawn, but the module that owns it "
                    f"({type(param.owners[0].module).__name__}) never ran in this forward, so its noise "
                    "was never applied: the model reads this weight from outside its owner. Use "
                    "perturb: shard for this model, or set requires_grad=False on the parameter."
                )

    def _wrapped(self, owner: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._live:
                return forward(*args, **kwargs)
            self._prefix.require_stacked(owner)
            self._ran.add(owner)
            names = {param.name for _, param in self._owned[owner]}
            if not any(names & probe.drawn for probe, _ in self._live):
                return forward(*args, **kwargs)
            if len(self._live) > 1:
                return self._split(owner, names, forward, args, kwargs)
            probe = self._live[0][0]
            with self._shifted(owner, [probe], forward, args, kwargs) as (copies,):
                return self._run(owner, probe, copies, forward, args, kwargs)

        return run

    def _split(
        self,
        owner: nn.Module,
        names: set[str],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run each drawn probe's rows with its own copy, all others together, and put them in order."""
        live = self._live
        bounds = [0]
        for _, count in live:
            bounds.append(bounds[-1] + count)
        where = type(owner).__name__ + " of " + sorted(names)[0]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        takes_rows = [rows_per_row(leaf, bounds[-1], where) for leaf in leaves]
        others = [i for i, (probe, _) in enumerate(live) if not names & probe.drawn]
        groups = self._sides(owner, [i for i in range(len(live)) if i not in others])
        if is_own(nn.Linear, forward, args, kwargs) and takes_rows[0] and writes_in_place(owner, args[0]):
            rows = [slice(a * takes_rows[0], b * takes_rows[0]) for a, b in itertools.pairwise(bounds)]
            return self._split_linear(owner, groups, others, rows, forward, args[0])
        merged = Merged(bounds, any(takes_rows), where)
        bare = [m for m in owner.modules() if m is not owner and next(m.parameters(), None) is None]
        unhooked = contextlib.ExitStack()

        def run(group: list[int], copies: Copies) -> None:
            ranges = [(bounds[i], bounds[i + 1]) for i in group]
            taken = [take(leaf, n, ranges) for leaf, n in zip(leaves, takes_rows, strict=True)]
            piece_args, piece_kwargs = pytree.tree_unflatten(taken, spec)
            self._live = tuple(live[i] for i in group)
            merged.put(group, self._run(owner, live[group[0]][0], copies, forward, piece_args, piece_kwargs))
            # ZeRO-3 gathers ahead when a module runs, and so has to see as many on every rank: an activation
            # within the owner counts once, however many probes a rank has.
            if bare:
                unhooked.enter_context(_unhooked(bare.copy()))
                bare.clear()

        try:
            for sides in groups:
                with self._shifted(owner, [live[i][0] for i in sides], forward, args, kwargs) as all_copies:
                    for i, copies in zip(sides, all_copies, strict=True):
                        run([i], copies)
            if others:
                run(others, [])
        finally:
            self._live = live
            unhooked.close()
        return merged.result()

    def _split_linear(
        self,
        owner: nn.Module,
        groups: list[list[int]],
        others: list[int],
        rows: list[slice],
        forward: Callable[..., Any],
        x: Tensor,
    ) -> Tensor:
        """`_split` for torch's own linear layer: the products of drawn probes land where they belong."""
        assert isinstance(owner, nn.Linear)
        owned = {place.attribute: param.name for place, param in self._owned[owner]}
        weight = owned.get("weight", "")
        if self._shifts.are_thin(weight):
            drawn = [[(self._live[i][0], rows[i]) for i in sides] for sides in groups]
            return corrected(self._shifts, owned, x, forward(x), drawn)
        out = x.new_empty(*x.shape[:-1], owner.out_features)
        for sides in groups:
            self._linear(owner, [(self._live[i][0], x[rows[i]], out[rows[i]]) for i in sides])
        if others:
            together = forward(torch.cat([x[rows[i]] for i in others]))
            sizes = [rows[i].stop - rows[i].start for i in others]
            for i, part in zip(others, torch.split(together, sizes), strict=True):
                out[rows[i]] = part
        return out

    def _sides(self, owner: nn.Module, drawn: list[int]) -> list[list[int]]:
        """The drawn probes, two at a time where these are the two sides of a direction."""
        whole = not isinstance(owner, nn.Linear)
        if whole and sum(param.shape.numel() for _, param in self._owned[owner]) > _LARGE:
            return [[i] for i in drawn]
        # The probes of a direction follow each other.
        by_direction = itertools.groupby(drawn, key=lambda i: self._live[i][0].direction)
        return [list(sides) for _, sides in by_direction]

    def _run(
        self,
        owner: nn.Module,
        probe: Probe,
        copies: Copies,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The owner's output with its parameters pointed at `copies`; they are pointed back after."""
        if copies is None and isinstance(owner, nn.Embedding):
            ((place, param),) = self._owned[owner]
            return looked_up(self._shifts, self._stored(place, param), param.name, probe, args[0])
        if copies is None:
            return self._linear(owner, [(probe, args[0], None)])[0]
        stored = [(place, place.holder._parameters[place.attribute]) for place, _ in copies]
        try:
            for place, copy in copies:
                # A plain tensor: autocast caches casts of parameters, and would serve a stale one.
                place.holder._parameters[place.attribute] = copy  # type: ignore[assignment]
            return self._detached(forward(*args, **kwargs))
        finally:
            for place, weight in stored:
                place.holder._parameters[place.attribute] = weight

    @contextmanager
    def _shifted(
        self,
        owner: nn.Module,
        probes: Sequence[Probe],
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[list[Copies]]:
        """For each of one direction's probes, shifted scratch copies of the owner's drawn parameters."""
        if is_own(nn.Linear, forward, args, kwargs) or (
            is_own(nn.Embedding, forward, args, kwargs) and looks_up_few(owner, args[0])
        ):
            yield [None] * len(probes)
            return
        copies: list[list[tuple[Owner, Tensor]]] = [[] for _ in probes]
        with self._scratch.taken() as take_scratch:
            for place, param in self._owned[owner]:
                if param.name not in probes[0].drawn:
                    continue
                weight = self._stored(place, param)
                span = span_in(param.piece, param.name, local_of(weight))
                outs = [take_scratch(span.flat) for _ in probes]
                self._shifts.copies(outs, span.flat, param.name, probes, span.offset, span.runs)
                for mine, out in zip(copies, outs, strict=True):
                    mine.append((place, like(weight, out)))
            yield list(copies)

    def _linear(self, owner: nn.Module, sides: Sequence[tuple[Probe, Tensor, Tensor | None]]) -> list[Tensor]:
        """`parts.linear` with the owner's weights as they are here."""
        weights: dict[str, Tensor | None] = dict(owner._parameters)
        drawn = {}
        for place, param in self._owned[owner]:
            weights[place.attribute] = self._stored(place, param)
            if param.name in sides[0][0].drawn:
                drawn[place.attribute] = param.name
        weight, bias = weights["weight"], weights["bias"]
        assert weight is not None
        return linear(self._shifts, self._scratch, weight, bias, drawn, sides)

    def _stored(self, place: Owner, param: Param) -> Tensor:
        weight = place.holder._parameters[place.attribute]
        here, sharded = (param.piece or param).shape, hasattr(weight, "placements")
        if weight is None or (sharded and param.piece is None) or local_of(weight).shape != here:
            raise RuntimeError(
                f"parameter {param.name} is not whole while its owner runs; call the model "
                "through the object that shards it, not a submodule of it"
            )
        return weight.detach()

    def _detached(self, out: Any) -> Any:
        """`out`, with any view of a scratch copy (a module may return its weight) made its own."""

        def own(t: Tensor) -> Tensor:
            return t.clone() if self._scratch.holds(local_of(t)) else added_up(t)

        return pytree.tree_map_only(Tensor, own, out)


@contextmanager
def _unhooked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these modules run without their hooks."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in modules]
    try:
        for m in modules:
            m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for m, before, after in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after


class Copying(Protocol):
    """What shifts weights: `Shifts`, or a `Projected`."""

    def copies(
        self,
        outs: Sequence[Tensor],
        flat: Tensor,
        name: str,
        probes: Sequence[Probe],
        offset: int = 0,
        runs: Runs | None = None,
    ) -> None: ...


class ShardPerturbation:
    """Shifts the local shards of one direction in place, and restores them from a snapshot.

    Cost: a snapshot of the drawn shards, one pass over them per probe and one to restore. The bytes
    that come back are those that were there. Every rank must hold the same direction at a time.
    """

    def __init__(self, shifts: Copying, publish: Callable[[], None]) -> None:
        self._shifts, self._publish = shifts, publish

    @contextmanager
    def shifted(self, spans: Sequence[Span], probe: Probe) -> Iterator[None]:
        """Forwards inside see the shifted weights of one probe; `spans` hold its drawn parameters."""
        snapshot = [span.flat.clone() for span in spans] if probe.drawn else []
        try:
            for span, clean in zip(spans, snapshot, strict=bool(snapshot)):
                self._shifts.copies([span.flat], clean, span.name, [probe], span.offset, span.runs)
            self._show()
            yield
        finally:
            for span, clean in zip(spans, snapshot, strict=bool(snapshot)):
                span.flat.copy_(clean)
            self._show()

    def _show(self) -> None:
        self._publish()
        # Inside a user's autocast region torch would go on using its 16-bit copy of the old weights.
        torch.clear_autocast_cache()
