"""Noise of low rank: in a matrix, `z = left @ right.T / sqrt(rank)`, both sides drawn by global index.

LOZO (arXiv 2410.07698): `left` is new in every step and direction, `right` every `refresh` steps. With
`fixed`, both stay for the whole run and a step draws `rank` numbers that weigh their products: TeZO
(arXiv 2501.19057). Vectors have the noise of `Noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.noise import Law, Noise

# Elements of a matrix whose noise is held at a time, in float32.
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """Which low rank. `rank`: 1, 2 or 4 in LOZO; `refresh`: steps that share a right side, 50 or 100 there.

    `fixed`: TeZO's form, where `refresh` says nothing and has to be left out.
    """

    rank: int = 2
    refresh: int | None = None
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; it must be at least 1")
        if self.fixed and self.refresh is not None:
            raise ValueError(
                f"refresh is {self.refresh}; with fixed: true nothing is refreshed, leave it out"
            )

    @property
    def steps(self) -> int:
        return 50 if self.refresh is None else self.refresh


class LowRankNoise(Noise):
    """`Noise` whose z has low rank in every parameter of two dimensions or more (the first against the rest).

    Elements have mean 0 and variance 1, as any other noise: LOZO's own code has neither the root nor,
    in the update, the 1 / rank of its paper, so that its `eps` is ours over `sqrt(rank)` and its paper's
    `lr` is ours. Directions of a step share the right side. Cost: some `rank + 4` passes in float32 over what
    is shifted or written; sides are not kept, a step draws them again wherever they are used. A stacked
    forward shifts no copy of a linear layer's weights: see `parts.corrected`.
    """

    def __init__(
        self, law: Law, seed: int, compile: bool, low_rank: LowRank, shapes: Mapping[str, torch.Size]
    ) -> None:
        super().__init__(law, seed, compile)
        self._rank = low_rank
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and shape.numel()}
        self._rows = {name: shape[0] for name, shape in matrices.items()}
        self._columns = {name: math.prod(shape[1:]) for name, shape in matrices.items()}

    @property
    def kind(self) -> str:
        return f"{super().kind} in {self._rank}"

    def has_sides(self, name: str) -> bool:
        return name in self._columns

    def sides(self, name: str, step: int, direction: int, device: torch.device) -> tuple[Tensor, Tensor]:
        left = self._left(name, step, direction, 0, self._rows[name], device)
        return left * self._rank.rank**-0.5, self._right(name, step, device)

    def _right(self, name: str, step: int, device: torch.device) -> Tensor:
        """`[rank, columns]`."""
        key = 0 if self._rank.fixed else step // self._rank.steps
        columns, rank = self._columns[name], self._rank.rank
        return self._drawn(f"{name}\0right", key, 0, 0, columns * rank, device).view(columns, rank).t()

    def _left(
        self, name: str, step: int, direction: int, first: int, rows: int, device: torch.device
    ) -> Tensor:
        """`[rows, rank]`, from row `first` on."""
        rank = self._rank.rank
        if not self._rank.fixed:
            at = step, direction, first * rank, rows * rank
            return self._drawn(f"{name}\0left", *at, device).view(rows, rank)
        left = self._drawn(f"{name}\0left", 0, 0, first * rank, rows * rank, device).view(rows, rank)
        return left * self._drawn(f"{name}\0weights", step, direction, 0, rank, device)

    def _drawn(
        self, name: str, step: int, direction: int, offset: int, numel: int, device: torch.device
    ) -> Tensor:
        out = torch.zeros(numel, device=device)
        super().accumulate(out, name, step, [(direction, 1.0)], offset)
        return out

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """`[rows, columns]`: term after term, so that no element depends on how many are asked for."""
        total: Tensor = left[:, :1] * right[0]
        for k in range(1, len(right)):
            total = total + left[:, k : k + 1] * right[k]
        return total.mul_(self._rank.rank**-0.5)

    def _pieces(
        self, name: str, step: int, direction: int, offset: int, numel: int, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """z of elements `offset ...`, some rows at a time, and where in them it belongs."""
        columns, right = self._columns[name], self._right(name, step, device)
        end, most = offset + numel, max(1, _CHUNK // columns)
        for first in range(offset // columns, -(-end // columns), most):
            rows = min(most, -(-end // columns) - first)
            z = self._product(self._left(name, step, direction, first, rows, device), right).view(-1)
            start, stop = max(offset, first * columns), min(end, (first + rows) * columns)
            yield slice(start - offset, stop - offset), z[start - first * columns : stop - first * columns]

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
        if name not in self._columns:
            super().shift(outs, weight, name, step, direction, offset, scales)
            return
        for piece, z in self._pieces(name, step, direction, offset, weight.numel(), weight.device):
            exact = weight[piece].to(torch.float32)
            for out, scale in zip(outs, scales, strict=True):
                out[piece] = exact + z * scale

    def shift_rows(
        self, table: Tensor, rows: Tensor, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        left = self._left(name, step, direction, 0, len(table), table.device)
        right = self._right(name, step, table.device)
        out = table.new_empty(len(rows), table.shape[1])
        size = max(1, _CHUNK // table.shape[1])
        for some, shifted in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            shifted.copy_(table[some].to(torch.float32) + self._product(left[some], right) * scale)
        return out

    def accumulate(
        self, out: Tensor, name: str, step: int, terms: Sequence[tuple[int, float]], offset: int
    ) -> None:
        if name not in self._columns:
            super().accumulate(out, name, step, terms, offset)
            return
        for direction, scale in terms:
            for piece, z in self._pieces(name, step, direction, offset, out.numel(), out.device):
                out[piece] += z * scale
