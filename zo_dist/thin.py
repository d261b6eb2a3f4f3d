"""Products of thin matrices, to the bit: they depend on their numbers and on nothing else.

A library adds up a product in an order of its own, by shapes, threads and device. Here numbers are cut to so
few bits that float64 holds every sum of them exactly: then no order shows, and no fused multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a product that are in float64 at a time: they stay in a cache.
_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 22
# Rows of it at least, for each reads the whole right side.
_ROWS = 8


def product(left: Tensor, right: Tensor) -> Tensor:
    """float64 `left @ right`, `[rows, inner]` and `[inner, columns]`, added up exactly.

    Of each number `(53 - log2 inner) / 2` bits count, from the power of two above the largest in its row of
    `left` or column of `right` down: 26 for 2 of them, 24 for 24. An element depends on no other row or
    column.
    """
    bits = _bits(left.shape[1])
    return _cut(left, 1, bits) @ _cut(right, 0, bits)


class Thin:
    """`product(left, right)`, some elements at a time; `left` are its rows from that of `offset` on."""

    def __init__(self, left: Tensor, right: Tensor, offset: int = 0) -> None:
        bits = _bits(left.shape[1])
        self._left, self._right = _cut(left, 1, bits), _cut(right, 0, bits)
        self._first = offset // right.shape[1]

    def pieces(self, offset: int, numel: int) -> Iterator[tuple[slice, Tensor]]:
        """float32 elements `offset ...` of the whole, flattened, and where among them they belong."""
        columns, end = self._right.shape[1], offset + numel
        size = _CHUNK if self._left.device.type == "cpu" else _GPU_CHUNK
        last, most = -(-end // columns), max(_ROWS, size // columns)
        for row in range(offset // columns, last, most):
            stop = min(row + most, last)
            values = self._product(self._left[row - self._first : stop - self._first]).view(-1)
            a, b = max(offset, row * columns), min(end, stop * columns)
            values = values[a - row * columns : b - row * columns]
            yield slice(a - offset, b - offset), values.to(torch.float32)

    def rows(self, which: Tensor) -> Tensor:
        """float32 `[len(which), columns]`: these of the rows in `left`."""
        return self._product(self._left[which]).to(torch.float32)

    def _product(self, left: Tensor) -> Tensor:
        return left @ self._right


class SquareSum(Thin):
    """The sum over k of `(left[:, k] * right[k])**2`, added up in that order, as `Thin` gives its product.

    Numbers are not cut: of those far below the largest in their row nothing would be left, to divide by.
    """

    def __init__(self, left: Tensor, right: Tensor, offset: int = 0) -> None:
        self._left, self._right = (side.to(torch.float64).square() for side in (left, right))
        self._first = offset // right.shape[1]

    def _product(self, left: Tensor) -> Tensor:
        first, *others = (left[:, k : k + 1] * self._right[k] for k in range(len(self._right)))
        for other in others:
            first += other
        return first


def inverse_root(gram: Tensor) -> Tensor:
    """The upper triangular X with `X^T gram X = 1`, so that `A X` is the Q of A's QR, if `gram = A^T A`.

    float64 `[n, n]`, positive definite. By elimination, of single numbers in one order: a library's solver
    rounds its own way.
    """
    rest, out = gram.clone(), torch.eye(len(gram), dtype=torch.float64)
    for k in range(len(gram)):
        length = math.sqrt(float(rest[k, k]))
        out[:, k] /= length
        # How much of this column, which has the length 1 now, is in those after it.
        along = rest[k, k + 1 :] / length
        out[:, k + 1 :] -= out[:, k : k + 1] * along
        rest[k + 1 :, k + 1 :] -= along.unsqueeze(1) * along
    return out


def _bits(inner: int) -> int:
    """Of each number, so that sums of `inner` products have 53 at most."""
    return (53 - math.ceil(math.log2(inner))) // 2


def _cut(numbers: Tensor, dim: int, bits: int) -> Tensor:
    """float64, rounded to multiples of 2**-bits of the power of two above the largest along `dim`."""
    exact = numbers.to(torch.float64)
    largest = exact.abs().amax(dim, keepdim=True)
    # A quotient that is exact: a power of two.
    power = largest / torch.frexp(largest).mantissa
    unit = torch.where(largest > 0.0, power, 1.0) * 2.0**-bits
    return (exact / unit).round_().mul_(unit)
