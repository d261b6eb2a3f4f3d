"""What there is: engines, samplers, estimators, coefficients, rules, laws, masks, anchors and so on.

Every property runs over these. A new method joins the tests by one more row here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import zo_dist
from zo_dist import native, structure
from zo_dist.coefficients import Coefficients
from zo_dist.estimators import Estimator
from zo_dist.noise import Noise
from zo_dist.rules import Rule
from zo_dist.samplers import Sampler

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "dense": zo_dist.Dense,
    "uniform": lambda: zo_dist.Uniform(sparsity=0.5),
    "adalezo": lambda: zo_dist.AdaLeZO(ratio=0.6),
    "adalezo_both": lambda: zo_dist.AdaLeZO(ratio=0.6, clip=16.0, weigh="both"),
    # So short a memory that 20 steps outlast it.
    "fitted_adalezo": lambda: zo_dist.FittedAdaLeZO(draws=2, memory=8.0),
}
# The reference's method and options for the same sampler.
REFERENCE: dict[str, tuple[str, dict[str, float]]] = {
    "dense": ("mezo", {}),
    "uniform": ("lezo", {"sparsity": 0.5}),
    "adalezo": ("adalezo", {"ratio": 0.6}),
    "adalezo_both": ("adalezo", {"ratio": 0.6, "clip": 16.0, "weigh_both": True}),
    "fitted_adalezo": ("fitted_adalezo", {"draws": 2, "memory": 8.0}),
}
ESTIMATORS: dict[str, type[Estimator]] = {
    "two_sided": zo_dist.TwoSided,
    "one_sided": zo_dist.OneSided,
    "three_sided": zo_dist.ThreeSided,
}
# How much of H is new in a step, with the estimator that goes with a curvature.
SMOOTHING = 0.125
# The options are those of reference.py, which has the same names.
RULES: dict[str, Callable[..., Rule]] = {
    "sgd": zo_dist.SGD,
    "momentum": partial(zo_dist.Momentum, 0.9),
    "lozo_m": partial(zo_dist.Momentum, 0.9, factored=True),
    "adam": partial(zo_dist.Adam, 0.8, 0.95, 1e-6),
    "adam_of_momentum": partial(zo_dist.Adam, 0.8, 0.95, 1e-6, second="momentum"),
    "amsgrad": partial(zo_dist.Adam, 0.8, 0.95, 1e-6, amsgrad=True),
    "tezo_adam": partial(zo_dist.Adam, 0.8, 0.95, 1e-6, factored=True),
    "sign": zo_dist.Sign,
}
# These want noise of low rank (the second with fixed sides), no curvature, jacobian or anchor; what takes
# their place where it is otherwise.
OF_FULL_RANK = {"lozo_m": "momentum", "tezo_adam": "adam"}
COEFFICIENTS: dict[str, Callable[[], Coefficients]] = {
    "raw": zo_dist.Raw,
    "sign": zo_dist.SignOnly,
    "clip": lambda: zo_dist.Clip(0.5),
    "rms": lambda: zo_dist.RootMeanSquare(0.9),
    "fzoo": zo_dist.Standardise,
    "z_scores": lambda: zo_dist.Standardise(centre=True),
}
# These make nothing of a single direction, and are refused there. With a jacobian or an anchor all but
# `raw` are.
NEED_TWO = ("fzoo", "z_scores")
# Options of ZeroOrder, and of the reference.
NOISES: dict[str, dict[str, Any]] = {
    "rademacher": {"noise": "rademacher"},
    "gaussian": {"noise": "gaussian"},
    "lozo": {"noise": "gaussian", "structure": zo_dist.LowRank(rank=2, refresh=3)},
    "tezo": {"noise": "rademacher", "structure": zo_dist.LowRank(rank=3, fixed=True)},
    # More columns than some matrices have rows.
    "subzero": {"noise": "gaussian", "structure": zo_dist.LowRank(rank=4, refresh=3, orthonormal=True)},
    "flipout": {"noise": "rademacher", "structure": zo_dist.Flipout()},
    "grzo": {"noise": "gaussian", "structure": zo_dist.Flipout()},
    "orthogonal": {"noise": "rademacher", "structure": zo_dist.Orthogonal()},
    "zo_adamu": {
        "noise": "gaussian",
        # All three parts of its schedule are within 20 steps.
        "perturbation_momentum": zo_dist.PerturbationMomentum(
            uncertainty=0.25, beta1=0.5, beta2=0.25, begin=2, end=12
        ),
    },
}
# What `mask` is, and the share that the reference trains.
MASKS: dict[str, zo_dist.SmallWeights | None] = {"all": None, "small": zo_dist.SmallWeights(share=0.4)}
ANCHORS: dict[str, zo_dist.Anchor | None] = {"none": None, "third": zo_dist.Anchor(every=3, lr_ratio=2.0)}
PROJECTIONS: dict[str, zo_dist.Projection | None] = {
    "none": None,
    "third": zo_dist.Projection(every=3, iterations=2, lr=0.125, parameters=None),
}
JACOBIANS: dict[str, zo_dist.JacobianWindow | None] = {
    "none": None,
    # 20 steps see it fall, and begin anew.
    "window": zo_dist.JacobianWindow(window=4, decay=0.5, epoch=4, cycle=16),
}
# What steps there are besides the usual ones: options of `optimizer`.
BESIDES: dict[str, dict[str, str]] = {
    "none": {},
    "anchor": {"anchor": "third"},
    "search": {"projection": "third"},
    # Of losses as they are, and (in tests that can tell) of a loss with outputs.
    "window": {"jacobian": "window"},
    "outputs": {"jacobian": "window"},
}
LAWS = ("rademacher", "gaussian")
MODES = ("module", "shard")
DIRECTIONS = (1, 2, 3, 8)
# (directions, directions per row)
GROUPED = (*((directions, 1) for directions in DIRECTIONS), (6, 3), (2, 2))
# (dtype, rounding); float32 has none.
WRITES = (
    ("float32", "stochastic"),
    *itertools.product(("bfloat16", "float16"), ("stochastic", "kahan", "nearest")),
)
# The engines of the central claim, by number of ranks, and those that share their code.
MAIN_ENGINES = ("replicated", "fsdp2", "zero3")
RANKS = (1, 2, 3)
MORE_ENGINES = {
    1: ("ddp", "zero0"),
    2: (
        *("ddp", "hsdp_2x1", "hsdp_1x2", "fsdp2_mixed", "fsdp2_offload"),
        *("zero0", "zero2", "zero3_offload", "tp_2"),
    ),
    3: ("fsdp2_mixed", "zero3_offload"),
    4: ("hsdp_2x2", "zero3_2x2", "tp_2x2", "fsdp2_tp_2x2"),
}


def all_pairs(*axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Rows such that every value of every axis meets every value of every other axis in one.

    The first two axes are to be the longest: one row for each pair of their values, and the rest of
    the row is what covers most pairs not yet seen.
    """
    missing = {
        (i, j): np.ones((len(axes[i]), len(axes[j])), dtype=bool)
        for i, j in itertools.combinations(range(len(axes)), 2)
    }
    rows = []
    while any(pairs.any() for pairs in missing.values()):
        for a, b in itertools.product(range(len(axes[0])), range(len(axes[1]))):
            # For every candidate, by the places of its values, how many pairs it is the first to have.
            total: Any = 0
            for (i, j), pairs in missing.items():
                left = {0: slice(a, a + 1), 1: slice(b, b + 1)}.get(i, slice(None))
                some = pairs[left, b : b + 1] if j == 1 else pairs[left]
                sizes = {i: some.shape[0], j: some.shape[1]}
                total = total + some.reshape([sizes.get(k, 1) for k in range(len(axes))]).astype(int)
            if total.any():
                places = (a, b, *np.unravel_index(total.argmax(), total.shape)[2:])
                for (i, j), pairs in missing.items():
                    pairs[places[i], places[j]] = False
                rows.append(tuple(axis[place] for axis, place in zip(axes, places, strict=True)))
    return rows


def noise_of(name: str, seed: int, model: nn.Module) -> Noise:
    """The noise of NOISES for a model's parameters, computed eagerly."""
    options = NOISES[name]
    shapes = {key: p.shape for key, p in model.named_parameters()}
    return structure.noise_of(options["noise"], seed, False, options.get("structure"), shapes)


def estimating(name: str, smoothing: float = SMOOTHING) -> dict[str, Any]:
    """Options of ZeroOrder for one of ESTIMATORS."""
    curvature = zo_dist.DiagonalCurvature(smoothing=smoothing) if name == "three_sided" else None
    return {"estimator": ESTIMATORS[name](), "curvature": curvature}


# What weighs probe and update alike: a curvature is refused with it.
WEIGH_BOTH = ("adalezo_both", "fitted_adalezo")


def estimator_for(sampler: str, estimator: str) -> str:
    """`estimator`, or `two_sided` where the sampler cannot have a curvature."""
    return "two_sided" if estimator == "three_sided" and sampler in WEIGH_BOTH else estimator


def besides_for(besides: str, estimator: str) -> str:
    """`besides`, or `none` where there is a curvature, with which no other step's terms go."""
    return "none" if estimator == "three_sided" and adds_terms(besides) else besides


def adds_terms(besides: str) -> bool:
    """Are terms of other steps written too?"""
    return bool({"anchor", "jacobian"} & BESIDES[besides].keys())


def noise_for(noise: str, estimator: str, adds: bool, conservative: bool = False) -> str:
    """`noise`, or what it is without a momentum where directions cannot have one."""
    refused = estimator != "two_sided" or adds or conservative
    return "gaussian" if refused and noise == "zo_adamu" else noise


def coefficients_for(coefficients: str, directions: int, adds: bool) -> str:
    """`coefficients`, or `raw` where these cannot be had."""
    return "raw" if adds or (directions == 1 and coefficients in NEED_TWO) else coefficients


def rule_for(rule: str, structure: Any, curved: bool, adds: bool) -> str:
    """`rule`, or what it is of full rank where noise is no product of two sides, or not that alone."""
    is_product = isinstance(structure, zo_dist.LowRank) and (rule != "tezo_adam" or structure.fixed)
    return rule if is_product and not curved and not adds else OF_FULL_RANK.get(rule, rule)


def mode_of(engine: str, num_ranks: int, mode: str, steered: bool) -> str:
    """`mode`, or where directions are steered and not held whole the one that is possible."""
    sharded = num_ranks > 1 and engine.startswith(("fsdp2", "hsdp", "zero3", "tp")) and engine != "hsdp_2x1"
    return "shard" if sharded and steered else mode


def optimizer(model: Any, **options: Any) -> zo_dist.ZeroOrder:
    """A ZeroOrder whose parts, from its sampler to its projection, are by name.

    With `three_sided` it has a curvature, and no jacobian or anchor.
    """
    options["mask"] = MASKS[options.get("mask", "all")]
    estimator = options.get("estimator", "two_sided")
    for name, of in (("anchor", ANCHORS), ("jacobian", JACOBIANS)):
        if isinstance(options.get(name, "none"), str):
            options[name] = of["none" if estimator == "three_sided" else options.get(name, "none")]
    adds = options["anchor"] is not None or options["jacobian"] is not None
    apart = estimator, adds, options.get("conservative", False)
    noise = noise_for(options.pop("noise", "rademacher"), *apart)
    # What is no name here is ZeroOrder's to refuse.
    options.update(NOISES.get(noise, {"noise": noise}))
    if isinstance(options.get("projection"), str):
        options["projection"] = PROJECTIONS[options["projection"]]
    options["sampler"] = SAMPLERS[options.get("sampler", "dense")]()
    if isinstance(options.get("estimator", "two_sided"), str):
        options.update(estimating(options.get("estimator", "two_sided"), options.pop("smoothing", SMOOTHING)))
    shape = coefficients_for(options.get("coefficients", "raw"), options.get("directions", 1), adds)
    options["coefficients"] = COEFFICIENTS[shape]()
    decay = options.pop("weight_decay", 0.0)
    rule = options.get("rule", "sgd")
    if isinstance(rule, str):
        rule = rule_for(rule, options.get("structure"), options.get("curvature") is not None, adds)
        options["rule"] = RULES[rule](weight_decay=decay)
    return zo_dist.ZeroOrder(model, **options)


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


# How noise is computed on a CPU; every form leaves the same bits.
FORMS = ("eager", "native", "torch.compile")


@contextmanager
def noise_in(form: str, *args: Any) -> Iterator[Noise]:
    """`Noise(*args)` in one of FORMS; native.cpp counts as not to be compiled where another is asked for."""
    if form == "native":
        assert native.library() is not None
    absent = mock.patch.object(native, "library", return_value=None)
    with nullcontext() if form == "native" else absent:
        yield Noise(*args, compile=form != "eager")
