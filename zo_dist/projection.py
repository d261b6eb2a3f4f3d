"""Projections: now and then each weight goes some of its way back to where it began, or further on.

DiZO (arXiv 2502.03304). How far is one number for each parameter, the length of what was learnt over what it
was before, and these are searched for by zeroth-order steps of their own, in which no weight is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from zo_dist.anchor import Anchored
from zo_dist.coefficients import Raw
from zo_dist.engines import Engine
from zo_dist.estimators import Estimator, TwoSided
from zo_dist.noise import Noise
from zo_dist.params import Param, Runs, Span
from zo_dist.part import Part
from zo_dist.parts import Probe
from zo_dist.perturb import ShardPerturbation
from zo_dist.probes import StepProbes
from zo_dist.rounding import Rounding16
from zo_dist.runs import in_runs
from zo_dist.samplers import Draw
from zo_dist.trajectory import StepRecord

# Elements at a time: they are widened to float64.
_CHUNK = 1 << 20
# A square, of at most 2**10, is a whole number of 2**-30 and one of 2**-70: sums of a chunk stay below 2**63.
_HIGH, _LOW = 30, 40
# The sum of a whole weight's is sent in so many parts of 32 bits, which are exact in a float64.
_LIMBS = 4
# A normal is a multiple of this: other machines, with functions of their own, have the same.
_GRAIN = 2.0**-12

# What the one direction of a search is drawn from: ratios, no arms.
NO_ARMS = Draw((), (), ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """When and how weights are projected: DiZO (arXiv 2502.03304). Costs are those of `Projected`.

    `every`: steps from one projection to the next, at least 1 (50 to 400 there). `iterations`: steps that
    search for a projection. `eps` > 0, `lr` >= 0: of the search. `clip` in [0, 1): by what share the distance
    of a parameter may change; at 0 searches do nothing. `parameters`: a regular expression searched in
    canonical names, of what is projected; None for all. The default is what the published code projects of
    OPT, and as much of Llama. `on_cpu`: keep the starting weights in CPU memory.
    """

    every: int
    iterations: int = 10
    eps: float = 0.1
    lr: float = 2.0
    clip: float = 0.2
    parameters: str | None = r"self_attn\.[kv]_proj\.weight$"
    on_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps}; it must be finite and above 0 (0.1 is usual)")
        if not 0.0 <= self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be finite and at least 0")
        if not 0.0 <= self.clip < 1.0:
            raise ValueError(f"clip is {self.clip}; it must lie in [0, 1)")
        try:
            re.compile(self.parameters or "")
        except re.error as error:
            raise ValueError(f"parameters is {self.parameters!r}, no regular expression: {error}") from error


class Projected(Part):
    """The projections of a run.

    After `every` steps come `iterations` of another kind. With w0 the starting weights of a parameter, t its
    distance |w - w0| and r a ratio, at first 1, such a step has the losses L+ and L- at
    `w0 + (r +- u) (w - w0)`, of all parameters at once, and

        u = clamp(eps z / t, -clip, clip)          z normal, one for each parameter and step
        g = (L+ - L-) / (2 eps)
        r <- clamp(r - lr g u t / eps, 1 - clip, 1 + clip)

    The last writes `w0 + r (w - w0)`. A step that is skipped, because a loss is not finite, is taken again. A
    run that ends within a search does without it. Sampler, coefficients, rule and scale do not see these
    steps; a record of one has a slope, and no arms. Distances are roots of sums of whole numbers, the same
    bits for any sharding, and with the slopes in the log they are all that a replay needs.

    Cost: the starting weights of what is projected, in their dtype, sharded as they are; in a search a copy
    of its shards, and two forwards for each step, one after another whatever `perturb` is, as shards are
    shifted in place on any engine; for each projection a collective of 32 bytes per parameter and `holders`.

    Where we differ: a step of the search counts as a step, with rows of its own, and a mask does not bind
    it. Weights of 16 bits that moved by a few of their own steps are hardly shifted in probes; the write is
    rounded as any other.
    """

    directions = directions_per_row = 1

    def __init__(self, projection: Projection | None = None) -> None:
        # 0: there are none.
        self.every, self.iterations, self.eps, self.lr, self.clip = 0, 0, 1.0, 0.0, 0.0
        self.parameters, place = "", None
        if projection is not None:
            self.every, self.iterations = projection.every, projection.iterations
            self.eps, self.lr, self.clip = projection.eps, projection.lr, projection.clip
            self.parameters = projection.parameters or ""
            place = torch.device("cpu") if projection.on_cpu else None
        self._place = place
        self.estimator, self.coefficients = TwoSided(), Raw()
        # Steps of the search that were taken, and the step after the last one of the search before.
        self.counts = {"taken": 0, "ended": 0}
        # By canonical name. `shifts`: of the ratio, in the step at hand.
        self.distances: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.shifts: dict[str, float] = {}
        # What is projected, and where it began: flat, what this rank holds.
        self.params: list[Param] = []
        self.weights: dict[str, Tensor] = {}

    @property
    def on_cpu(self) -> bool:
        return self._place is not None

    def require(self, anchor: Anchored, estimator: Estimator) -> None:
        """Raise ValueError for parts that do not go with a projection."""
        if self.every and math.isfinite(estimator.clip_rows):
            raise ValueError(
                f"there is a projection, whose searches clip no rows; clip_rows is {estimator.clip_rows}: "
                "leave out one of them"
            )
        if self.every and anchor.every:
            raise ValueError(
                "there is a projection, and an anchor too, which would be due in the middle of a search: "
                "leave out one of them"
            )

    def begin(self, spans: Sequence[Span], params: Sequence[Param]) -> None:
        """Keep the weights as they are: called once, by `ZeroOrder`. ValueError if none is projected."""
        if not self.every:
            return
        self.params = [param for param in params if re.search(self.parameters, param.name)]
        if not self.params:
            raise ValueError(
                f"projection.parameters is {self.parameters!r}, which no name of a trained parameter has "
                f"(one is {params[-1].name}): name some of them, or give null for all"
            )
        names = {param.name for param in self.params}
        # Weights without values, of a plan, stay where they are.
        self.weights = {
            span.name: span.flat.to(None if span.flat.is_meta else self._place, copy=True)
            for span in spans
            if span.name in names
        }

    def due(self, step: int) -> bool:
        """Is this a step of a search?"""
        return bool(self.every) and (self.counts["taken"] > 0 or step - self.counts["ended"] >= self.every)

    def aim(self, step: int, engine: Engine, noise: Noise) -> None:
        """Choose what a step of the search tests. The first measures distances: a collective."""
        if not self.counts["taken"]:
            self.distances = self._measured(engine)
            self.ratios = dict.fromkeys(self.distances, 1.0)
        for name, distance in self.distances.items():
            # Of a stream of its own, whatever the law of the noise.
            (uniform,) = noise.uniforms(f"{name}\0projection", step, 0, 1)
            z = round(NormalDist().inv_cdf(uniform + 2.0**-54) / _GRAIN) * _GRAIN
            shift = self.eps * z / distance if distance else 0.0
            self.shifts[name] = min(max(shift, -self.clip), self.clip)

    def probes(self, engine: Engine) -> StepProbes:
        """The two sides of the step at hand."""
        shifted = ShardPerturbation(self, engine.publish)
        return StepProbes(engine, [self.params], 1, self.estimator, self.eps, shifted)

    def copies(
        self,
        outs: Sequence[Tensor],
        flat: Tensor,
        name: str,
        probes: Sequence[Probe],
        offset: int = 0,
        runs: Runs | None = None,
    ) -> None:
        """As `Shifts.copies`, of a whole span: at `probes` of the search."""
        for piece, exact, delta in self._pieces(name, flat):
            for out, probe in zip(outs, probes, strict=True):
                by = self.ratios[name] - 1.0 + probe.sign * self.shifts[name]
                out[piece] = exact + delta * by

    def observe(self, record: StepRecord, engine: Engine, rounding: Rounding16) -> None:
        """Learn from a step of the search; the last of them writes."""
        (slope,) = record.slopes
        low, high = 1.0 - self.clip, 1.0 + self.clip
        for name, shift in self.shifts.items():
            z = shift * self.distances[name] / self.eps
            self.ratios[name] = min(max(self.ratios[name] - self.lr * slope * z, low), high)
        if self.count(record.step):
            for span in engine.spans(self.params):
                # A ratio of 1 leaves the bits, also those of -0.
                if self.ratios[span.name] != 1.0:
                    self._write(span, record.step, rounding)
            engine.publish()

    def count(self, step: int) -> bool:
        """A step of the search has been taken; was it the last?"""
        self.counts["taken"] += 1
        ends = self.counts["taken"] == self.iterations
        if ends:
            self.counts.update(taken=0, ended=step + 1)
        return ends

    def _write(self, span: Span, step: int, rounding: Rounding16) -> None:
        noise = in_runs(rounding.noise, span.offset, span.runs)
        for piece, exact, delta in self._pieces(span.name, span.flat):
            lost = rounding.lost_of(span.name, piece.start, len(exact))
            new = exact + delta * (self.ratios[span.name] - 1.0)
            if lost is not None:
                new += lost
            rounding.write(span.flat[piece], new, lost, span.name, step, span.offset + piece.start, noise)

    def _measured(self, engine: Engine) -> dict[str, float]:
        """How far each projected weight is from where it began, by name. A collective."""
        squares = {
            span.name: sum(_square_sum(delta) for _, _, delta in self._pieces(span.name, span.flat))
            for span in engine.spans(self.params)
        }
        limbs = {name: [of >> 32 * i & 0xFFFFFFFF for i in range(_LIMBS)] for name, of in squares.items()}
        totals = engine.add_up(self.params, limbs, _LIMBS)
        whole = {name: sum(limb << 32 * i for i, limb in enumerate(of)) for name, of in totals.items()}
        return {name: math.sqrt(total) * 2.0 ** (-(_HIGH + _LOW) // 2) for name, total in whole.items()}

    def _pieces(self, name: str, flat: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of a span of a weight: which elements, these in float32, and how far they are from the start."""
        for start in range(0, len(flat), _CHUNK):
            piece = slice(start, min(start + _CHUNK, len(flat)))
            exact = flat[piece].to(torch.float32)
            yield piece, exact, exact - self.weights[name][piece].to(exact.device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        if not self.every:
            return {}
        return {"counts": dict(self.counts), "distances": dict(self.distances), "ratios": dict(self.ratios)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"the saved state of projections holds {sorted(state) or 'nothing'}, this one's "
                f"{sorted(self.state_dict()) or 'nothing'}: it is of a run with another projection"
            )
        if state:
            self.counts, self.distances, self.ratios = (
                dict(state[key]) for key in ("counts", "distances", "ratios")
            )


def _square_sum(delta: Tensor) -> int:
    """The sum of squares of float32 `delta` in units of 2**-70: a whole number, whatever the order.

    Elements beyond 32 count as 32.
    """
    squares = delta.to(torch.float64).clamp_(-32.0, 32.0).square_().mul_(2.0**_HIGH)
    whole = squares.floor()
    rest = ((squares - whole) * 2.0**_LOW).round()
    return (int(whole.to(torch.int64).sum()) << _LOW) + int(rest.to(torch.int64).sum())
