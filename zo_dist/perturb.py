"""How the loss at shifted weights is evaluated, without the stored weights being touched or lost.

`ModulePerturbation` (the default): a drawn parameter is shifted in a scratch copy while the module
that owns it runs, so the stored weights stay as they are and all probes travel in one forward.
`ShardPerturbation`: the local shards of one direction are shifted in place before a forward and put
back from a snapshot after it; for objectives that read weights outside the module that owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zo_dist.noise import Noise
from zo_dist.params import Owner, Param, Span
from zo_dist.prefix import SharedPrefix, wrapped_forwards


@dataclass(frozen=True, slots=True)
class Probe:
    """One evaluation of the loss: weights shifted by `sign * eps * z` of one direction.

    `drawn`: names of the parameters that the direction perturbs; empty for the unshifted probe.
    """

    direction: int
    sign: float
    drawn: frozenset[str]


Live = Sequence[tuple[Probe, int]]  # the probes that an input carries along dim 0, with their rows


class ModulePerturbation:
    """Shifts weights inside the forward of the modules that own them.

    Cost: one pass over each drawn weight per probe, a scratch copy of the largest owner, no traffic.
    Engine hooks (a ZeRO-3 gather, an FSDP2 unshard) run around the wrapped forward, so what is
    shifted is the gathered weight. `eps` is the perturbation size, `step` keys the noise. With
    `layers` (the model's repeated blocks in order), those before the first drawn one run once.
    """

    def __init__(
        self,
        params: Sequence[Param],
        noise: Noise,
        step: int,
        eps: float,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        self._noise, self._step, self._eps = noise, step, eps
        self._owned: dict[nn.Module, list[tuple[Owner, Param]]] = {}
        for param in params:
            for owner in param.owners:
                self._owned.setdefault(owner.module, []).append((owner, param))
        self._prefix = SharedPrefix(layers, self._owned)
        self._live: Live = ()
        self._ran: set[nn.Module] = set()
        self._scratch: list[Tensor] = []
        self._depth = 0

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
            self._live = ()
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
            if len(self._live) == 1:
                with self._shifted(owner, self._live[0][0]):
                    return self._detached(forward(*args, **kwargs))
            return self._split(owner, names, forward, args, kwargs)

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
        for _, rows in live:
            bounds.append(bounds[-1] + rows)
        where = type(owner).__name__ + " of " + sorted(names)[0]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        takes_rows = [_rows_per_row(leaf, bounds[-1], where) for leaf in leaves]
        others = [i for i, (probe, _) in enumerate(live) if not names & probe.drawn]
        groups = [[i] for i in range(len(live)) if i not in others] + ([others] if others else [])
        outputs: list[list[Any]] = [[] for _ in live]
        try:
            for group in groups:
                inputs = [
                    _take(leaf, per_row, [(bounds[i], bounds[i + 1]) for i in group])
                    for leaf, per_row in zip(leaves, takes_rows, strict=True)
                ]
                piece_args, piece_kwargs = pytree.tree_unflatten(inputs, spec)
                self._live = tuple(live[i] for i in group)
                with self._shifted(owner, live[group[0]][0]):
                    out = self._detached(forward(*piece_args, **piece_kwargs))
                flat, out_spec = pytree.tree_flatten(out)
                group_rows = [live[i][1] for i in group]
                batched = any(takes_rows)
                parts = [_give(leaf, group_rows, batched, where) for leaf in flat]
                for j, i in enumerate(group):
                    outputs[i] = [part[j] for part in parts]
        finally:
            self._live = live
        merged = [_merge([outputs[i][k] for i in range(len(live))]) for k in range(len(outputs[0]))]
        return pytree.tree_unflatten(merged, out_spec)

    @contextmanager
    def _shifted(self, owner: nn.Module, probe: Probe) -> Iterator[None]:
        """Point the owner's drawn parameters at shifted scratch copies; point them back on leaving."""
        stored: list[tuple[Owner, Any]] = []
        depth = self._depth
        try:
            for place, param in self._owned[owner]:
                if param.name not in probe.drawn:
                    continue
                weight = place.holder._parameters[place.attribute]
                if weight is None or weight.shape != param.shape or hasattr(weight, "placements"):
                    raise RuntimeError(
                        f"parameter {param.name} is not whole while its owner runs; call the model "
                        "through the object that shards it, not a submodule of it"
                    )
                whole = weight.detach().reshape(-1)
                copy = self._take_scratch(whole)
                self._noise.shift(
                    copy, whole, param.name, self._step, probe.direction, 0, probe.sign * self._eps
                )
                stored.append((place, weight))
                # A plain tensor: autocast caches casts of parameters, and would serve a stale one.
                place.holder._parameters[place.attribute] = copy.view(param.shape)  # type: ignore[assignment]
            yield
        finally:
            for place, weight in stored:
                place.holder._parameters[place.attribute] = weight
            self._depth = depth

    def _take_scratch(self, like: Tensor) -> Tensor:
        """A flat buffer like `like`; buffers stack up while owners nest and are reused after."""
        size = like.numel() * like.element_size()
        if self._depth == len(self._scratch):
            self._scratch.append(torch.empty(0, dtype=torch.uint8, device=like.device))
        buffer = self._scratch[self._depth]
        if buffer.numel() < size or buffer.device != like.device:
            buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._scratch[self._depth] = buffer
        self._depth += 1
        return buffer[:size].view(like.dtype)

    def _detached(self, out: Any) -> Any:
        """`out`, with any view of a scratch copy (a module may return its weight) made its own."""
        held = {buffer.untyped_storage().data_ptr() for buffer in self._scratch}
        return pytree.tree_map_only(
            Tensor, lambda t: t.clone() if t.untyped_storage().data_ptr() in held else t, out
        )


def _rows_per_row(leaf: Any, rows: int, where: str) -> int:
    """How many entries along dim 0 stand for one row of the batch; 0 where dim 0 is no batch.

    Flattened tokens have several. Raises RuntimeError for a first dimension that is neither 1 nor a
    multiple of the rows (tokens routed to one expert, say): splitting it would mix up the probes.
    """
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] == 1:
        return 0
    if leaf.shape[0] % rows or leaf.shape[0] == 0:
        if leaf.ndim == 1 and not leaf.is_floating_point():
            return 0  # positions of a sequence
        raise RuntimeError(
            f"{where} got an input of shape {tuple(leaf.shape)}, which does not divide into {rows} "
            "stacked rows; evaluate one probe at a time with step(closure), or use perturb: shard"
        )
    if leaf.ndim == 1 and not leaf.is_floating_point() and leaf.shape[0] != rows:
        raise RuntimeError(
            f"{where} got integers of shape {tuple(leaf.shape)} with {rows} stacked rows: these may be "
            "flattened tokens or positions of a sequence, and nothing tells which; evaluate one "
            "probe at a time with step(closure), or use perturb: shard"
        )
    return leaf.shape[0] // rows


def _take(leaf: Any, per_row: int, ranges: list[tuple[int, int]]) -> Any:
    if not per_row:
        return leaf
    parts = [leaf[a * per_row : b * per_row] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _give(leaf: Any, rows: list[int], batched: bool, where: str) -> list[Any]:
    """One part of an output leaf for each probe of a group."""
    if not isinstance(leaf, Tensor):
        return [leaf] * len(rows)
    if batched and leaf.ndim and leaf.shape[0] % sum(rows) == 0:
        per_row = leaf.shape[0] // sum(rows)
        return list(torch.split(leaf, [r * per_row for r in rows]))
    if not batched and leaf.ndim and leaf.shape[0] == 1:
        return [leaf.expand(r, *leaf.shape[1:]) for r in rows]
    raise RuntimeError(
        f"{where} returned a tensor of shape {tuple(leaf.shape)}, which is not one part per row; "
        "evaluate one probe at a time with step(closure), or use perturb: shard"
    )


def _merge(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


class ShardPerturbation:
    """Shifts the local shards of one direction in place, and restores them from a snapshot.

    Cost: a snapshot of the drawn shards, one pass over them per probe and one to restore. The bytes
    that come back are those that were there. Every rank must hold the same direction at a time.
    """

    def __init__(self, noise: Noise, step: int, eps: float, publish: Callable[[], None]) -> None:
        self._noise, self._step, self._eps, self._publish = noise, step, eps, publish

    @contextmanager
    def shifted(self, spans: Sequence[Span], probe: Probe) -> Iterator[None]:
        """Forwards inside see the shifted weights of one probe; `spans` hold its drawn parameters."""
        snapshot = [span.flat.clone() for span in spans] if probe.drawn else []
        try:
            for span, clean in zip(spans, snapshot, strict=bool(snapshot)):
                self._noise.shift(
                    span.flat,
                    clean,
                    span.name,
                    self._step,
                    probe.direction,
                    span.offset,
                    probe.sign * self._eps,
                )
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
