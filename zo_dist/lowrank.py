"""Noise of low rank: in a matrix, `z = left @ right`, both sides drawn by global index.

LOZO (arXiv 2410.07698): `left` is new in every step and direction, `right` every `refresh` steps. With
`fixed`, both stay for the whole run and a step draws `rank` numbers that weigh their products: TeZO
(arXiv 2501.19057). With `orthonormal`, both last for `refresh` steps, their columns are orthonormal, and a
step draws `rank x rank` numbers between them: SubZero (arXiv 2410.08989). Vectors have the noise of `Noise`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.laws import Law
from zo_dist.matrices import MatrixNoise
from zo_dist.params import Span
from zo_dist.thin import Thin, inverse_root, product

_CPU = torch.device("cpu")
# The side itself, not a sum over directions.
_ITSELF = ((0, 1.0),)


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """Which low rank. `rank`: 1, 2 or 4 in LOZO, 24 or 48 in SubZero's scripts.

    `refresh`: steps that share a right side: 50 or 100 in LOZO (left out: 50), and both sides, 1000 or 2000
    in SubZero (left out: 1000). `fixed`: TeZO's form, where `refresh` says nothing and has to be left out.
    `orthonormal`: SubZero's form.
    """

    rank: int = 2
    refresh: int | None = None
    fixed: bool = False
    orthonormal: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; it must be at least 1")
        if self.fixed and self.orthonormal:
            raise ValueError(
                "fixed is true and so is orthonormal: sides that last for the run are TeZO's, orthonormal "
                "ones, which are refreshed, SubZero's; set one of them to false"
            )
        if self.fixed and self.refresh is not None:
            raise ValueError(
                f"refresh is {self.refresh}; with fixed: true nothing is refreshed, leave it out"
            )

    @property
    def steps(self) -> int:
        unset = 1000 if self.orthonormal else 50
        return unset if self.refresh is None else self.refresh


class LowRankNoise(MatrixNoise):
    """`Noise` whose z has low rank in every parameter of two dimensions or more (the first against the rest).

    Elements have mean 0 and a mean square of 1, as of any other noise: LOZO's own code has neither
    `1 / sqrt(rank)` nor, in the update, the 1 / rank of its paper, so that its `eps` is ours over
    `sqrt(rank)` and its paper's `lr` is ours. Directions of a step share the right side: what it writes is
    one product, of the sum of their left sides. Sides are not kept but drawn again wherever they are used; of
    an orthonormal one `rank x rank` numbers are kept of the last two refreshes, which make Gaussians
    orthonormal. It has no more columns than the matrix has rows (or, on the right, columns).

    Cost: a thin product, in float64 (see thin.py), of what is shifted or written; of orthonormal sides, when
    they are refreshed, the product of each with itself besides. A stacked forward shifts no copy of a linear
    layer's weights: see `parts.corrected`. Raises ValueError for orthonormal sides of Rademacher noise.
    """

    def __init__(
        self, law: Law, seed: int, compile: bool, low_rank: LowRank, shapes: Mapping[str, torch.Size]
    ) -> None:
        super().__init__(law, seed, compile, shapes)
        if low_rank.orthonormal and law != "gaussian":
            raise ValueError(
                f"noise is {law!r}, and structure is orthonormal: columns of signs may be multiples of each "
                "other, and have no orthonormal form; set noise to gaussian"
            )
        self._rank = low_rank
        # By side and refresh, what makes it orthonormal: of the last two, as earlier steps are written again.
        self._roots: dict[str, dict[int, Tensor]] = {}

    @property
    def kind(self) -> str:
        return f"{super().kind} in {self._rank}"

    def is_product(self, name: str) -> bool:
        return self.has_sides(name)

    def add_products(
        self, out: Tensor, x: Tensor, name: str, step: int, terms: Sequence[tuple[int, float, slice]]
    ) -> None:
        for direction, group in itertools.groupby(terms, key=lambda term: term[0]):
            sides = self.sides(name, step, [(direction, 1.0)], x.device)
            left, right = (side.to(x.dtype).t() for side in sides)
            for _, scale, rows in group:
                thin = x[rows].reshape(-1, x.shape[-1]) @ right
                out[rows].view(-1, out.shape[-1]).addmm_(thin, left, alpha=scale)

    def sides(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        device: torch.device,
        offset: int = 0,
        numel: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        place = offset, numel
        return self.sides_of(name, step, self.factor(name, step, terms, device, *place), *place)

    def factor(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        device: torch.device,
        offset: int = 0,
        numel: int | None = None,
    ) -> Tensor:
        if self._rank.fixed:
            return self._drawn(f"{name}\0weights", step, terms, 0, 1, self._rank.rank, device).view(-1)
        return self._left(name, step, terms, self._rows_of(name, offset, numel), device).view(-1)

    def sides_of(
        self, name: str, step: int, factor: Tensor, offset: int = 0, numel: int | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, right = self._rows_of(name, offset, numel), self._right(name, step, factor.device)
        if not self._rank.fixed:
            return factor.view(len(rows), -1), right
        width = self._rank.rank
        left = self._drawn(f"{name}\0left", 0, _ITSELF, rows.start, len(rows), width, factor.device)
        return (left * factor).mul_(width**-0.5), right

    def require_factor(self, lasting: bool) -> None:
        if lasting and not self._rank.fixed:
            raise ValueError(
                "factored is true: Adam is to keep its moments in the weights of products that last for the "
                "run, but sides are refreshed; set fixed of structure LowRank(...) to true, or factored to "
                "false"
            )

    def factor_span(self, span: Span) -> Span:
        if not self.has_sides(span.name):
            return span
        if span.runs is not None:
            raise ValueError(
                f"factored is true, but tensor parallelism leaves this rank columns of {span.name}, and no "
                "side of their noise: set factored to false"
            )
        if self._rank.fixed:
            return Span(span.name, span.flat.new_empty(self._rank.rank), 0)
        rows, inner = self._rows_of(span.name, span.offset, span.numel), self._widths(span.name)[1]
        return Span(span.name, span.flat.new_empty(len(rows) * inner), rows.start * inner)

    def carry(self, name: str, left: Tensor, before: int, step: int) -> None:
        if before < 0 or self._drawn_at(before) == self._drawn_at(step):
            return
        old, new = (self._right(name, s, _CPU) for s in (before, step))
        # As `new @ new.T` is `columns` times 1, or nearly so, this is nearest to `left @ old`.
        across = product(old, new.t()) / self._columns[name]
        left.copy_(product(left.view(-1, len(old)), across.to(left.device)).view(-1))

    def _rows_of(self, name: str, offset: int, numel: int | None) -> range:
        """Those that elements `offset ...` lie in, or all."""
        if numel is None:
            return range(self._rows[name])
        columns = self._columns[name]
        return range(offset // columns, -(-(offset + numel) // columns))

    def _drawn_at(self, step: int) -> int:
        """Where in its stream the right side of a step is."""
        return 0 if self._rank.fixed else step // self._rank.steps

    def _widths(self, name: str) -> tuple[int, int]:
        """Columns of what is drawn for the left side, and rows of the right one."""
        rank = self._rank.rank
        if not self._rank.orthonormal:
            return rank, rank
        return min(rank, self._rows[name]), min(rank, self._columns[name])

    def _right(self, name: str, step: int, device: torch.device) -> Tensor:
        """float32 `[inner, columns]`, of a mean square of 1."""
        key, (_, inner), columns = self._drawn_at(step), self._widths(name), self._columns[name]
        side = f"{name}\0right"
        right = self._drawn(side, key, _ITSELF, 0, columns, inner, device).t()
        if not self._rank.orthonormal:
            return right
        root = self._root(side, key, columns, inner).t() * math.sqrt(columns)
        return product(root.to(device), right).to(torch.float32)

    def _left(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        rows: range,
        device: torch.device,
    ) -> Tensor:
        """float32 `[len(rows), inner]`: `scale * left` that is not fixed, summed in order."""
        side, width = f"{name}\0left", self._widths(name)[0]
        if self._rank.orthonormal:
            key = self._drawn_at(step)
            left = self._drawn(side, key, _ITSELF, rows.start, len(rows), width, device)
            return product(left, self._core(name, step, terms).to(device)).to(torch.float32)
        left = self._drawn(side, step, terms, rows.start, len(rows), width, device)
        return left.mul_(width**-0.5)

    def _core(self, name: str, step: int, terms: Sequence[tuple[int, float]]) -> Tensor:
        """float64 `[width, inner]`: what Gaussians are multiplied by to make the left side of SubZero."""
        (width, inner), rows = self._widths(name), self._rows[name]
        core = self._drawn(f"{name}\0core", step, terms, 0, width, inner, _CPU)
        root = self._root(f"{name}\0left", self._drawn_at(step), rows, width)
        return product(root * math.sqrt(rows / (width * inner)), core)

    def _root(self, side: str, key: int, length: int, width: int) -> Tensor:
        """float64 `[width, width]`, on the CPU whatever the weights are on: `drawn @ root` is orthonormal."""
        kept = self._roots.setdefault(side, {})
        if key not in kept:
            drawn = self._drawn(side, key, _ITSELF, 0, length, width, _CPU)
            kept[key] = inverse_root(product(drawn.t(), drawn))
            while len(kept) > 2:
                del kept[next(iter(kept))]
        return kept[key]

    def _drawn(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        first: int,
        rows: int,
        width: int,
        device: torch.device,
    ) -> Tensor:
        """float32 `[rows, width]`, from row `first` on."""
        out = torch.zeros(rows * width, device=device)
        super().accumulate(out, name, step, terms, first * width)
        return out.view(rows, width)

    def _sums(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        numel: int,
        device: torch.device,
    ) -> Iterator[tuple[slice, Tensor]]:
        sides = self.sides(name, step, terms, device, offset, numel)
        return Thin(*sides, offset).pieces(offset, numel)

    def shift_rows(
        self, table: Tensor, rows: Tensor, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        thin = Thin(*self.sides(name, step, [(direction, 1.0)], table.device))
        out = table.new_empty(len(rows), table.shape[1])
        size = max(1, (1 << 20) // table.shape[1])
        for some, shifted in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            shifted.copy_(table[some].to(torch.float32) + thin.rows(some) * scale)
        return out
