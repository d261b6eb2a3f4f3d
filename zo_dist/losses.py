"""From what a step draws to its losses: at the weights, at an anchor, and at writes that are tried first."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from zo_dist.clock import Clock
from zo_dist.coefficients import Coefficients
from zo_dist.jacobian import Jacobian
from zo_dist.params import evaluating
from zo_dist.parts import Shifts
from zo_dist.perturb import ModulePerturbation, ShardPerturbation
from zo_dist.prefix import PrefixUnsafeError
from zo_dist.probes import StepProbes
from zo_dist.projection import NO_ARMS, Projected
from zo_dist.samplers import Draw, Sampler
from zo_dist.scale import Scale
from zo_dist.startup import Startup
from zo_dist.trajectory import StepRecord
from zo_dist.trials import Trials

log = logging.getLogger(__name__)


class Losses(Startup):
    """The part of `ZeroOrder` that asks the model for the losses of a step."""

    sampler: Sampler
    coefficients: Coefficients
    scale: Scale
    jacobian: Jacobian
    # Of each parameter, by `scale`, in the step at hand.
    factors: dict[str, float]
    # Which may run once for all probes, and the names of parameters that run before them.
    layers: list[nn.Module]
    before_layers: set[str]
    clock: Clock

    def _way(self, step: int) -> Losses | Projected:
        """Whose directions, eps, estimator and coefficients a step has."""
        return self.projection if self.projection.due(step) else self

    def _meet(self, step: int, directions: int) -> list[Draw]:
        """Settle what a step tests, and return its draws: the same on every rank. A collective."""
        self.factors = self.scale.factors(self.engine)
        if self.projection.due(step):
            self.projection.aim(step, self.engine, self.noise)
            return [NO_ARMS] * directions
        return self._draws(step, directions)

    def _draws(self, step: int, directions: int) -> list[Draw]:
        sampler = self.anchor.sampler if self.anchor.due(step) else self.sampler
        return [sampler.draw(step, d) for d in range(directions)]

    def _points(self, evaluate: Callable[[StepProbes], Tensor], draws: list[Draw], step: int) -> Tensor:
        """The sums at the weights and, in a step that is compared with an anchor, those at the anchor."""
        sums = [self._sums(evaluate, draws, step)]
        if self.anchor.every and not self.anchor.due(step):
            with self.anchor.in_place(self.engine, self.params):
                sums.append(self._sums(evaluate, draws, step))
        return torch.stack(sums)

    def _sums(
        self,
        evaluate: Callable[[StepProbes], Tensor],
        draws: list[Draw],
        step: int,
        trial: tuple[Trials, float] | None = None,
    ) -> Tensor:
        """`trial`: where else probes lie, in which lengths."""
        try:
            return evaluate(self._probes(draws, step, trial))
        except PrefixUnsafeError as unsafe:
            # The same on every rank: it depends on the model and on the arms of all directions.
            if unsafe.owner is None:
                log.info("no shared prefix for this model: %s", unsafe)
                self.layers = []
            else:
                log.info("no shared prefix in steps that draw these weights: %s", unsafe)
                owned = [p.name for p in self.params if any(o.module is unsafe.owner for o in p.owners)]
                self.before_layers.update(owned)
            return evaluate(self._probes(draws, step, trial))

    def _probes(self, draws: list[Draw], step: int, trial: tuple[Trials, float] | None) -> StepProbes:
        if self.projection.due(step):
            return self.projection.probes(self.engine)
        estimator, eps = trial or (self.estimator, self.eps)
        drawn = [[p for arm in d.arms for p in self.arms[arm].params] for d in draws]
        lengths = {
            (direction, p.name): length
            for direction, draw in enumerate(draws)
            for arm, length in zip(draw.arms, draw.lengths, strict=True)
            for p in self.arms[arm].params
        }
        perturbation: ModulePerturbation | ShardPerturbation
        of_step = self.noise, step, eps, self.factors, self.mask, self.steering, lengths
        shifts = Shifts(*of_step, self.clock)
        if self.perturb == "module":
            union = {p.name: p for params in drawn for p in params}
            shared = [] if union.keys() & self.before_layers else self.layers
            perturbation = ModulePerturbation(self.engine.here(union.values()), shifts, shared)
        else:
            perturbation = ShardPerturbation(shifts, self.engine.publish)
        tests = drawn, self.directions_per_row, estimator, eps, perturbation
        return StepProbes(self.engine, *tests, outputs=self.jacobian.used)

    def _tried(
        self, trials: Trials, evaluate: Callable[[StepProbes], Tensor], draws: list[Draw], record: StepRecord
    ) -> StepRecord:
        """`record` with what of each direction is best: its part of the write, the opposite, or nothing."""
        # What the write multiplies noise by, in place of the lengths of the probe.
        writes = [replace(draw, lengths=scales) for draw, scales in zip(draws, record.scales, strict=True)]
        with evaluating(self.engine.module):
            with self.clock.on("forward"):
                of_rank = self._sums(evaluate, writes, record.step, (trials, record.lr))
            with self.clock.on("agree"):
                sums = self.engine.reduce(of_rank, record)
        kept = zip(record.coefs, trials.kept(means(sums)), strict=True)
        return replace(record, coefs=tuple(coef * times for coef, times in kept))


def means(sums: Tensor) -> Tensor:
    """Mean losses, of `[..., 2]` sums of losses and weights, and of more columns.

    A direction whose rows all weigh nothing (no labels) has no slope, and no share in the step.
    """
    return torch.where(sums[..., 1] == 0.0, 0.0, sums[..., 0] / sums[..., 1])
