"""Noise on a piece of a weight that is no run of it: some columns of each row, under tensor parallelism.

Which element has which noise is as ever. Long runs are taken one by one; short ones many at a time, as the
rows that they lie in, of which these columns are kept: that takes noise which is thrown away, but no call
for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from zo_dist.kernels import EAGER_CHUNK
from zo_dist.noise import Noise
from zo_dist.params import Runs

# Elements from which on a run is worth a call, and the most of whole rows at a time.
_LONG = 1 << 13
_CPU_ROWS, _GPU_ROWS = EAGER_CHUNK, 1 << 24


def in_runs(noise: Noise, first: int, runs: Runs | None) -> Noise:
    """`noise` for tensors of a span that begins at element `first`; itself where that is one run."""
    return noise if runs is None else _InRuns(noise, first, runs)


class _InRuns(Noise):
    """As `Noise`, but `offset + j`, less `first`, is a place in the piece and not yet the element there."""

    def __init__(self, noise: Noise, first: int, runs: Runs) -> None:
        super().__init__(noise.law, noise.seed, noise.compile)
        self._noise, self._first, self._runs = noise, first, runs

    def in_native(self, tensor: Tensor) -> bool:
        return False

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
        def call(tensors: Sequence[Tensor], at: int) -> None:
            self._noise.shift(tensors[:-1], tensors[-1], name, step, direction, at, scales)

        self._on_rows((*outs, weight), len(outs), offset, call)

    def accumulate(
        self, out: Tensor, name: str, step: int, terms: Sequence[tuple[int, float]], offset: int
    ) -> None:
        def call(tensors: Sequence[Tensor], at: int) -> None:
            self._noise.accumulate(tensors[0], name, step, terms, at)

        self._on_rows((out,), 1, offset, call)

    def round(self, out: Tensor, exact: Tensor, name: str, step: int, offset: int) -> None:
        def call(tensors: Sequence[Tensor], at: int) -> None:
            self._noise.round(tensors[0], tensors[1], name, step, at)

        self._on_rows((out, exact), 1, offset, call)

    def _on_rows(
        self,
        tensors: Sequence[Tensor],
        outputs: int,
        offset: int,
        call: Callable[[Sequence[Tensor], int], None],
    ) -> None:
        """`call` on tensors whose elements follow each other in the weight, and the number of their first."""
        width, stride = self._runs
        most = _CPU_ROWS if tensors[0].device.type == "cpu" else _GPU_ROWS
        start, numel = 0, tensors[0].numel()
        while start < numel:
            row, lead = divmod(offset - self._first + start, width)
            at = self._first + row * stride
            if width >= _LONG or stride > most:
                size = min(width - lead, numel - start)
                call([t[start : start + size] for t in tensors], at + lead)
            else:
                rows = min(most // stride, -(-(lead + numel - start) // width))
                size = min(rows * width - lead, numel - start)
                held, here = slice(start, start + size), slice(lead, lead + size)
                whole = [self._widened(t[held], here, rows) for t in tensors]
                call(whole, at)
                for out, wide in zip(tensors[:outputs], whole, strict=False):
                    out[held] = wide.view(rows, stride)[:, :width].reshape(-1)[here]
            start += size

    def _widened(self, piece: Tensor, here: slice, rows: int) -> Tensor:
        """`[rows * stride]`: a piece where it lies in these rows, and zeros."""
        width, stride = self._runs
        wide = piece.new_zeros(rows, stride)
        if piece.numel() == rows * width:
            wide[:, :width] = piece.view(rows, width)
        else:
            columns = piece.new_zeros(rows * width)
            columns[here] = piece
            wide[:, :width] = columns.view(rows, width)
        return wide.view(-1)
