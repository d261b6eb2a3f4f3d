"""Accuracy and cross-entropy of a split, its rows shared out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zo_dist.batches import row_length, to_device
from zo_dist.engines import Engine
from zo_dist.params import evaluating
from zo_dist.tasks import EncodedRow, accuracy_and_loss, collate, option_scores


@dataclass(frozen=True, slots=True)
class Score:
    """The share of rows answered right, and the mean cross-entropy over the options."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(
    engine: Engine, rows: Sequence[EncodedRow], *, micro_rows: int, pad_id: int, fast: bool
) -> Score:
    """The score of `rows`; the same on every rank.

    Batches are of similar length and the same for every number of ranks, dealt out in turn. All
    ranks make equally many forwards, as a sharded model needs: one with no batch left runs one row
    that does not count. Cost besides: one exchange of two numbers per row.
    """
    order = sorted(range(len(rows)), key=lambda i: row_length(rows[i]))
    batches = [order[i : i + micro_rows] for i in range(0, len(order), micro_rows)]
    results = torch.zeros(len(rows), 2, dtype=torch.float64)
    with evaluating(engine.module):
        for turn in range(0, len(batches), engine.num_ranks):
            counts = turn + engine.rank < len(batches)
            batch = batches[turn + engine.rank] if counts else batches[0][:1]
            inputs = to_device(collate([rows[i] for i in batch], pad_id, fast=fast), engine.device)
            correct, loss = accuracy_and_loss(option_scores(engine.module, inputs), inputs["label"])
            if counts:
                results[batch] = torch.stack([correct, loss], dim=1).to(results)
    engine.publish()
    # Every row is some rank's, so the sum is exact, and its mean the same for every number of ranks.
    accuracy, loss = engine.reduce(results).mean(0).tolist()
    return Score(accuracy, loss)
