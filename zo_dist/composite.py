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
    column k should say the same of every row: of a right answer first, not of answer number k. Without a
    window it is a loss function like others.

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

    def told(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The losses `[rows]`, the outputs and the derivatives of the losses by them `[rows, width]`."""
        outputs = self.outputs(model, batch).detach()
        if outputs.ndim != 2 or outputs.shape[1] != self.width:
            raise ValueError(
                f"outputs returned a tensor of shape {tuple(outputs.shape)}; return [rows, {self.width}], as "
                "width says"
            )
        with torch.enable_grad():
            leaf = outputs.requires_grad_()
            losses = self.loss(leaf, batch)
            if losses.shape != outputs.shape[:1] or not losses.requires_grad:
                raise ValueError(
                    f"loss returned a tensor of shape {tuple(losses.shape)} for {len(outputs)} rows, "
                    f"{'that depends' if losses.requires_grad else 'that does not depend'} on the outputs; "
                    "return one loss per row, which torch can differentiate by the outputs"
                )
            (slopes,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), outputs.detach(), slopes
