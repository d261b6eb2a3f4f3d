"""What noise with a structure shares, whichever that is: see flipout.py, lowrank.py and orthogonal.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from zo_dist.laws import Law
from zo_dist.noise import Noise


class PieceNoise(Noise):
    """`Noise` whose z is made some elements at a time, by `_sums`; in which names, `_in_pieces` says."""

    def _in_pieces(self, name: str) -> bool:
        return True

    def _sums(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        numel: int,
        device: torch.device,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the sum of `scale * z` of elements `offset ...`, and where in them each is.

        What is given may be overwritten by the next.
        """
        raise TypeError(f"{type(self).__name__} does not say what z is; override _sums")

    def shift(
        self,
        outs: Sequence[Tensor],
        weight: Tensor,
        name: str,
        step: int,
        direction: int,
        offset: int,
        scales: Sequence[float],
    ) -> None:
        if not self._in_pieces(name):
            super().shift(outs, weight, name, step, direction, offset, scales)
            return
        for piece, z in self._sums(name, step, [(direction, 1.0)], offset, weight.numel(), weight.device):
            exact = weight[piece].to(torch.float32)
            for out, scale in zip(outs, scales, strict=True):
                out[piece] = exact + z * scale

    def accumulate(
        self, out: Tensor, name: str, step: int, terms: Sequence[tuple[int, float]], offset: int
    ) -> None:
        if not self._in_pieces(name):
            super().accumulate(out, name, step, terms, offset)
            return
        if not terms:
            return
        for piece, total in self._sums(name, step, terms, offset, out.numel(), out.device):
            out[piece] += total


class MatrixNoise(PieceNoise):
    """`Noise` that has a structure in every parameter of two dimensions or more (the first against the rest).

    All others, vectors and names that are no parameter's, have the noise of `Noise`.
    """

    def __init__(self, law: Law, seed: int, compile: bool, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(law, seed, compile)
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and shape.numel()}
        self._rows = {name: shape[0] for name, shape in matrices.items()}
        self._columns = {name: math.prod(shape[1:]) for name, shape in matrices.items()}

    def has_sides(self, name: str) -> bool:
        return name in self._columns

    def _in_pieces(self, name: str) -> bool:
        return self.has_sides(name)
