"""Noise of flipped signs: in a matrix, `z = base * outer(rows, columns)`, and a step has one base.

Flipout (arXiv 1803.04386); with a direction for each row of the batch, GRZO's (arXiv 2606.02857). Base
and signs are drawn by global index. Vectors have the noise of `Noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_dist.kernels import held_of, part_of
from zo_dist.laws import Law
from zo_dist.matrices import MatrixNoise
from zo_dist.noise import Noise, to_device

# Directions whose signs are drawn together.
_TOGETHER = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Flipout:
    """Signs alone tell the directions of a step apart: one per row and one per column of each matrix."""


class FlipoutNoise(MatrixNoise):
    """`Noise` that flips a base, in every parameter of two dimensions or more (the first against the rest).

    The base has the law of the run and is new in every step; a direction flips its rows and its columns. So
    each z by itself has the law that it has without. The estimate of signs has the mean and the variance that
    it has of other signs; of normals, see docs/methods.md. Cost: a stacked forward makes one product with the
    stored weights and one with the base, for all probes, and shifts no copy of a linear layer's weights; with
    16-bit inputs the base is rounded to them. A write draws the base once, and adds the directions up in one
    thin product in float64.
    """

    def __init__(self, law: Law, seed: int, compile: bool, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(law, seed, compile, shapes)
        self._signs = Noise("rademacher", seed, compile)

    @property
    def kind(self) -> str:
        return f"{super().kind} in {Flipout()}"

    def warm_up(self, *arguments: Any) -> None:
        super().warm_up(*arguments)
        self._signs.compile = self.compile

    def add_products(
        self, out: Tensor, x: Tensor, name: str, step: int, terms: Sequence[tuple[int, float, slice]]
    ) -> None:
        rows, columns = self._rows[name], self._columns[name]
        directions = [direction for direction, _, _ in terms]
        left = self._flips(name, "rows", step, directions, 0, rows, x.device).to(x.dtype)
        right = self._flips(name, "columns", step, directions, 0, columns, x.device).to(x.dtype)
        flipped = torch.cat([x[mine] * signs for (_, _, mine), signs in zip(terms, right, strict=True)])
        sizes = [mine.stop - mine.start for _, _, mine in terms]
        most = max(1, part_of(x.device) // columns)
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))
            base = x.new_empty((part.stop - start) * columns)
            super().shift([base], torch.zeros_like(base), f"{name}\0base", step, 0, start * columns, [1.0])
            products = torch.split(flipped @ base.view(-1, columns).t(), sizes)
            for (_, scale, mine), signs, product in zip(terms, left, products, strict=True):
                out[mine][..., part].addcmul_(product, signs[part], value=scale)

    def shift_rows(
        self, table: Tensor, rows: Tensor, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        (left,) = self._flips(name, "rows", step, [direction], 0, len(table), table.device)
        (right,) = self._flips(name, "columns", step, [direction], 0, table.shape[1], table.device)
        nothing = torch.zeros(1, device=table.device).expand(table.shape)
        base = super().shift_rows(nothing, rows, f"{name}\0base", step, 0, 1.0)
        z = base.mul_(left[rows].unsqueeze(1)).mul_(right)
        return (table[rows].to(torch.float32) + z * scale).to(table.dtype)

    def _sums(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        numel: int,
        device: torch.device,
    ) -> Iterator[tuple[slice, Tensor]]:
        columns, directions = self._columns[name], [direction for direction, _ in terms]
        scales = to_device(summable([scale for _, scale in terms]), torch.float64, device)
        right = self._flips(name, "columns", step, directions, 0, columns, device).to(torch.float64)
        right *= scales.unsqueeze(1)
        end = offset + numel
        most = max(1, held_of(device) // columns)
        most = min(most, -(-end // columns) - offset // columns)
        # Fresh memory for every piece would take longer than what is done in it.
        exact = torch.empty(most, columns, dtype=torch.float64, device=device)
        total, base = torch.empty(most * columns, device=device), torch.empty(most * columns, device=device)
        for first in range(offset // columns, -(-end // columns), most):
            rows = min(most, -(-end // columns) - first)
            left = self._flips(name, "rows", step, directions, first, rows, device).to(torch.float64)
            start, stop = max(offset, first * columns), min(end, (first + rows) * columns)
            torch.mm(left.t(), right, out=exact[:rows])
            mine, unit = total[: stop - start], base[: stop - start].zero_()
            mine.copy_(exact.view(-1)[start - first * columns : stop - first * columns])
            super().accumulate(unit, f"{name}\0base", step, [(0, 1.0)], start)
            yield slice(start - offset, stop - offset), mine.mul_(unit)

    def _flips(
        self,
        name: str,
        side: str,
        step: int,
        directions: Sequence[int],
        first: int,
        count: int,
        device: torch.device,
    ) -> Tensor:
        """float32 `[directions, count]`: signs of the rows or columns from `first` on."""
        together = sorted({direction // _TOGETHER for direction in directions})
        drawn = torch.zeros(len(together), count * _TOGETHER, device=device)
        for flat, number in zip(drawn, together, strict=True):
            at = f"{name}\0{side}", step, [(number, 1.0)], first * _TOGETHER
            self._signs.accumulate(flat, *at)
        places = [(together.index(d // _TOGETHER), d % _TOGETHER) for d in directions]
        return torch.stack([drawn[i].view(count, _TOGETHER)[:, j] for i, j in places])


def summable(scales: Sequence[float]) -> list[float]:
    """`scales`, in float32 as all noise takes them, as multiples of one number.

    So float64 holds all sums of them, with any signs, exactly. A product of matrices then has the same bits
    whatever order it adds in. Of what all scales are together in size, each loses less than 2**-52.
    """
    scales = torch.tensor(scales, dtype=torch.float32).tolist()
    last = math.frexp(math.fsum(map(abs, scales)))[1] - 52
    return [math.ldexp(round(math.ldexp(scale, -last)), last) for scale in scales]
