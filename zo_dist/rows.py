"""Rows of several probes in one tensor: which entries are rows, cutting them apart, putting them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def rows_per_row(leaf: Any, rows: int, where: str) -> int:
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


def take(leaf: Any, per_row: int, ranges: list[tuple[int, int]]) -> Any:
    """The given row ranges of an input, one after another; the whole of what has no rows."""
    if not per_row:
        return leaf
    parts = [leaf[a * per_row : b * per_row] for a, b in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Merged:
    """The outputs of an owner's runs, put where the probes' rows belong as they come."""

    def __init__(self, bounds: list[int], batched: bool, where: str) -> None:
        self._bounds, self._batched, self._where = bounds, batched, where
        self._leaves: list[Any] = []

    def put(self, group: list[int], out: Any) -> None:
        """Take over the output for the rows of these probes, one after another."""
        flat, self._spec = pytree.tree_flatten(out)
        rows = [self._bounds[i + 1] - self._bounds[i] for i in group]
        for k, leaf in enumerate(flat):
            parts = self._parts(leaf, rows)
            if k == len(self._leaves):
                shape = (self._bounds[-1] * (parts[0].shape[0] // rows[0]), *leaf.shape[1:]) if parts else ()
                self._leaves.append(leaf.new_empty(shape) if parts else leaf)
            for i, part in zip(group, parts, strict=bool(parts)):
                per_row = part.shape[0] // (self._bounds[i + 1] - self._bounds[i])
                self._leaves[k][self._bounds[i] * per_row : self._bounds[i + 1] * per_row] = part

    def result(self) -> Any:
        """The owner's output for all rows; what is no tensor comes from the first run."""
        return pytree.tree_unflatten(self._leaves, self._spec)

    def _parts(self, leaf: Any, rows: list[int]) -> list[Tensor]:
        """One part of an output leaf for each probe of a group; none of what is no tensor."""
        if not isinstance(leaf, Tensor):
            return []
        if self._batched and leaf.ndim and leaf.shape[0] % sum(rows) == 0:
            per_row = leaf.shape[0] // sum(rows)
            return list(torch.split(leaf, [r * per_row for r in rows]))
        if not self._batched and leaf.ndim and leaf.shape[0] == 1:
            return [leaf.expand(r, *leaf.shape[1:]) for r in rows]
        raise RuntimeError(
            f"{self._where} returned a tensor of shape {tuple(leaf.shape)}, which is not one part per row; "
            "evaluate one probe at a time with step(closure), or use perturb: shard"
        )
