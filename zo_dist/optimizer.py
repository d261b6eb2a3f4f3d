"""The step. Open this file first: `ZeroOrder._step` is the whole algorithm."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zo_dist.anchor import Anchor, Anchored
from zo_dist.carried import Carried, PerturbationMomentum
from zo_dist.clock import Clock
from zo_dist.coefficients import Coefficients, Raw
from zo_dist.curvature import Curvature, DiagonalCurvature
from zo_dist.engines import select
from zo_dist.estimators import Estimator, ThreeSided, TwoSided
from zo_dist.jacobian import Jacobian, JacobianWindow
from zo_dist.laws import Law
from zo_dist.losses import Losses, means
from zo_dist.mask import Mask, SmallWeights
from zo_dist.params import Arm, evaluating, find_layers, group_arms, trainable_params
from zo_dist.probes import (
    Batch,
    Closure,
    RowLoss,
    StepProbes,
    closure_sums,
    count_rows,
    require_groups,
    width_of,
)
from zo_dist.projection import Projected, Projection
from zo_dist.rounding import Rounding, Rounding16
from zo_dist.rules import SGD, Rule
from zo_dist.samplers import Dense, Draw, Sampler
from zo_dist.scale import Scale
from zo_dist.steering import steering_of
from zo_dist.structure import Structure, noise_of
from zo_dist.trajectory import StepRecord, TrajectoryError
from zo_dist.trials import Trials, require_fine_weights, require_trials
from zo_dist.update import Terms, Write, update_span

Perturb = Literal["module", "shard"]

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a loss that is not a number; nothing was written by them."""


class ZeroOrder(Losses):
    """Fine-tunes a model, sharded or not, with forward passes only.

    A step draws arms for each direction, evaluates the loss at `weights +- eps * noise`, lets the
    ranks agree on the sums (2 float64 per side of a direction and rank), and has each rank write the spans
    it owns. No gradient, no optimizer traffic; a sharded forward still gathers each weight, once
    per step with `step_batch` and `perturb="module"`.

    `model`: an `nn.Module`, DDP, a `fully_shard`-ed module or a DeepSpeed engine; parameters with
    `requires_grad=False` are left alone. `lr`, `eps`: above 0 (`lr` may be 0), as in MeZO.
    `directions`: how many are tested per step, over all ranks; `directions_per_row`: how many of them by each
    row of `step_batch`. `sampler`: which arms each of them draws;
    `estimator`, `coefficients`, `rule`: from losses to slopes, to what counts of them, to the move of the
    weights; `noise`, `structure`, `scale`, `curvature`, `perturbation_momentum`, `mask`: the directions
    themselves; `jacobian`: earlier steps that are written again; `anchor`: a point to compare with;
    `projection`: steps back to the start (docs/methods.md has them all). A `curvature` implies `ThreeSided`.
    `arms`: a regular expression for arms finer than a layer (`params.group_arms`).
    `conservative`: what a direction writes is tried first, by its rows, and kept, turned round or left
    (ZO-SGD-Cons, arXiv 2402.11592); it needs float32 weights, `SGD`, and a second round of three forwards.
    `perturb`: `module` shifts a weight in a scratch copy while the module that owns it runs; `shard` shifts
    the local shards before a forward and restores their bytes after it (sides x directions forwards of
    their rows), for objectives and models that read weights outside the module that owns them.
    `rounding` of writes to 16-bit weights: `stochastic`, `kahan` (2 bytes per parameter) or
    `nearest`. `max_skipped`: steps in a row with a non-finite loss before NonFiniteLossError.
    `self_check`: before the first step, verify that every arm moves the loss and that writes reach
    the next forward. `compile`: fuse noise with its use (see `Noise`), which takes 2 s on a CPU, once, and
    what `torch.compile` takes on a GPU; else it runs eagerly, on a CPU some 30 times slower.

    Raises ValueError, on every rank, for a setting out of range, ranks that disagree on settings or
    starting weights, and models that cannot be trained so (`engines.select`).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        sampler: Sampler | None = None,
        estimator: Estimator | None = None,
        coefficients: Coefficients | None = None,
        rule: Rule | None = None,
        scale: Scale | None = None,
        directions: int = 1,
        directions_per_row: int = 1,
        perturb: Perturb = "module",
        noise: Law = "rademacher",
        structure: Structure | None = None,
        mask: SmallWeights | None = None,
        curvature: DiagonalCurvature | None = None,
        perturbation_momentum: PerturbationMomentum | None = None,
        jacobian: JacobianWindow | None = None,
        anchor: Anchor | None = None,
        arms: str | None = None,
        projection: Projection | None = None,
        conservative: bool = False,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        max_skipped: int = 10,
        self_check: bool = True,
        compile: bool = True,
    ) -> None:
        self.engine = select(model)
        with self.engine.jointly():
            if not (math.isfinite(eps) and eps > 0):
                raise ValueError(f"eps is {eps}; it must be finite and above 0 (1e-3 is usual)")
            if not (math.isfinite(lr) and lr >= 0):
                raise ValueError(f"lr is {lr}; it must be finite and not below 0")
            if perturb not in get_args(Perturb):
                raise ValueError(f"perturb is {perturb!r}; use one of {', '.join(get_args(Perturb))}")
            require_groups(directions, directions_per_row)
            if max_skipped < 0:
                raise ValueError(f"max_skipped is {max_skipped}; it must be at least 0")
            self.params = trainable_params(self.engine.module, self.engine.shape_of, self.engine.piece_of)
            self.arms: list[Arm] = group_arms(self.engine.module, self.params, arms)
            # Emptied when the model turns out to run drawn weights before its layers.
            layers = find_layers(self.engine.module) if self.engine.shares_prefix else []
            self.layers = [layer for _, layer in layers]
            # Names of parameters that run before the layers: a step that draws one shares no prefix.
            self.before_layers: set[str] = set()
            shapes = {p.name: p.shape for p in self.params}
            self.noise = noise_of(noise, seed, compile, structure, shapes)
            self.sampler = sampler or Dense()
            sizes = [arm.numel for arm in self.arms]
            self.sampler.bind(sizes, self.noise)
            self.estimator = estimator or (ThreeSided() if curvature else TwoSided())
            self.coefficients = coefficients or Raw()
            self.coefficients.bind(directions)
            self.rule = rule or SGD()
            self.scale = scale or Scale()
            self.scale.bind(self.arms)
            self.factors: dict[str, float] = {}
            self.mask = Mask(mask)
            self.curvature = Curvature(curvature)
            self.curvature.require(self.estimator, self.scale, self.rule, self.sampler)
            self.anchor = Anchored(anchor)
            self.anchor.require(self.coefficients, self.rule, self.curvature)
            self.perturbation_momentum = Carried(perturbation_momentum)
            others = self.estimator, self.curvature, structure, self.rule, self.anchor, conservative
            self.perturbation_momentum.require(*others)
            self.steering = steering_of(self.perturbation_momentum, self.curvature)
            self.jacobian = Jacobian(jacobian)
            rest = self.rule, self.steering, self.anchor, conservative
            self.jacobian.require(self.estimator, self.coefficients, *rest)
            self.anchor.bind(sizes, self.noise, directions)
            if self.anchor.every:
                require_groups(self.anchor.directions, directions_per_row, "anchor.directions")
            self.projection = Projected(projection)
            self.projection.require(self.anchor, self.estimator)
            self.trials = Trials() if conservative else None
            if self.trials:
                require_trials(self.rule, self.curvature, self.anchor, self.estimator)
                require_fine_weights({p.param.dtype for p in self.params} | self.engine.compute_dtypes)
            self.rounding = Rounding16(rounding, self.noise)
            spans = self.engine.spans(self.params)
            self.rounding.begin(spans)
            if self.rule.factored:
                self.noise.require_factor(self.rule.lasting)
            self.rule.begin([self.noise.factor_span(s) for s in spans] if self.rule.factored else spans)
            self.steering.begin(spans, self.engine.here(self.params), perturb)
            self.anchor.begin(spans)
            self.projection.begin(spans, self.params)
            self.writes, self.written = [0] * len(self.arms), [-1] * len(self.arms)
            self.eps, self.perturb = eps, perturb
            self.directions, self.directions_per_row = directions, directions_per_row
            self.max_skipped, self.self_check, self._prepared = max_skipped, self_check, False
            self.step_count = self.skipped = self.skipped_in_a_row = 0
            self.clock = Clock()
            # What the last step wrote, and a loaded snapshot's step and checksum: nothing yet.
            self.record = StepRecord(-1, lr)
            self.tie: tuple[int, int | None] = 0, None
        self.rule.warn_of_no_decay(lr)
        self.engine.require_equal("the optimizer's settings", self.settings(lr))
        self.mask.bind(self.engine, self.params)
        super().__init__([p.param for p in self.params], {"lr": lr})

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One step; `closure` returns the loss (or the pair sum, weight) and is called once per probe.

        Every rank tests every direction on its own rows: `sides * directions` forwards. Returns the
        mean loss over the probes of all ranks (nan when the step was skipped).
        """
        if closure is None:
            raise ValueError("a zeroth-order step evaluates the loss itself: pass a closure")
        if math.isfinite(self.estimator.clip_rows):
            raise ValueError(
                f"clip_rows is {self.estimator.clip_rows}: rows have losses with step_batch alone"
            )
        if self.directions_per_row > 1:
            raise ValueError(
                f"directions_per_row is {self.directions_per_row}, but with a closure every row tests every "
                "direction: set it to 1, or use step_batch"
            )
        self.jacobian.require_width(0)
        self._prepare(lambda rows: closure_sums(closure)[:1], stacks=False)
        return self._step(lambda probes: probes.by_closure(closure))

    def step_batch(self, batch: Batch | Sequence[Batch], row_loss: RowLoss) -> float:
        """One step on this rank's rows: one stacked forward for all probes of a micro-batch.

        `batch`: a mapping whose tensors have rows along dim 0 (and whose lists have an entry for each), or a
        list of such micro-batches (the same directions, one update). `row_loss(model, batch)` returns one
        loss per row, or the pair (sums, weights) per row; an `Objective` makes one of any score. Rows are
        counted over ranks in rank order, and those of R that have the same
        floor(r * directions / directions_per_row / R) test the same `directions_per_row` directions, each on
        `sides` copies of its own. Returns the mean loss as `step` does.
        """
        batches = [batch] if not isinstance(batch, Sequence) else list(batch)
        per_row = self._way(self.step_count).directions_per_row
        width = width_of(row_loss)
        told = width if self.jacobian.used else None
        first, total, num_forwards = count_rows(self.engine, batches, self.num_directions, per_row, told)
        self.jacobian.require_width(width)
        self.prepare(batches[0], row_loss)
        return self._step(lambda p: p.by_rows(batches, row_loss, first, total, num_forwards))

    @property
    def num_directions(self) -> int:
        """Of the step to come."""
        at_anchor = self.anchor.due(self.step_count)
        return self.anchor.directions if at_anchor else self._way(self.step_count).directions

    @torch.no_grad()
    def _step(self, evaluate: Callable[[StepProbes], Tensor]) -> float:
        step, lr = self.step_count, float(self.param_groups[0]["lr"])
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"lr is {lr} at step {step}; a schedule must keep it finite and at least 0")
        if self.anchor.due(step):
            lr *= self.anchor.lr_ratio
        way, draws = self._way(step), self._meet(step, self.num_directions)
        # torch's schedulers look here for whether a step came before theirs; `step_batch` is one too.
        self._opt_called = True
        with evaluating(self.engine.module):
            with self.clock.on("forward"):
                of_rank = self._points(evaluate, draws, step)
            with self.clock.on("agree"):
                alike = lr, draws, self.record, self.factors, self.projection.shifts
                points = self.engine.reduce(of_rank, alike)
        losses = means(points)
        sums = points[0]
        weights = sums[..., 1].sum(1)
        of_sides = (sums[..., 0].sum(0) / sums[..., 1].sum(0)).tolist()
        slopes, *at_anchor = (way.estimator.slopes(of_point, way.eps) for of_point in losses)
        used = slopes.new_tensor(way.coefficients.of(slopes.tolist())) - sum(at_anchor)
        # Each direction's share of the rows (or tokens): the update is the mean over all rows.
        coefs = used * weights / weights.sum()
        # Most estimators tell none.
        bends = zip(way.estimator.curvatures(losses[0], way.eps).tolist(), weights.tolist(), strict=False)
        of_outputs = self.jacobian.of_outputs(sums, weights / weights.sum(), way.estimator, way.eps)
        told = slopes.tolist(), coefs.tolist(), of_sides[:2], list(bends), *of_outputs
        record = StepRecord.of(step, lr, draws, *told)
        if self.trials and way is self and record.finite and lr:
            record = self._tried(self.trials, evaluate, draws, record)
        # Not before: a step whose loss raised an error has not been, and can be taken again.
        self.record, self.step_count = record, step + 1
        if not (record.finite and (way is not self or self.jacobian.finite(record))):
            return self._skip(step, lr)
        self._finish(self.record, draws)
        return float(sums[..., 0].sum() / sums[..., 1].sum())

    def _finish(self, record: StepRecord, draws: list[Draw]) -> None:
        self.skipped_in_a_row = 0
        if self.projection.due(record.step):
            with self.clock.on("update"):
                self.projection.observe(record, self.engine, self.rounding)
            return
        at_anchor = self.anchor.due(record.step)
        if at_anchor:
            self.anchor.drop(record, self.factors, self.engine.spans(self.params))
        if record.lr:
            with self.clock.on("update"):
                self._write(record, draws)
        self.jacobian.observe(record, self.factors)
        if not at_anchor:
            self.sampler.observe(draws, record.slopes)
        self.coefficients.observe(record.slopes)
        self.scale.observe(record, draws)

    def _write(self, record: StepRecord, draws: list[Draw]) -> None:
        terms, bends = record.terms, self.curvature.bends(record)
        of_anchor, again = self.anchor.terms(record, draws), self.jacobian.again(record)
        parts = self.rule, self.rounding, self.noise
        write = Write(*parts, record.step, record.lr, self.mask, self.steering)
        arms = sorted({*terms, *(arm for _, of_step in again for arm in of_step)})
        params = {p.name: (p, arm) for arm in arms for p in self.arms[arm].params}
        for arm in arms:
            self.writes[arm] += 1
        for span in self.engine.spans([p for p, _ in params.values()]):
            param, arm = params[span.name]
            factor = self.factors.get(span.name, 1.0)
            mine = [(d, coef * factor) for d, coef in terms.get(arm, ())]
            earlier = self.anchor.earlier(of_anchor.get(arm, ()), span.name, factor)
            earlier += self.jacobian.earlier(again, arm, span.name)
            before = self.writes[arm], self.written[arm]
            update_span(span, param, Terms(mine, *before, bends.get(arm, ()), earlier), write)
        for arm in arms:
            self.written[arm] = record.step
        self.engine.publish()

    @torch.no_grad()
    def replay(self, record: StepRecord) -> None:
        """Do what a step of a run with the same settings did, from its record alone: no forward.

        Afterwards weights, sampler and counters are as after that step, bit for bit, on any engine and
        number of ranks. Raises TrajectoryError if another step is due, or its draws are not those
        of this sampler. Cost: the write of a step.
        """
        if record.step != self.step_count:
            raise TrajectoryError(f"step {record.step} cannot follow: the next is step {self.step_count}")
        way, draws = self._way(record.step), self._meet(record.step, len(record.slopes))
        if tuple(draw.arms for draw in draws) != record.arms:
            raise TrajectoryError(
                f"step {record.step} drew other arms than {type(self.sampler).__name__} draws here: the log "
                "was written with another sampler, or other options or an earlier state of it"
            )
        if way is self and self.curvature.used and len(record.curvatures) != len(record.slopes):
            raise TrajectoryError(f"step {record.step} has no curvatures: the log was written without them")
        if record.slopes and way is self:
            try:
                self.jacobian.require_width(len(record.gradient))
            except ValueError as error:
                raise TrajectoryError(f"step {record.step} cannot follow: {error}") from error
        self.record, self.step_count = record, record.step + 1
        if record.slopes:
            self._finish(record, draws)
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def _skip(self, step: int, lr: float) -> float:
        self.record = StepRecord(step, lr)
        self.skipped += 1
        self.skipped_in_a_row += 1
        log.warning("step %d skipped: a loss is not finite; no weight was written", step)
        if self.skipped_in_a_row > self.max_skipped:
            raise NonFiniteLossError(
                f"{self.skipped_in_a_row} steps in a row had a loss that is not finite, more than "
                f"max_skipped={self.max_skipped}; lower lr or eps, or look for rows without a label (with a "
                "jacobian also for outputs that are no numbers). The weights are those of the last step that "
                "was written"
            )
        return math.nan
