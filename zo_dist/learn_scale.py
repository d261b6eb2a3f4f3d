"""Train the nets of `LearnedScale`: once per base model, by back-propagation, on one process that holds it.

Learning to learn as ZO Fine-tuner does it (arXiv 2510.00419 and its code): the nets are to choose the
perturbation whose one zeroth-order step lowers the loss most, at points along first-order training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.engines import Engine
from zo_dist.noise import Noise
from zo_dist.params import Param, evaluating
from zo_dist.parts import Probe, Shifts
from zo_dist.perturb import ShardPerturbation
from zo_dist.probes import Batch, RowLoss
from zo_dist.scale import NUM_HIDDEN, NUM_INPUTS, ScaleNets, energies, inputs_of, normaliser

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How the nets are trained; defaults are those of the published script for one task.

    `restart`: epochs after which the model's weights begin anew. `lr_nets`: of the nets, by SGD.
    `lr_step`: of the one zeroth-order step that the nets are judged by. `lr_model`, `momentum`: of the
    first-order training between, linearly to 0 within a restart. `tokens`: see `scale.energies`.
    """

    epochs: int = 15
    restart: int = 5
    lr_nets: float = 0.1
    lr_step: float = 1e-6
    lr_model: float = 0.01
    momentum: float = 0.8
    tokens: int = 240

    def __post_init__(self) -> None:
        for name in ("epochs", "restart", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr_nets", "lr_step", "lr_model", "momentum"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value}; it must be finite and at least 0")


def new_nets(num_blocks: int, seed: int) -> ScaleNets:
    """Nets as torch's linear layers begin: uniform within 1 / sqrt(inputs)."""
    generator, nets = torch.Generator().manual_seed(seed), ScaleNets(num_blocks)
    with torch.no_grad():
        for param, inputs in zip(nets.parameters(), (NUM_INPUTS,) * 2 + (NUM_HIDDEN,) * 2, strict=True):
            param.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return nets


def learn_scale(
    engine: Engine,
    params: Sequence[Param],
    batches: Callable[[int], Batch],
    steps_per_epoch: int,
    row_loss: RowLoss,
    learning: Learning,
    eps: float = 1e-3,
    seed: int = 0,
) -> ScaleNets:
    """Nets for `params`, trained on `batches(step)`; the model has its weights back at the end.

    Weights must be float32, or the step of size `lr_step` would be rounded away. Cost of a step: four
    forwards and two backwards; memory for a gradient and three copies of the weights (the start, momentum,
    and what they are while shifted).
    """
    require_one_process(engine)
    other = next((p for p in params if p.param.dtype != torch.float32), None)
    if other:
        raise ValueError(f"{other.name} is {other.param.dtype}; a scale is learnt in float32")
    nets, noise = new_nets(len(params), seed), Noise("rademacher", seed, compile=True)
    of_nets = torch.optim.SGD(nets.parameters(), learning.lr_nets)
    step = _Step(engine, params, noise, eps, learning, row_loss)
    start = [param.param.detach().clone() for param in params]
    number, total = 0, learning.epochs * steps_per_epoch
    per_restart = learning.restart * steps_per_epoch
    try:
        with evaluating(engine.module), torch.enable_grad():
            while number < total:
                if number % per_restart == 0:
                    _restore(params, start)
                    of_model = torch.optim.SGD(
                        [p.param for p in params], learning.lr_model, momentum=learning.momentum
                    )
                    step.forget()
                batch = batches(number)
                of_nets.zero_grad()
                loss = step.judge(nets, number, batch)
                of_nets.step()
                of_model.param_groups[0]["lr"] = learning.lr_model * (1 - number % per_restart / per_restart)
                row_loss_mean(row_loss, engine, batch).backward()  # type: ignore[no-untyped-call]
                of_model.step()
                of_model.zero_grad()
                number += 1
                if number % steps_per_epoch == 0:
                    log.info("epoch %d: loss after the step %.4f", number // steps_per_epoch, loss)
    finally:
        _restore(params, start)
    return nets


class _Step:
    """The zeroth-order step that the nets are judged by, and the gradient of its loss in what they say."""

    def __init__(
        self,
        engine: Engine,
        params: Sequence[Param],
        noise: Noise,
        eps: float,
        learning: Learning,
        row_loss: RowLoss,
    ) -> None:
        self._engine, self._params, self._noise, self._eps = engine, params, noise, eps
        self._learning, self._row_loss = learning, row_loss
        counts = energies(params, learning.tokens)
        self._counts = torch.tensor([counts[p.name] for p in params], dtype=torch.float64)
        self.forget()

    def forget(self) -> None:
        """As before the first step: no losses known, all factors 1."""
        self._losses, self._sigmas = [0.0, 0.0], [1.0] * len(self._params)

    def judge(self, nets: ScaleNets, step: int, batch: Batch) -> float:
        """Add to the nets' gradients that of the loss after the step; returns the loss."""
        moments = self._engine.moments(self._params)
        inputs = inputs_of([moments[p.name] for p in self._params], self._losses, self._sigmas)
        sigmas = nets(inputs)
        common = normaliser(sigmas.detach(), self._counts)
        factors = (sigmas.detach() * common).tolist()
        by_name = dict(zip([p.name for p in self._params], factors, strict=True))
        first, second = (self._loss_at(step, sign * self._eps, by_name, batch) for sign in (1.0, -1.0))
        self._losses, self._sigmas = [first, second], sigmas.detach().tolist()
        slope = (first - second) / (2.0 * self._eps)
        # Through the step's size alone: its slope counts as given, and so does the normalisation.
        size = -self._learning.lr_step * slope
        after = self._loss_at(step, size, by_name, batch, backward=True)
        by_factor = torch.tensor([self._along_noise(p, step) for p in self._params], dtype=torch.float64)
        (sigmas * (by_factor * size * common)).sum().backward()
        for param in self._params:
            param.param.grad = None
        return after

    def _loss_at(
        self, step: int, size: float, factors: dict[str, float], batch: Batch, backward: bool = False
    ) -> float:
        """The mean loss at weights shifted by `size * factor * z`; with `backward`, gradients are left."""
        shifts = Shifts(self._noise, step, size, factors)
        probe = Probe(0, 1.0, frozenset(p.name for p in self._params))
        spans = self._engine.spans(self._params)
        with (
            ShardPerturbation(shifts, self._engine.publish).shifted(spans, probe),
            torch.set_grad_enabled(backward),
        ):
            loss = row_loss_mean(self._row_loss, self._engine, batch)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

    def _along_noise(self, param: Param, step: int) -> float:
        grad = param.param.grad
        if grad is None:
            return 0.0
        z = torch.zeros(param.numel, device=grad.device)
        self._noise.accumulate(z, param.name, step, [(0, 1.0)], 0)
        return float(torch.dot(z.double(), grad.reshape(-1).double()))


def row_loss_mean(row_loss: RowLoss, engine: Engine, batch: Batch) -> Tensor:
    """The mean loss of a batch's rows, or of their tokens."""
    out = row_loss(engine.module, batch)
    return out[0].sum() / out[1].sum() if isinstance(out, tuple) else out.mean()


def _restore(params: Sequence[Param], start: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for param, weight in zip(params, start, strict=True):
            param.param.copy_(weight)


def require_one_process(engine: Engine) -> None:
    if engine.num_ranks > 1:
        raise ValueError(f"a scale is learnt by one process that holds the model, not by {engine.num_ranks}")
