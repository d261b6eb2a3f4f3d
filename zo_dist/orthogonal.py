"""Noise of orthogonal directions: `z = base * walsh`, one base of signs per step, for all trained weights.

The Hadamard-Rademacher directions of structured evolution (arXiv 1804.02395), here by global index. Walsh's
functions are the rows of Sylvester's Hadamard matrix: direction d has -1 at number i of the trained weights
where the binary digits that d and i share are odd in number. See docs/methods.md for what it is good for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_dist.flipout import summable
from zo_dist.kernels import held_of
from zo_dist.laws import Law
from zo_dist.matrices import PieceNoise
from zo_dist.noise import Noise, to_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Orthogonal:
    """The directions of a step are orthogonal: rows of a Hadamard matrix, with a random sign per column."""


class OrthogonalNoise(PieceNoise):
    """`Noise` of signs in which the directions of a step are orthogonal, as far as their number allows.

    Each z by itself has the law that it has without. With n trained weights, and k directions that draw them
    all and are tested by the same rows (`directions_per_row`), an element's estimate has beside its own slope
    those of `n / k - 1` others, with random signs, where independent signs leave `(n - 1) / k`: none with k a
    power of two from n on. (A k that is no power of two is between the two.) `shapes`: of all trained
    parameters, whose elements are numbered one after another. Cost: a write draws the base once, for all
    directions, and adds these up by a fast transform in float64; a shift takes some five passes over what it
    shifts. ValueError for another law than signs.
    """

    def __init__(self, law: Law, seed: int, compile: bool, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(law, seed, compile)
        if law != "rademacher":
            raise ValueError(
                f"structure is Orthogonal() and noise is {law!r}: its directions are signs; use rademacher"
            )
        self._base = Noise(law, seed, compile)
        sizes = itertools.accumulate((shape.numel() for shape in shapes.values()), initial=0)
        self._starts = dict(zip(shapes, sizes, strict=False))

    @property
    def kind(self) -> str:
        return f"{super().kind} in {Orthogonal()}"

    def in_native(self, tensor: Tensor) -> bool:
        return False

    def warm_up(self, *arguments: Any) -> None:
        super().warm_up(*arguments)
        self._base.compile = self.compile

    def shift_rows(
        self, table: Tensor, rows: Tensor, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        walsh, width = _walsh(direction, table.device), table.shape[1]
        nothing = torch.zeros(1, device=table.device).expand(table.shape)
        z = self._base.shift_rows(nothing, rows, name, step, 0, 1.0)
        numbers = rows.unsqueeze(1) * width + torch.arange(width, device=table.device)
        z *= walsh[(self._starts.get(name, 0) + numbers) % len(walsh)]
        return (table[rows].to(torch.float32) + z * scale).to(table.dtype)

    def combine(
        self,
        out: Tensor,
        inputs: Sequence[Tensor],
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        function: Callable[..., Tensor],
        options: tuple[object, ...],
    ) -> None:
        self.accumulate(out.zero_(), name, step, terms, offset)
        out.copy_(function(out, *options, *inputs))

    def round(self, out: Tensor, exact: Tensor, name: str, step: int, offset: int) -> None:
        self._base.round(out, exact, name, step, offset)

    def _sums(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        numel: int,
        device: torch.device,
    ) -> Iterator[tuple[slice, Tensor]]:
        total = _sum_of_walsh(terms, device)
        most = max(held_of(device), len(total))
        for start in range(0, numel, most):
            piece = slice(start, min(start + most, numel))
            z = torch.zeros(piece.stop - start, device=device)
            self._base.accumulate(z, name, step, [(0, 1.0)], offset + start)
            numbers = torch.arange(len(z), device=device) + (self._starts.get(name, 0) + offset + start)
            yield piece, z.mul_(total[numbers % len(total)])


def _walsh(direction: int, device: torch.device) -> Tensor:
    """float32: the signs of a direction over one period."""
    signs = torch.ones(1, device=device)
    for bit in range(direction.bit_length()):
        signs = torch.cat([signs, -signs if direction >> bit & 1 else signs])
    return signs


def _sum_of_walsh(terms: Sequence[tuple[int, float]], device: torch.device) -> Tensor:
    """float32: the sum of `scale * signs` over one period of all, exact until it is rounded."""
    if len(terms) == 1:
        return _walsh(terms[0][0], device) * terms[0][1]
    scales: dict[int, float] = {}
    for (direction, _), scale in zip(terms, summable([scale for _, scale in terms]), strict=True):
        scales[direction] = scales.get(direction, 0.0) + scale
    bits = max(scales).bit_length()
    # The fast transform: the digits of a direction, one after another, become those of a number.
    total = to_device([scales.get(d, 0.0) for d in range(1 << bits)], torch.float64, device)
    for bit in range(bits):
        even, odd = total.view(-1, 2, 1 << bit).unbind(1)
        total = torch.stack([even + odd, even - odd], 1).flatten()
    return total.to(torch.float32)
