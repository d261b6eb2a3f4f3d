"""Objectives without a slope of their own: any score per row becomes what a step lowers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from zo_dist.probes import Batch, RowLoss
from zo_dist.tasks.scoring import causal_lm_loss

# One number per row, the higher the better.
RowScore = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Objective:
    """`1 - score(model, batch)` as the loss of each row: accuracy, F1 of a generated text, a reward.

    `score` returns `[rows]`, in any floating dtype; it may call the model as often as it likes. Only the
    difference between two probes counts, so the score needs no bounds. It takes the place of a loss
    function: `ZeroOrder.step_batch(batch, Objective(score))`, `ZOTrainer(row_loss=Objective(score))`.

    `check`: a loss function of the same batches, for the start-up check alone. That one shifts the weights
    of each arm and wants the loss of a single row to move, which a score made of steps need not do.
    """

    score: RowScore
    check: RowLoss = causal_lm_loss

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return 1.0 - self.score(model, batch)
