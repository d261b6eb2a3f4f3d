"""Losses in two steps: a few numbers that the model gives of a row, and what the loss makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a record of the log counts (trajectory.py).
MOST_OUTPUTS = 255


@dataclass(frozen=True)
class Composite:
    """`loss(outputs(model, batch), batch)`: a loss function of which a `JacobianWindow` learns more.

    `outputs` returns `[rows, width]` in any floating dtype, and calls the model; `loss` returns `[rows]`,
    differentiable by torch in the outputs, each row's in its own. Outputs are averaged over rows, so
    column k should say the same of every row: how far the right answer leads, and not the score of answer
    number k. They must be finite (a step with one that is not is skipped), and should be float32: what they
    change by along `eps` is lost in 16 bits. Without a window it is a loss function like others.

    Raises ValueError if `width` is not 1 ... 255, and in a step for outputs or losses of other shapes, and
    losses that do not depend on outputs.
    """

    outputs: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    loss: Callable[[Tensor, Mapping[str, Any]], Tensor]
    width: int

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MOST_OUTPUTS:
            raise ValueError(f"width is {self.width}; it must be at least 1 and at most {MOST_OUTPUTS}")

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.loss(self.outputs(model, batch), batch)

    def with_slopes(
        self, model: nn.Module, batch: Mapping[str, Any], rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch of `rows`: losses `[rows]`, outputs `[rows, width]`, derivatives of losses by these."""
        outputs = self.outputs(model, batch).detach()
        if outputs.shape != (rows, self.width):
            raise ValueError(
                f"outputs returned a tensor of shape {tuple(outputs.shape)} for {rows} rows and width "
                f"{self.width}; return [rows, width]"
            )
        with torch.enable_grad():
            losses = self.loss(outputs.requires_grad_(), batch)
            if losses.shape != (rows,):
                raise ValueError(
                    f"loss returned a tensor of shape {tuple(losses.shape)} for {rows} rows; return one loss "
                    "per row"
                )
            if losses.requires_grad:
                (slopes,) = torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
            else:
                slopes = None
        if slopes is None:
            raise ValueError(
                "loss returned what does not depend on the outputs; compute it of them, by what torch can "
                "differentiate"
            )
        return losses.detach(), outputs.detach(), slopes
