"""What processes send each other, counted below torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# One collective: its operator, the elements it makes here, the bytes this rank puts in, and their dtype.
Call = tuple[str, int, int, torch.dtype | None]


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every collective inside, where FSDP2, DeepSpeed and zo_dist all end: `calls`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [pytree.tree_leaves(arg) for arg in args]
            lists = [[t for t in leaves if isinstance(t, torch.Tensor)] for leaves in tensors]
            filled = [leaves for leaves in lists if leaves]
            made, put = (filled[0], filled[-1]) if filled else ([], [])
            name = func._schema.name.split("::")[1]
            elements = sum(t.numel() for t in made)
            dtype = put[0].dtype if put else None
            self.calls.append((name, elements, sum(t.numel() * t.element_size() for t in put), dtype))
        return func(*args, **(kwargs or {}))


def split(calls: list[Call], dtype: torch.dtype, num_shards: int) -> tuple[list[Call], list[Call]]:
    """The gathers of weights from so many ranks (each puts in its share of what is made), and the rest."""
    weights = [
        c
        for c in calls
        if "allgather" in c[0] and c[3] == dtype and c[2] == c[1] // num_shards * dtype.itemsize
    ]
    return weights, [c for c in calls if c not in weights]
