"""The shared prefix: layers before the first drawn one run once per row, not once per probe.

All probes of a row see the same input up to the first layer that a direction of the step perturbs.
So the layers before it (all, where only what comes after them is drawn) run on one copy of each row,
and the last of these puts the copies back in the stacked order. Whatever runs outside the layers
(embeddings, masks, head) sees the stacked rows as always; layers that run again after that point
(weights shared between depths) run on all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class PrefixUnsafeError(RuntimeError):
    """The model runs a drawn module before the layers, its layers do not take rows along dim 0, or they
    remember rows from one forward to the next (a KV cache). `owner`: the drawn module, if it is that alone.
    """

    def __init__(self, reason: str, owner: nn.Module | None = None) -> None:
        super().__init__(reason)
        self.owner = owner


@contextmanager
def wrapped_forwards(
    modules: Collection[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, each module's forward is `wrap(module, forward)`; taken off on leaving, whatever happens."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            before.append((module, module.__dict__.get("forward")))
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class SharedPrefix:
    """Wraps the layers before the first one that holds a drawn module.

    `layers`: the model's repeated blocks in order. `drawn`: the modules that own drawn parameters.
    Where a drawn module runs before the layers, PrefixUnsafeError is raised before any loss is
    known; the caller then evaluates without a prefix.
    """

    def __init__(self, layers: Sequence[nn.Module], drawn: Collection[nn.Module]) -> None:
        holds = [any(m in drawn for m in layer.modules()) for layer in layers]
        self._layers = layers[: holds.index(True)] if True in holds else layers
        self._pieces: Sequence[tuple[int, int]] = ()
        self._waiting = self._shared = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the layers' forwards (around the owners' wrappers); take them off on leaving."""
        last = self._layers[-1] if self._layers else None
        with wrapped_forwards(self._layers, lambda m, forward: self._wrapped(forward, m is last)):
            yield

    @contextmanager
    def rows(self, pieces: Sequence[tuple[int, int]]) -> Iterator[None]:
        """The next forward stacks these row ranges of a batch; ranges that repeat are shared."""
        self._pieces = pieces
        self._unique = list(dict.fromkeys(pieces))
        self._num_stacked = sum(b - a for a, b in pieces)
        self._num_unique = sum(b - a for a, b in self._unique)
        self._waiting = self._shared = bool(self._layers) and self._num_unique < self._num_stacked
        self._per_row = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            yield
        except (PrefixUnsafeError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if not self._shared:
                raise
            # ALiBi's biases may have rows times heads along dim 0, or as many heads as there are rows; later
            # layers may take up what shared ones left elsewhere. An error of another kind comes again.
            raise PrefixUnsafeError(f"rows that were shared did not fit: {error}") from error
        finally:
            self._waiting = self._shared = False
            self._held = {}

    def require_stacked(self, owner: nn.Module) -> None:
        """Called when a drawn module runs: by then the rows must be stacked again."""
        if self._waiting:
            reason = f"{type(owner).__name__} holds drawn weights and runs before the layers"
            raise PrefixUnsafeError(reason, owner)

    def _wrapped(self, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._waiting:
                # Its first forward left each row once in it, and in this one the rows are stacked.
                cached = any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))
                if self._shared and cached:
                    raise PrefixUnsafeError("a KV cache goes on from a forward that shared the first layers")
                return forward(*args, **kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if not self._per_row:
                hidden = next((t for t in leaves if isinstance(t, Tensor) and t.ndim > 1), None)
                if hidden is None or hidden.shape[0] % self._num_stacked:
                    raise PrefixUnsafeError("the first layer's input has no rows along dim 0")
                self._per_row = hidden.shape[0] // self._num_stacked
            args, kwargs = pytree.tree_unflatten([self._share(leaf) for leaf in leaves], spec)
            out = forward(*args, **kwargs)
            if not last:
                return out
            self._waiting = False
            return pytree.tree_map(self._restack, out)

        return run

    def _share(self, leaf: Any) -> Any:
        """One copy of each row of a stacked tensor; anything else as it is."""
        if not self._is_batch(leaf, self._num_stacked):
            return leaf
        # Masks and position embeddings come to every layer: cut each one once.
        held = self._held.get(id(leaf))
        if held is None or held[0] is not leaf:
            cut = _rearranged(leaf, self._pieces, self._unique, self._per_row)
            held = self._held[id(leaf)] = (leaf, cut)
        return held[1]

    def _restack(self, leaf: Any) -> Any:
        """All probes' copies of a tensor that holds each row once; anything else as it is."""
        if not self._is_batch(leaf, self._num_unique):
            return leaf
        return _rearranged(leaf, self._unique, self._pieces, self._per_row)

    def _is_batch(self, leaf: Any, rows: int) -> bool:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return False
        # Integers along one dimension are positions of a sequence.
        positions = leaf.ndim == 1 and not leaf.is_floating_point()
        return not positions and leaf.shape[0] == rows * self._per_row


def _rearranged(
    tensor: Tensor, held: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]], per_row: int
) -> Tensor:
    """The `wanted` row ranges of a tensor that holds the `held` ones, one after another."""
    starts: dict[tuple[int, int], int] = {}
    where = 0
    for piece in held:
        starts.setdefault(piece, where)
        where += piece[1] - piece[0]
    return torch.cat([tensor[starts[p] * per_row : (starts[p] + p[1] - p[0]) * per_row] for p in wanted])
