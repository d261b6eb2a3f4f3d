"""The loss and metrics of a split, its rows shared out over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.batches import row_length, to_device
from zo_dist.engines import Engine
from zo_dist.params import evaluating
from zo_dist.tasks import (
    TEXT_METRICS,
    EncodedRow,
    TextGenerator,
    collate,
    collate_prompts,
    evaluation_loss,
    option_accuracy,
    option_scores,
)


@dataclass(frozen=True, slots=True)
class Score:
    """Means over the rows: `metrics`, by name, the more the better; `loss` as `evaluation_loss` has it."""

    metrics: dict[str, float]
    loss: float

    def __str__(self) -> str:
        named = [*self.metrics.items(), ("loss", self.loss)]
        return ", ".join(f"{name} {value:.4f}" for name, value in named)

    def objective(self, name: str) -> float:
        """What training lowers, by the names of `train.objective`."""
        return self.loss if name == "loss" else 1.0 - self.metrics[name]


@torch.no_grad()
def evaluate(
    engine: Engine,
    rows: Sequence[EncodedRow],
    *,
    micro_rows: int,
    pad_id: int,
    fast: bool,
    metrics: Sequence[str] = ("accuracy",),
    generate: TextGenerator | None = None,
) -> Score:
    """The score of `rows`; the same on every rank.

    Batches are of similar length and the same for every number of ranks, dealt out in turn. All
    ranks make equally many forwards, as a sharded model needs: one with no batch left runs one row
    that does not count. Cost besides: one exchange of the numbers of each row. `generate` is for metrics of
    texts, which take a forward per token.
    """
    order = sorted(range(len(rows)), key=lambda i: row_length(rows[i]))
    batches = [order[i : i + micro_rows] for i in range(0, len(order), micro_rows)]
    results = torch.zeros(len(rows), 1 + len(metrics), dtype=torch.float64)
    with evaluating(engine.module):
        for turn in range(0, len(batches), engine.num_groups):
            counts = turn + engine.group < len(batches)
            batch = batches[turn + engine.group] if counts else batches[0][:1]
            some = [rows[i] for i in batch]
            inputs = to_device(collate(some, pad_id, fast=fast), engine.device)
            scores = option_scores(engine.module, inputs)
            columns = [evaluation_loss(scores, inputs)]
            if generate is not None:
                columns += _of_texts(engine, some, pad_id, metrics, generate)
            elif metrics:
                columns.append(option_accuracy(scores, inputs))
            if counts:
                results[batch] = torch.stack([column.to(results) for column in columns], dim=1)
    engine.publish()
    # Every row is some rank's, so the sum is exact, and its mean the same for every number of ranks.
    loss, *means = engine.reduce(results).mean(0).tolist()
    return Score(dict(zip(metrics, means, strict=True)), loss)


def _of_texts(
    engine: Engine, rows: Sequence[EncodedRow], pad_id: int, metrics: Sequence[str], generate: TextGenerator
) -> list[Tensor]:
    texts = generate(engine.module, to_device(collate_prompts(rows, pad_id), engine.device))
    return [
        torch.tensor(
            [TEXT_METRICS[name](text, row.answers) for text, row in zip(texts, rows, strict=True)],
            dtype=torch.float64,
        )
        for name in metrics
    ]
