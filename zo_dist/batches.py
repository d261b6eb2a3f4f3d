"""Which rows each rank runs in each step: a function of the seed, the step and the rank alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_dist.tasks import EncodedRow, collate, collate_prompts


class StepBatches:
    """The batches of a run.

    An epoch is a shuffle by `(seed, epoch)`; the rows left over by its last whole batch wait for
    another shuffle. Every step has `rows_per_step` rows over all ranks, in the same order for every
    number of ranks; rank k of N gets those from `k * R // N` to `(k + 1) * R // N`, cut into
    micro-batches of at most `micro_rows`. With `length_pool` above 1, shuffled rows are taken that
    many batches at a time, sorted by length, cut into batches, and the batches shuffled again: less
    padding, and still every row once per epoch. `prompts`: batches for texts to be generated.
    """

    def __init__(
        self,
        rows: Sequence[EncodedRow],
        *,
        rows_per_step: int,
        micro_rows: int | None,
        length_pool: int,
        seed: int,
        rank: int,
        num_ranks: int,
        pad_id: int,
        fast: bool,
        device: torch.device,
        prompts: bool = False,
    ) -> None:
        if len(rows) < rows_per_step:
            raise ValueError(f"{rows_per_step} rows per step, but there are only {len(rows)} training rows")
        self._rows, self._rows_per_step, self._length_pool, self._seed = (
            rows,
            rows_per_step,
            length_pool,
            seed,
        )
        self._first, self._stop = rows_of_rank(rank, num_ranks, rows_per_step)
        self._micro_rows = micro_rows or rows_per_step
        self._pad_id, self._fast, self._device, self._prompts = pad_id, fast, device, prompts
        self._epoch, self._order = -1, list[list[int]]()

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        """This rank's micro-batches of one step; a rank without rows gets one batch of none."""
        per_epoch = len(self._rows) // self._rows_per_step
        if step // per_epoch != self._epoch:
            self._epoch = step // per_epoch
            self._order = self.epoch(self._epoch)
        mine = self._order[step % per_epoch][self._first : self._stop]
        if not mine:
            empty = self._collate([self._rows[0]])
            return [{key: value[:0] for key, value in empty.items()}]
        starts = range(0, len(mine), self._micro_rows)
        return [self._collate([self._rows[i] for i in mine[s : s + self._micro_rows]]) for s in starts]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch, as row numbers."""
        size = self._rows_per_step
        generator = random.Random(f"{self._seed}/epoch/{epoch}")
        order = list(range(len(self._rows)))
        generator.shuffle(order)
        order = order[: len(order) // size * size]
        batches: list[list[int]] = []
        for start in range(0, len(order), size * self._length_pool):
            pool = order[start : start + size * self._length_pool]
            if self._length_pool > 1:
                pool.sort(key=lambda i: row_length(self._rows[i]))
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        if self._length_pool > 1:
            generator.shuffle(batches)
            # Rows stand for directions by their place: which gets the short ones is left to chance.
            for batch in batches:
                generator.shuffle(batch)
        return batches

    def _collate(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        if self._prompts:
            return to_device(collate_prompts(rows, self._pad_id), self._device)
        return to_device(collate(rows, self._pad_id, fast=self._fast), self._device)


def rows_of_rank(rank: int, num_ranks: int, rows: int) -> tuple[int, int]:
    """The first of a rank's rows of a step, and the one after its last."""
    return rank * rows // num_ranks, (rank + 1) * rows // num_ranks


def row_length(row: EncodedRow) -> int:
    """Tokens of the longest of a row's sequences."""
    return max(len(sequence) for sequence in row.sequences)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
