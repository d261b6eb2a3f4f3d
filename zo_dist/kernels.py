"""How a kernel runs over flat tensors: cut at the tiles it works in, eagerly or compiled.

A kernel computes whole tiles: a number of elements that belong to a number of Philox blocks. Which
element has which random bits follows from its number alone, so spans may begin and end anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements per pass of the eager form: the temporaries of one chunk stay in a core's cache. Compiled
# for a GPU, a kernel may count elements in 32 bits.
EAGER_CHUNK, FUSED_CHUNK = 1 << 20, 1 << 30

# Elements of a matrix whose noise takes part in one product. A GPU needs more work in one.
PART, GPU_PART = 1 << 20, 1 << 24

# Elements whose noise is held at a time: they stay in a core's cache.
HELD, GPU_HELD = 1 << 18, 1 << 22

# Up to so many elements, one call on copies padded to whole tiles is cheaper than one for the tiles
# and one for each end.
_SMALL = 1 << 14

_WIDER = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


def part_of(device: torch.device) -> int:
    """How many elements of a matrix whose noise is made go into one product."""
    return PART if device.type == "cpu" else GPU_PART


def held_of(device: torch.device) -> int:
    """How many elements' noise is made at a time where it takes part in several operations."""
    return HELD if device.type == "cpu" else GPU_HELD


class Kernel(NamedTuple):
    """`function(*tensors, *arguments)` writes its first `outputs`; tensors come as `[tiles, *shape]`.

    `shape`: (rows, columns) of a tile, laid out so that compiled inner loops run along the columns.
    `blocks`: Philox calls behind a tile. `pairs`: the function takes two neighbouring elements as one
    integer of twice their width (the first in the lower half), and `shape` counts these.
    """

    function: Callable[..., None]
    shape: tuple[int, int]
    blocks: int
    pairs: bool = False
    outputs: int = 1

    @property
    def unit(self) -> int:
        """Elements per tile."""
        return math.prod(self.shape) * (2 if self.pairs else 1)

    def tiles(self, flat: Tensor) -> Tensor:
        """`[tiles, *shape]` on the memory of `flat`, which holds whole tiles."""
        if self.pairs:
            flat = flat.view(_WIDER[flat.dtype])
        # .data: a view of a parameter would have the compiler guard on the parameter's shape.
        return flat.view(-1, *self.shape).data


def run(
    kernel: Kernel,
    tensors: tuple[Tensor, ...],
    offset: int,
    arguments: Callable[[int], tuple[object, ...]],
    *,
    fused: bool,
) -> None:
    """Run `kernel` over flat tensors of equal length, element 0 of which is number `offset`.

    `arguments(block)`: what the function takes besides the tensors, for tiles from that block on.
    """
    numel, unit = tensors[0].numel(), kernel.unit
    chunk = FUSED_CHUNK if fused else EAGER_CHUNK
    call = compiled(kernel.function, len(tensors)) if fused else kernel.function
    # The compiler takes a size of 1 for a constant.
    least = 2 if fused else 1
    start = 0
    while start < numel:
        lead = (offset + start) % unit
        block = (offset + start) // unit * kernel.blocks
        whole = min(numel - start, chunk) // unit * unit
        if lead == 0 and whole >= least * unit and (numel > _SMALL or numel % unit == 0):
            pieces = tensors if whole == numel else [t[start : start + whole] for t in tensors]
            if not kernel.pairs or all(p.storage_offset() % 2 == 0 for p in pieces):
                call(*map(kernel.tiles, pieces), *arguments(block))
                start += whole
                continue
        # Whole tiles are computed on padded copies, and what is asked is kept.
        size = min(numel - start, _SMALL - lead)
        if lead and numel > _SMALL:
            size = min(size, unit - lead)
        tiles = max(-(-(lead + size) // unit), least)
        padded = [t.new_zeros(tiles * unit) for t in tensors]
        for pad, t in zip(padded, tensors, strict=True):
            pad[lead : lead + size] = t[start : start + size]
        call(*(kernel.tiles(pad) for pad in padded), *arguments(block))
        for t, pad in zip(tensors[: kernel.outputs], padded, strict=False):
            t[start : start + size] = pad[lead : lead + size]
        start += size


@cache
def compiled(function: Callable[..., None], num_tensors: int) -> Callable[..., None]:
    """`function` with its loops fused, compiled once for each dtype, device and option.

    The length along dim 0 of the first `num_tensors` arguments is all that varies from call to call.
    """
    assert isinstance(function, FunctionType)
    forms: dict[object, Callable[..., None]] = {}

    def call(*args: Any) -> None:
        # A form on a CPU divides its loop among the threads there were.
        key = (torch.get_num_threads(), *map(_fixed, args[:num_tensors]), *map(_constant, args[num_tensors:]))
        form = forms.get(key)
        if form is None:
            form = forms[key] = _form(function)
            for tensor in args[:num_tensors]:
                torch._dynamo.mark_dynamic(tensor, 0)
            for arg in args[num_tensors:]:
                if isinstance(arg, Tensor):
                    torch._dynamo.mark_static(arg)
        form(*args)

    return call


def _form(function: FunctionType) -> Callable[..., None]:
    """A compiled copy that never asks whether it fits: `compiled` has a key for all that it depends on.

    Asking takes as long as calling: a third of the time that a call takes besides its loop. Forms are
    kept with the code they were made of, so each needs code of its own.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(
        copy, fullgraph=True, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    )


def _fixed(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device


def _constant(arg: Any) -> Any:
    """What a compiled form takes for granted of an argument."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.dtype, arg.device
    if isinstance(arg, tuple):
        return tuple(map(_constant, arg))
    if hasattr(arg, "__dict__") and not callable(arg):
        return type(arg), *vars(arg).items()
    return arg
