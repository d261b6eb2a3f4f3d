"""What of an optimizer ranks compare, snapshots keep, and a resume takes up again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_dist.anchor import Anchored
from zo_dist.carried import Carried
from zo_dist.curvature import Curvature
from zo_dist.estimators import Estimator
from zo_dist.jacobian import Jacobian
from zo_dist.noise import Noise
from zo_dist.params import Arm, Param
from zo_dist.part import Part
from zo_dist.projection import Projected
from zo_dist.rounding import Rounding16
from zo_dist.rules import Rule
from zo_dist.steering import Steering
from zo_dist.trials import Trials


class Stateful(torch.optim.Optimizer):
    """The base of `ZeroOrder`, which gives its attributes their values."""

    params: list[Param]
    arms: list[Arm]
    noise: Noise
    estimator: Estimator
    rule: Rule
    rounding: Rounding16
    curvature: Curvature
    perturbation_momentum: Carried
    steering: Steering
    jacobian: Jacobian
    anchor: Anchored
    projection: Projected
    trials: Trials | None
    eps: float
    directions: int
    directions_per_row: int
    perturb: str
    max_skipped: int
    step_count: int
    skipped: int
    skipped_in_a_row: int
    # How often each arm was written, and in which step the last time.
    writes: list[int]
    written: list[int]

    def settings(self, lr: float) -> dict[str, object]:
        """What must be equal on every rank for the ranks to stay one run."""
        settings: dict[str, object] = {"lr": lr, "eps": self.eps, "directions": self.directions}
        settings.update(directions_per_row=self.directions_per_row)
        settings.update(perturb=self.perturb, noise=self.noise.kind, seed=self.noise.seed)
        settings.update(rounding=self.rounding.mode, max_skipped=self.max_skipped)
        settings.update(conservative=self.trials is not None)
        for name, part in {"estimator": self.estimator, **self.parts}.items():
            settings[name] = [type(part).__name__, part.options]
        settings["arms"] = [arm.name for arm in self.arms]
        settings["parameters"] = [(p.name, tuple(p.shape), str(p.param.dtype)) for p in self.params]
        return settings

    @property
    def parts(self) -> dict[str, Part]:
        """What makes a write of slopes, by name: with these, and noise and rounding, a log is replayed."""
        names = ["sampler", "coefficients", "rule", "scale", "mask", "curvature", "perturbation_momentum"]
        return {name: getattr(self, name) for name in [*names, "jacobian", "anchor", "projection"]}

    @property
    def beside(self) -> dict[str, dict[str, Tensor]]:
        """What this rank keeps beside its spans: by what it is, and by canonical name."""
        kept = {"lost": self.rounding.lost, "anchor": self.anchor.weights, "start": self.projection.weights}
        steerings = {part.setting: part.kept for part in (self.curvature, self.perturbation_momentum)}
        return kept | steerings | self.rule.kept

    @property
    def scalars(self) -> dict[str, Any]:
        """The rest of the state, the same on every rank, for JSON. Settable."""
        counters = {"step": self.step_count, "skipped": [self.skipped, self.skipped_in_a_row]}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        arms = {"writes": list(self.writes), "written": list(self.written)}
        return counters | arms | {"parts": parts}

    @scalars.setter
    def scalars(self, scalars: dict[str, Any]) -> None:
        self.require_parts(scalars)
        for name, part in self.parts.items():
            part.load_state_dict(scalars["parts"][name])
        self.step_count = scalars["step"]
        self.writes, self.written = list(scalars["writes"]), list(scalars["written"])
        self.skipped, self.skipped_in_a_row = scalars["skipped"]

    def require_parts(self, scalars: dict[str, Any]) -> None:
        """ValueError unless `scalars` has the state of each part, and of no other."""
        if scalars["parts"].keys() != self.parts.keys():
            raise ValueError(
                f"the saved state is of the parts {', '.join(scalars['parts'])}; this zo_dist has "
                f"{', '.join(self.parts)}: use the version that saved it, or begin anew"
            )

    def state_dict(self) -> dict[str, Any]:
        """What resumes a run on the same shards: `scalars`, lr, and `beside`. Weights are not in it."""
        return {
            "scalars": self.scalars,
            "beside": {key: {n: t.clone() for n, t in of.items()} for key, of in self.beside.items()},
            "param_groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up `state_dict`; ValueError if it is of other arms, shards or parts that keep something."""
        arms = len(state_dict["scalars"]["writes"])
        if arms != len(self.arms):
            raise ValueError(
                f"the saved state is of {arms} arms, this optimizer has {len(self.arms)}: give it the model "
                "and the setting arms that it was saved with"
            )
        saved = tensors_of(state_dict["beside"])
        mine = tensors_of(self.beside)
        if {key: t.shape for key, t in saved.items()} != {key: t.shape for key, t in mine.items()}:
            raise ValueError(
                "the saved state is of other shards, or of another rule, rounding, curvature, "
                "perturbation momentum, anchor or projection: it holds "
                f"{sorted({kind for kind, _ in saved}) or 'nothing'} of {len(saved)} "
                f"spans, this rank has {sorted({kind for kind, _ in mine}) or 'nothing'} of {len(mine)}"
            )
        self.scalars = state_dict["scalars"]
        for key, tensor in saved.items():
            mine[key].copy_(tensor)
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved_group)


def tensors_of(beside: dict[str, dict[str, Tensor]]) -> dict[tuple[str, str], Tensor]:
    """Those of `Stateful.beside`, by what each is and its canonical name."""
    return {(kind, name): tensor for kind, of in beside.items() for name, tensor in of.items()}
