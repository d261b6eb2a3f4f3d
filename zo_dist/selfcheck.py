"""The start-up check: every arm moves the loss, writes reach the next forward, bytes come back.

It catches what would otherwise be a run that silently learns nothing: a gathered copy that outlives
its forward (persistent ZeRO-3 parameters, an FSDP2 group left unsharded, hpZ), an arm whose
parameters the model does not use. It also tells of weights that have too few bits for eps. Cost: four
forwards per 16 arms (module mode) or four in all (shard mode), on one row each, two forwards for the
writes, and a pass over the weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zo_dist.engines import Engine
from zo_dist.engines.pieces import local_of, span_in
from zo_dist.noise import Noise
from zo_dist.params import Arm, Owner, Param, Span
from zo_dist.parts import Probe, Shifts
from zo_dist.perturb import ModulePerturbation, ShardPerturbation

# Far above any eps, so that a loss that does not move shows a missing wire, not a small slope; and
# several, because a 16-bit model's loss has few values and may be the same one by chance.
_TRIAL_SHIFTS = (0.1, 0.3, 1.0)
_ARMS_PER_FORWARD = 16
# The losses of so many copies of one row, as one stacked forward gives them.
Evaluate = Callable[[int], Tensor]

# Bits of a weight from its first to half of its last.
_BITS = {torch.bfloat16: 8, torch.float16: 11}
# The share of the weights that is worth a warning.
_MANY = 0.01

log = logging.getLogger(__name__)

# Keys of the trial noise; a run never gets to this step number.
_TRIAL_STEP = 2**31 - 1


class SelfCheckError(ValueError):
    """The model, as it is sharded, cannot be trained correctly; the message names what and why."""


def check_engine(
    engine: Engine, arms: Sequence[Arm], noise: Noise, perturb: str, stacks: bool, evaluate: Evaluate
) -> None:
    """Raise on every rank if any of the three promises does not hold on any rank.

    SelfCheckError; of a write that one rank alone does not see, on that rank, and ValueError, which has its
    reason, on the others.

    `stacks`: whether `evaluate` can take several rows; if not, all arms are shifted at once.
    """
    error: Exception | None = None
    params = [p for arm in arms for p in arm.params]
    if perturb == "module" and stacks:
        dead = _dead_arms(engine, arms, noise, evaluate)
    else:
        dead = _dead_together(engine, params, noise, perturb, evaluate) * len(arms)
    # A row that one rank happens to hold may not feel an arm (an expert it is not routed to).
    everywhere = engine.exchange([float(d) for d in dead]).all(0).tolist()
    if any(everywhere):
        named = [arm.name for arm, is_dead in zip(arms, everywhere, strict=True) if is_dead]
        error = SelfCheckError(
            f"shifting the weights of {', '.join(named)} does not change the loss: the loss does not "
            "depend on them, or the model reads them from outside the module that owns them. Set "
            "requires_grad=False on them, or use perturb: shard"
        )
    engine.together(error)
    stale = _stale_writes(engine, params, evaluate)
    if stale:
        error = SelfCheckError(
            f"a write to the shard of {', '.join(stale[:5])}{' ...' if len(stale) > 5 else ''} did not "
            f"reach the next forward on rank {engine.rank}: a gathered copy outlives its forward. "
            "Reshard after forward (FSDP2), set stage3_param_persistence_threshold to 0 and "
            "zero_hpz_partition_size to 1 (ZeRO-3)"
        )
    engine.together(error)


def _dead_arms(engine: Engine, arms: Sequence[Arm], noise: Noise, evaluate: Evaluate) -> list[bool]:
    """For each arm, whether its row of a stacked forward has the loss of unshifted weights.

    The control run shifts by 0 through the same copies and slices, so an arm without effect gives
    the same bits.
    """
    dead: list[bool] = []
    for start in range(0, len(arms), _ARMS_PER_FORWARD):
        some = arms[start : start + _ARMS_PER_FORWARD]
        live = [(Probe(d, 1.0, frozenset(p.name for p in arm.params)), 1) for d, arm in enumerate(some)]
        losses = []
        for shift in (0.0, *_TRIAL_SHIFTS):
            params = engine.here([p for arm in some for p in arm.params])
            perturbation = ModulePerturbation(params, Shifts(noise, _TRIAL_STEP, shift))
            with perturbation.installed(), perturbation.probes(live):
                losses.append(evaluate(len(some)))
        dead += _all_equal(losses)
    return dead


def _dead_together(
    engine: Engine, params: Sequence[Param], noise: Noise, perturb: str, evaluate: Evaluate
) -> list[bool]:
    """One entry: whether shifting every parameter at once leaves the loss as it is."""
    losses = []
    probe = Probe(0, 1.0, frozenset(p.name for p in params))
    for shift in (0.0, *_TRIAL_SHIFTS):
        if perturb == "module":
            copies = ModulePerturbation(engine.here(params), Shifts(noise, _TRIAL_STEP, shift))
            with copies.installed(), copies.probes([(probe, 1)]):
                losses.append(evaluate(1))
        else:
            shards = ShardPerturbation(Shifts(noise, _TRIAL_STEP, shift), engine.publish)
            with shards.shifted(engine.spans(params), probe):
                losses.append(evaluate(1))
    return _all_equal(losses)


def _all_equal(losses: Sequence[Tensor]) -> list[bool]:
    """For each row, whether every trial gave the loss of the first."""
    return torch.stack([loss == losses[0] for loss in losses]).all(0).tolist()


def _stale_writes(engine: Engine, params: Sequence[Param], evaluate: Evaluate) -> list[str]:
    """Names of parameters of which a forward does not see a write, or does not see it taken back.

    The first and the last local element of each span change their sign and come back.
    """
    spans = engine.spans(params)
    before = [_ends(span).clone() for span in spans]
    stale: list[str] = []

    def put(ends: Sequence[Tensor]) -> dict[str, tuple[list[int], Tensor]]:
        expected: dict[str, tuple[list[int], Tensor]] = {}
        for span, now in zip(engine.spans(params), ends, strict=True):
            span.flat[0], span.flat[-1] = now[0], now[1]
            where = [span.number(j) for j in (0, span.numel - 1)]
            expected[span.name] = (where, now if span.numel > 1 else now[:1].repeat(2))
        engine.publish()
        return expected

    try:
        flipped = [torch.where(values == 0, torch.ones_like(values), -values) for values in before]
        stale += _forward_and_compare(params, put(flipped), evaluate)
    finally:
        # Whatever a user's loss raises, or Ctrl-C.
        restored = put(before)
    stale += _forward_and_compare(params, restored, evaluate)
    return sorted(set(stale))


def _ends(span: Span) -> Tensor:
    return torch.stack([span.flat[0], span.flat[-1]])


def _forward_and_compare(
    params: Sequence[Param], expected: dict[str, tuple[list[int], Tensor]], evaluate: Evaluate
) -> list[str]:
    """Names whose owner, in one forward, holds other values than expected at the span's ends."""
    stale: list[str] = []

    def watch(owner: Owner, param: Param) -> torch.utils.hooks.RemovableHandle:
        where, values = expected[param.name]

        def compare(_: nn.Module, args: object) -> None:
            weight = owner.holder._parameters[owner.attribute]
            assert weight is not None
            here = span_in(param.piece, param.name, local_of(weight.detach()))
            ends = here.flat[[here.place(number) for number in where]]
            if not torch.equal(ends, values.to(ends)):
                stale.append(param.name)

        return owner.module.register_forward_pre_hook(compare)

    hooks = []
    for param in params:
        if param.name in expected:
            hooks += [watch(owner, param) for owner in param.owners]
    try:
        evaluate(1)
    finally:
        for hook in hooks:
            hook.remove()
    return stale


def warn_of_coarse_weights(engine: Engine, params: Sequence[Param], eps: float) -> None:
    """Tell if many weights have too few bits to be shifted by `eps`. A collective, and a pass over them.

    Half of the distance to the next value of a 16-bit weight is then above `eps`: its shifted copy is
    rounded back to it, or to twice the shift.
    """
    coarse = total = 0
    for span in engine.spans(params):
        total += span.numel
        if span.flat.dtype in _BITS:
            # Of the weights in [2^e, 2^(e+1)), half a step is 2^(e - bits).
            least = 2.0 ** (math.floor(math.log2(eps)) + 1 + _BITS[span.flat.dtype])
            coarse += sum(int((part.abs() >= least).sum()) for part in torch.split(span.flat, 1 << 24))
    all_coarse, all_total = engine.exchange([float(coarse), float(total)]).sum(0).tolist()
    if all_coarse > _MANY * all_total:
        log.warning(
            "%.0f%% of the trained weights cannot be shifted by eps (%g): values of their dtype lie further "
            "apart where they are, and their estimate is noise. Raise eps, train float32 weights, or "
            "leave norms out",
            100.0 * all_coarse / all_total,
            eps,
        )
