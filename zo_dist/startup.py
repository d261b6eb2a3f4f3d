"""What comes before the first step: kernels are compiled, and the engine is checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_dist.engines import Engine
from zo_dist.mask import Mask
from zo_dist.objective import Objective
from zo_dist.params import evaluating
from zo_dist.probes import Batch, RowLoss, first_row
from zo_dist.selfcheck import check_engine, warn_of_coarse_weights
from zo_dist.state import Stateful
from zo_dist.update import use_each_kernel


class Startup(Stateful):
    """The part of `ZeroOrder` that makes it ready."""

    engine: Engine
    mask: Mask
    self_check: bool
    _prepared: bool

    def prepare(self, batch: Batch, row_loss: RowLoss) -> None:
        """The start-up check and the compilation of the noise, which the first step else begins with.

        The check is by `row_loss`, or by the `check` of an `Objective`.
        Every rank must call it, if any does. Raises on every rank what `selfcheck.check_engine` does.
        """

        smooth = row_loss.check if isinstance(row_loss, Objective) else row_loss

        def evaluate(rows: int) -> Tensor:
            out = smooth(self.engine.module, first_row(batch, rows))
            return out[0] if isinstance(out, tuple) else out

        self._prepare(evaluate, stacks=True)

    @torch.no_grad()
    def _prepare(self, evaluate: Callable[[int], Tensor], stacks: bool) -> None:
        if self._prepared:
            return
        self.warm_up()

        def together(rows: int) -> Tensor:
            return self.engine.evaluate(lambda *_: evaluate(rows).view(1, rows), 1, rows)[0]

        if self.self_check:
            with evaluating(self.engine.module):
                check_engine(self.engine, self.arms, self.noise, self.perturb, stacks, together)
            copied = [p for p in self.params if not self.noise.has_sides(p.name)]
            warn_of_coarse_weights(self.engine, copied, self.eps)
        # Not before: a check that an error ended is made again.
        self._prepared = True

    def warm_up(self) -> None:
        """Compile the noise kernels for these weights; where nothing can be compiled they run eagerly."""
        # A weight is shifted where the model computes, and written where its span is.
        kinds = {(p.param.dtype, self.engine.device) for p in self.params}
        kinds |= {(span.flat.dtype, span.flat.device) for span in self.engine.spans(self.params)}
        adds = self.steering.used or self.jacobian.used
        unfused = bool(self.mask.thresholds or self.anchor.every) or adds
        most = max(self.directions, self.anchor.directions)
        self.noise.warm_up(
            kinds,
            lambda w: use_each_kernel(w, self.rule, self.rounding.mode, self.noise, most, unfused),
        )
