"""A point to compare with: its weights, and an estimate of the gradient there that serves for some steps.

SVRG with slopes for gradients (MeZO-SVRG, arXiv 2404.08080). No estimate is stored: it is the directions of
an earlier step and what each is multiplied by, and its noise is drawn again wherever it is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_dist.coefficients import Coefficients, Raw
from zo_dist.curvature import Curvature
from zo_dist.engines import Engine
from zo_dist.noise import Noise
from zo_dist.params import Param, Span
from zo_dist.part import Part
from zo_dist.rules import Rule
from zo_dist.samplers import Dense, Draw
from zo_dist.scale import cut
from zo_dist.trajectory import StepRecord

# Elements that are exchanged with the anchor's at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """When an anchor is dropped: MeZO-SVRG (arXiv 2404.08080). Costs are those of `Anchored`.

    `every`: steps from one anchor to the next (q in the paper), at least 1, which is no anchor. `directions`:
    how many an anchor step tests, over all ranks; None: as many as any other. `lr_ratio` >= 0: the learning
    rate of an anchor step over that of the others (eta1 / eta2 in the paper).
    """

    every: int
    directions: int | None = None
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1")
        if self.directions is not None and self.directions < 1:
            raise ValueError(f"directions is {self.directions}; it must be at least 1, or null")
        if not 0.0 <= self.lr_ratio < math.inf:
            raise ValueError(f"lr_ratio is {self.lr_ratio}; it must be finite and at least 0")


class Anchored(Part):
    """The anchor of a run.

    An anchor step is a plain step whose directions draw all arms. The weights before its write, and what it
    wrote (`record`), are kept. Any other step, of directions z with arms of weight a and length l, tests the
    same rows and the same z at the anchor too, and writes in each of its drawn arms

        sum_d share_d (g_d(w) - g_d(anchor)) a_d z_d  +  (mean_d a_d l_d) sum_k scale_k z_{anchor step, k}

    Over the draws, the mean of both sums is the share that the sampler gives an arm (1 where its weights are
    unbiased) of `G(w) - G(anchor) + the anchor's estimate`. The whole second sum in every arm, drawn or not,
    would outweigh the first under `Uniform` and a clipped bandit. A sampler does not learn from anchor steps,
    whose slopes are of all arms at once; from others it learns by the slopes at w, which are those of the
    record. An anchor step that is skipped, because a loss is not finite, is tried again in the next one.

    Cost: the weights once more, in their own dtype, sharded and on the device as they are. In every step but
    anchor steps: twice the forwards, and so two gathers of each weight; four readings and writings of all
    trained weights, which are exchanged with the anchor's and back; a noise pass more in each drawn arm for
    each of the anchor's directions, in a write that is not fused; 32 bytes more per direction and rank.

    Where we differ: the published code compares two different directions, and its anchor is the list of live
    parameters, so that both points are the same one. Its clipping and its annealing of both learning rates
    are not here.
    """

    def __init__(self, anchor: Anchor | None = None) -> None:
        # 0: there is none.
        self.every, self.directions, self.lr_ratio = 0, 0, 1.0
        if anchor is not None:
            self.every, self.directions, self.lr_ratio = anchor.every, anchor.directions or 0, anchor.lr_ratio
        self.sampler = Dense()
        # What the anchor step wrote: nothing yet. Its noise had these factors.
        self.record = StepRecord(-1, 0.0)
        self._factors: dict[str, float] = {}
        # By canonical name, flat: what this rank holds.
        self.weights: dict[str, Tensor] = {}

    def require(self, coefficients: Coefficients, rule: Rule, curvature: Curvature) -> None:
        """Raise ValueError for parts that do not go with an anchor."""
        if not self.every:
            return
        if type(coefficients) is not Raw:
            raise ValueError(
                f"coefficients is {type(coefficients).__name__}, but with an anchor it must be Raw (raw): a "
                "step adds the difference of slopes at two points to the estimate at one of them, and that "
                "is an estimate of the gradient only where coefficients are the slopes"
            )
        if rule.factored:
            raise ValueError(
                "factored is true, but there is an anchor too, and its estimate may be of another right side "
                "than the step's: set factored to false, or leave out the anchor"
            )
        if curvature.used:
            raise ValueError(
                "there is a curvature, and an anchor too, whose estimate was made with another: leave out "
                "one of them"
            )

    def bind(self, sizes: Sequence[int], noise: Noise, directions: int) -> None:
        """Called once, by `ZeroOrder`."""
        if self.every:
            self.directions = self.directions or directions
            self.sampler.bind(sizes, noise)

    def begin(self, spans: Sequence[Span]) -> None:
        """Make room for the anchor's weights: called once, by `ZeroOrder`."""
        if self.every:
            self.weights = {span.name: span.flat.clone() for span in spans}

    def due(self, step: int) -> bool:
        """Is this an anchor step? The training loop gives it more rows."""
        return bool(self.every) and (not self.record.arms or step - self.record.step >= self.every)

    def drop(self, record: StepRecord, factors: Mapping[str, float], spans: Sequence[Span]) -> None:
        """Keep the weights, which `record` has not been written to yet, and what it says of them."""
        self.record, self._factors = record, dict(factors)
        for span in spans:
            self.weights[span.name].copy_(span.flat)

    @contextmanager
    def in_place(self, engine: Engine, params: Sequence[Param]) -> Iterator[None]:
        """Forwards inside see the anchor's weights; on leaving, also by an exception, the run's are back."""
        spans = engine.spans(params)
        self._exchange(engine, spans)
        try:
            yield
        finally:
            self._exchange(engine, spans)

    def _exchange(self, engine: Engine, spans: Sequence[Span]) -> None:
        for span in spans:
            pieces = torch.split(span.flat, _CHUNK), torch.split(self.weights[span.name], _CHUNK)
            for here, there in zip(*pieces, strict=True):
                kept = here.clone()
                here.copy_(there)
                there.copy_(kept)
        engine.publish()
        # Inside a user's autocast region torch would go on using its 16-bit copy of the other weights.
        torch.clear_autocast_cache()

    def terms(self, record: StepRecord, draws: Sequence[Draw]) -> dict[int, list[tuple[int, float]]]:
        """What a step adds of the anchor's estimate, for each arm it drew: as `StepRecord.terms`."""
        if not self.every or record.step == self.record.step:
            return {}
        weights: dict[int, list[float]] = {}
        for draw in draws:
            for arm, weight, length in zip(draw.arms, draw.weights, draw.lengths, strict=True):
                weights.setdefault(arm, []).append(weight * length)
        # Cut as factors are: a replay makes them again, perhaps with another machine's exponentials.
        means = {arm: cut(math.fsum(of) / len(draws)) for arm, of in weights.items()}
        mine = self.record.terms
        return {arm: [(d, mean * scale) for d, scale in mine[arm]] for arm, mean in means.items()}

    def earlier(
        self, terms: Sequence[tuple[int, float]], name: str, factor: float
    ) -> list[tuple[int, list[tuple[int, float]]]]:
        """The anchor's step and what of `terms` is added in a parameter that is perturbed by `factor`.

        `factor` squared goes with its gradient in any step; the anchor's scales have one of theirs in them.
        """
        if not terms:
            return []
        again = factor * factor / self._factors.get(name, 1.0)
        return [(self.record.step, [(d, coef * again) for d, coef in terms])]

    def state_dict(self) -> dict[str, Any]:
        if not self.every:
            return {}
        return self.record.state | {"factors": dict(self._factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the saved state of the anchor holds {sorted(state) or 'nothing'}, this one's "
                f"{sorted(self.state_dict()) or 'nothing'}: it is of a run with another anchor"
            )
        if state:
            self.record = StepRecord.of_state(state)
            self._factors = dict(state["factors"])
