"""The parts of the step that a config names: samplers, coefficients, rules and more. One section for each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from zo_dist.coefficients import Clip, Coefficients, Raw, RootMeanSquare, SignOnly, Standardise
from zo_dist.fitted import FittedAdaLeZO
from zo_dist.flipout import Flipout
from zo_dist.lowrank import LowRank
from zo_dist.orthogonal import Orthogonal
from zo_dist.rules import SGD, Adam, Moment, Momentum, Rule, Sign
from zo_dist.samplers import AdaLeZO, Dense, Sampler, Uniform, Weigh
from zo_dist.scale import LearnedScale, RunningScale, Scale
from zo_dist.structure import Structure


class _Section:
    """A section whose keys, but for `name`, are the options of the class `makes`."""

    makes: ClassVar[Any]

    def __post_init__(self) -> None:
        # Refuses what the class refuses, before anything is loaded.
        self._made()

    def _made(self, **more: object) -> Any:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return self.makes(**{f.name: getattr(self, f.name) for f in fields if f.name != "name"}, **more)


class SamplerSection(_Section):
    def build(self) -> Sampler:
        sampler: Sampler = self._made()
        return sampler


class CoefficientsSection(_Section):
    def build(self) -> Coefficients:
        coefficients: Coefficients = self._made()
        return coefficients


class RuleSection(_Section):
    def build(self, weight_decay: float) -> Rule:
        rule: Rule = self._made(weight_decay=weight_decay)
        return rule


class ScaleSection(_Section):
    def build(self) -> Scale:
        scale: Scale = self._made()
        return scale


class StructureSection(_Section):
    def build(self) -> Structure:
        structure: Structure = self._made()
        return structure


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseConfig(SamplerSection):
    """Every arm in every direction (MeZO)."""

    makes = Dense
    name: Literal["dense"] = "dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformConfig(SamplerSection):
    """A uniform subset of the arms (LeZO). `sparsity`: the share left out."""

    makes = Uniform
    name: Literal["uniform"] = "uniform"
    sparsity: float = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaLeZOConfig(SamplerSection):
    """A bandit over the arms; the options are those of `zo_dist.AdaLeZO`."""

    makes = AdaLeZO
    name: Literal["adalezo"] = "adalezo"
    ratio: float = 0.2
    tau: float = 0.6
    gamma: float = 0.1
    alpha: float = 0.1
    clip: float = 4.0
    normalise: bool = True
    correct: bool = False
    weigh: Weigh = "update"


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedAdaLeZOConfig(SamplerSection):
    """Arms by fitted credit; the options are those of `zo_dist.FittedAdaLeZO`."""

    makes = FittedAdaLeZO
    name: Literal["fitted_adalezo"] = "fitted_adalezo"
    draws: int = 1
    gamma: float = 0.1
    memory: float = 1000.0
    spread: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RawConfig(CoefficientsSection):
    """The slopes as they are (MeZO)."""

    makes = Raw
    name: Literal["raw"] = "raw"


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOnlyConfig(CoefficientsSection):
    """The sign of each direction's slope."""

    makes = SignOnly
    name: Literal["sign"] = "sign"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig(CoefficientsSection):
    """Each slope cut to `[-limit, limit]`."""

    makes = Clip
    name: Literal["clip"] = "clip"
    limit: float = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RootMeanSquareConfig(CoefficientsSection):
    """Slopes over the root of a running mean of their squares (MEAZO)."""

    makes = RootMeanSquare
    name: Literal["rms"] = "rms"
    beta: float = 0.99
    floor: float = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class StandardiseConfig(CoefficientsSection):
    """Slopes over their deviation in the step (FZOO, GRZO), with `centre` as z-scores (ES)."""

    makes = Standardise
    name: Literal["standardise"] = "standardise"
    centre: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SGDConfig(RuleSection):
    """The estimate itself, no state."""

    makes = SGD
    name: Literal["sgd"] = "sgd"


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentumConfig(RuleSection):
    """A running sum of estimates; 4 bytes per parameter, with `factored` fewer (LOZO-M, TeZO-m)."""

    makes = Momentum
    name: Literal["momentum"] = "momentum"
    beta: float = 0.9
    factored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamConfig(RuleSection):
    """Adam, ZO-AdaMM (`amsgrad`), R-AdaZO (`second: momentum`); 8 or 12 bytes per parameter.

    With `factored` 8 per rank of a matrix (TeZO-Adam).
    """

    makes = Adam
    name: Literal["adam"] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    second: Moment = "estimate"
    amsgrad: bool = False
    factored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SignConfig(RuleSection):
    """The sign of each weight's estimate, no state."""

    makes = Sign
    name: Literal["sign"] = "sign"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoScaleConfig(ScaleSection):
    """Every parameter is perturbed alike."""

    makes = Scale
    name: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningScaleConfig(ScaleSection):
    """Arms by the slopes they took part in."""

    makes = RunningScale
    name: Literal["running"] = "running"
    alpha: float = 0.05
    limit: float = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedScaleConfig(ScaleSection):
    """Parameters by learnt nets (ZO Fine-tuner). `path`: what `zo-dist learn-scale` wrote."""

    makes = LearnedScale
    path: str
    name: Literal["learned"] = "learned"

    def __post_init__(self) -> None:
        """The file is read when a run begins, and may be made after its config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankConfig(StructureSection):
    """A product of thin matrices (LOZO, TeZO, SubZero); the options are those of `zo_dist.LowRank`."""

    makes = LowRank
    name: Literal["low_rank"] = "low_rank"
    rank: int = 2
    refresh: int | None = None
    fixed: bool = False
    orthonormal: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipoutConfig(StructureSection):
    """One base per step, whose rows and columns each direction flips (Flipout, GRZO)."""

    makes = Flipout
    name: Literal["flipout"] = "flipout"


@dataclass(frozen=True, kw_only=True, slots=True)
class OrthogonalConfig(StructureSection):
    """Signs whose directions in a step are orthogonal."""

    makes = Orthogonal
    name: Literal["orthogonal"] = "orthogonal"


AnySampler = DenseConfig | UniformConfig | AdaLeZOConfig | FittedAdaLeZOConfig
AnyCoefficients = RawConfig | SignOnlyConfig | ClipConfig | RootMeanSquareConfig | StandardiseConfig
AnyScale = NoScaleConfig | RunningScaleConfig | LearnedScaleConfig
AnyStructure = LowRankConfig | FlipoutConfig | OrthogonalConfig
AnyRule = SGDConfig | MomentumConfig | AdamConfig | SignConfig
