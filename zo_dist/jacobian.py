"""Directions of earlier steps, written again by how the model's outputs changed along them: PseuZO.

Of each step's directions it is kept how the outputs of the loss function (`Composite`) changed; with what
the loss makes of outputs now, that is a slope for today, without a forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zo_dist.anchor import Anchored
from zo_dist.coefficients import Coefficients, Raw
from zo_dist.estimators import Estimator
from zo_dist.part import Part
from zo_dist.rules import Rule
from zo_dist.steering import Steering
from zo_dist.trajectory import StepRecord

# By the published code: decay / (1 + 10 t) in epoch t, and nothing after epoch 10.
_FALL, _LAST_EPOCH = 10.0, 10


@dataclass(frozen=True, kw_only=True, slots=True)
class JacobianWindow:
    """Which earlier steps are written again: PseuZO (NeurIPS 2025). What it does is in `Jacobian`.

    `window`: how many steps count, this one among them, at least 1, which is this one alone. `decay` in
    [0, 1]: how much a step counts, as a share of the one after it, at first. `epoch`: after so many steps
    `decay` falls, to `decay / (1 + 10 t)` in epoch t, and to 0 after epoch 10; None: it stays. `cycle`: after
    so many steps all that begins anew, with an empty window; None: never.
    """

    window: int = 14
    decay: float = 1.0
    epoch: int | None = None
    cycle: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1, which is this step alone")
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie in [0, 1]")
        for name in ("epoch", "cycle"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null")


@dataclass(frozen=True, slots=True)
class Kept:
    """A step in the window. `factors`: what its noise was multiplied by, of each parameter (1 if absent)."""

    record: StepRecord
    factors: Mapping[str, float]

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def width(self) -> int:
        """Of its loss function; 0 of one that is its own output."""
        return len(self.record.changes[0]) if self.record.changes else 0

    @property
    def changes(self) -> Sequence[tuple[float, ...]]:
        """By direction; of a loss that is its own output the coefficients."""
        return self.record.changes or [(coef,) for coef in self.record.coefs]


# Of an earlier step, what is written in each arm that it drew: `(direction, scale)`.
Again = tuple[Kept, dict[int, list[tuple[int, float]]]]


class Jacobian(Part):
    """The window of a run.

    A step whose loss is l(o), of outputs o, writes with its own terms, for each of the `window - 1` steps
    before it, at place a = 1, 2, ... among these, the newest first, and for each of their directions z, in
    the arms that were drawn for it, each weighed as it was then,

        decay**a share <G, J z> z     G: the mean over rows of l's gradient by o, now
                                      J z: the mean over z's rows of what o changed by along it, per length
                                      share: of the rows of its step, those that tested z

    With TwoSided G is the mean over both sides, which is that between them up to order eps**2; with OneSided
    it is taken at the weights. A loss function that is no `Composite` is its own output, so that G is 1:
    earlier estimates are added as they were. Steps that are skipped, and those of a projection's search, have
    no place in the window. An arm that the window drew is written, its moments and weight decay with it,
    whether this step drew it or not.

    Cost: no forward; `2 width` more float64 per side of a direction and rank in the sum over ranks, and one
    in the counts of rows; a write, which is not fused, of all arms that the window drew, with a noise pass
    of each of its directions in the arms that this one drew; nothing beside weights.

    Where we differ: the published code (YangBigMn/PseuZO, af8da78) takes the last hidden states for o, and
    multiplies row r of this batch with row r of earlier ones, position by position. Rows of two batches have
    nothing to do with each other: here it is the mean over all ways to pair them, which takes a sum over
    rows of each output, on any number of ranks, in place of rows x tokens x width kept on each. A step's own
    term is `<G, J z>` at the weights there; here it is the difference of losses, the same up to order eps,
    so that estimator and sampler are as without, and a window of 1 is MeZO. Where its decay is 0 it goes over
    to two sides; here the estimator stays.
    """

    def __init__(self, window: JacobianWindow | None = None) -> None:
        # 0: it is not used. Numbers, so that logs name them.
        self.window, self.decay, self.epoch, self.cycle = 0, 0.0, 0, 0
        if window is not None:
            self.window, self.decay = window.window, window.decay
            self.epoch, self.cycle = window.epoch or 0, window.cycle or 0
        # The newest first.
        self.kept: list[Kept] = []

    @property
    def used(self) -> bool:
        return self.window > 0

    def require(
        self,
        estimator: Estimator,
        coefficients: Coefficients,
        rule: Rule,
        steering: Steering,
        anchor: Anchored,
        conservative: bool,
    ) -> None:
        """Raise ValueError for parts that do not go with it."""
        if not self.used:
            return
        but = "there is a jacobian, which writes directions of earlier steps again"
        if type(coefficients) is not Raw:
            raise ValueError(
                f"{but}, by slopes, but coefficients is {type(coefficients).__name__}: set it to Raw (raw), "
                "or leave out the jacobian"
            )
        if math.isfinite(estimator.clip_rows):
            raise ValueError(
                f"{but}, but clip_rows is {estimator.clip_rows}, and outputs are not cut: leave out one of "
                "them"
            )
        if steering.used:
            raise ValueError(
                f"{but}, but there is a {steering.setting}, with which they would be others by now: leave "
                "out one of them"
            )
        if rule.factored:
            raise ValueError(
                f"{but}, but factored is true, and their right sides may be others: set factored to false, "
                "or leave out the jacobian"
            )
        if anchor.every:
            raise ValueError(
                f"{but}, and an anchor too, whose steps are not of these rows alone: leave out one of them"
            )
        if conservative:
            raise ValueError(
                f"{but}, but conservative is true, and trials lie along what a step's own directions write: "
                "leave out the jacobian, or set conservative to false"
            )

    def share(self, step: int) -> float:
        """`decay` in a step."""
        epoch = (step % self.cycle if self.cycle else step) // self.epoch if self.epoch else 0
        return self.decay / (1.0 + _FALL * epoch) if epoch <= _LAST_EPOCH else 0.0

    def require_width(self, width: int) -> None:
        """Raise ValueError if the loss function has other outputs than that of the steps in the window."""
        before = {kept.width for kept in self.kept} - {width}
        if before:
            raise ValueError(
                f"the loss function has {width} outputs, but that of the steps in the window had "
                f"{before.pop()} (0: it is no Composite): a run with a jacobian keeps to one loss function"
            )

    def of_outputs(
        self, sums: Tensor, shares: Tensor, estimator: Estimator, eps: float
    ) -> tuple[list[float], list[list[float]]]:
        """`gradient` and `changes` of a record; empty where no outputs are told.

        `sums`: float64 `[directions, sides, 2 + 2 width]`, of `StepProbes`: loss, weight, outputs, and
        derivatives of the loss by these. `shares`: `[directions]`, of the step's rows.
        """
        width = (sums.shape[-1] - 2) // 2
        if not width:
            return [], []
        weights, outputs, slopes = sums[..., 1:2], sums[..., 2 : 2 + width], sums[..., 2 + width :]
        means = torch.where(weights == 0.0, 0.0, outputs / weights)
        changes = (means[:, 0] - means[:, 1]) / estimator.distance(eps) * shares[:, None]
        least = min(map(abs, estimator.signs))
        middle = [side for side, sign in enumerate(estimator.signs) if abs(sign) == least]
        gradient = slopes[:, middle].sum((0, 1)) / weights[:, middle].sum()
        return gradient.tolist(), changes.tolist()

    def again(self, record: StepRecord) -> list[Again]:
        """What a step writes of those before it, the newest first."""
        found, times = [], 1.0
        share = self.share(record.step)
        for kept in self._before(record.step):
            times *= share
            if not times:
                break
            gradient = record.gradient or (1.0,)
            slopes = [
                times * math.fsum(g * c for g, c in zip(gradient, changes, strict=True))
                for changes in kept.changes
            ]
            found.append((kept, replace(kept.record, coefs=tuple(slopes)).terms))
        return found

    def finite(self, record: StepRecord) -> bool:
        """Is all that a step writes of those before it fit to be written?"""
        scales = (scale for _, arms in self.again(record) for of in arms.values() for _, scale in of)
        return all(map(math.isfinite, scales))

    def earlier(
        self, again: Sequence[Again], arm: int, name: str
    ) -> list[tuple[int, list[tuple[int, float]]]]:
        """What is added of earlier steps in a parameter of an arm, of `again`: steps, and terms of each."""
        return [
            (kept.step, [(d, scale * kept.factors.get(name, 1.0)) for d, scale in terms[arm]])
            for kept, terms in again
            if arm in terms
        ]

    def observe(self, record: StepRecord, factors: Mapping[str, float]) -> None:
        """Take a step into the window."""
        if not self.used:
            return
        new = Kept(record, dict(factors))
        self.kept = [new, *self._before(record.step)][: self.window - 1] if self.share(record.step) else []

    def _before(self, step: int) -> list[Kept]:
        """Those in the window of a step: of the same cycle."""
        cycle = self.cycle or math.inf
        return [kept for kept in self.kept if kept.step // cycle == step // cycle][: self.window - 1]

    def state_dict(self) -> dict[str, Any]:
        kept = [{**one.record.state, "factors": dict(one.factors)} for one in self.kept]
        return {"kept": kept} if self.used else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the saved state of the jacobian holds {sorted(state) or 'nothing'}, this one's "
                f"{sorted(self.state_dict()) or 'nothing'}: it is of a run with another jacobian"
            )
        self.kept = [Kept(StepRecord.of_state(one), dict(one["factors"])) for one in state.get("kept", ())]
