"""Layers cut over ranks by tensor parallelism: `parallelize_module`, or the plan of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zo_dist.engines.base import Engine
from zo_dist.engines.pieces import local_of, piece_of, place_of, ranks_along, span_in
from zo_dist.params import Param, Piece, Span, canonical_name, require_contiguous


class CutEngine(Engine):
    """Weights that stay cut, with copies of these among groups of ranks where there are several.

    A forward sends activations and no weight; a step sends scalars. Subclasses say which pieces ranks hold.
    """

    # By canonical name; what is whole has none.
    _pieces: dict[str, Piece]

    def _take(
        self, named: Mapping[str, nn.Parameter], ranks: Sequence[int], places: Mapping[str, int]
    ) -> None:
        """Take the same rows as `ranks`, which cut layers with this one; `places`: see `compare_pieces`."""
        with self.jointly():
            for name, held in named.items():
                require_contiguous(name, local_of(held))
        self._take_rows_with(ranks)
        self.compare_pieces({name: local_of(param.detach()) for name, param in named.items()}, places)

    def piece_of(self, name: str, param: nn.Parameter) -> Piece | None:
        return self._pieces.get(name)

    def _span(self, param: Param) -> Span:
        return span_in(self._pieces.get(param.name), param.name, local_of(param.param.detach()))


class TensorParallelEngine(CutEngine):
    """Layers that torch cut.

    Raises ValueError for a mesh of several axes, and, on every rank, for placements that `pieces.piece_of`
    does not know and for copies that do not start with equal weights.
    """

    name = "tensor_parallel"

    def __init__(self, module: nn.Module) -> None:
        named = {canonical_name(name): param for name, param in module.named_parameters()}
        cut = {name: param for name, param in named.items() if isinstance(param, DTensor)}
        first = next(iter(cut.values()))
        for name, param in cut.items():
            if param.device_mesh != first.device_mesh or param.device_mesh.ndim > 1:
                raise ValueError(
                    f"parameter {name} lies on the mesh {param.device_mesh}; cut all layers over one mesh of "
                    'one axis (mesh["tp"] of a larger one)'
                )
        super().__init__(module, local_of(first).device)
        with self.jointly():
            self._pieces = {name: piece_of(name, param) for name, param in cut.items()}
        places = {name: place_of(param) for name, param in named.items()}
        self._take(named, ranks_along(first, 0), places)

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        weight = param.param.detach()
        yield weight.full_tensor() if isinstance(weight, DTensor) else weight
