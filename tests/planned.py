"""Configs, settings, shapes and modes that the tests of the planner share."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from zo_dist.config import Config
from zo_dist.planning.plan import Plan, Planned
from zo_dist.settings import build

# Settings of a step, for either way to perturb.
EITHER_WAY: dict[str, dict[str, Any]] = {
    "dense": {"directions": 4},
    "forwards of 2 rows": {"directions": 2, "micro_rows": 2},
    "adam, kahan": {
        "dtype": "bfloat16",
        "directions": 2,
        "sampler": {"name": "adalezo", "ratio": 0.6},
        "rule": {"name": "adam"},
        "rounding": "kahan",
    },
    "directions per row": {"directions": 4, "directions_per_row": 2, "estimator": "one_sided"},
    "anchor": {"directions": 2, "anchor": {"every": 50}},
    "jacobian": {"directions": 2, "jacobian": {}},
    "conservative": {"directions": 2, "conservative": True},
    "perturbation momentum": {"directions": 2, "perturbation_momentum": {}},
    "curvature": {"directions": 2, "estimator": "three_sided", "curvature": {"smoothing": 0.1}},
}


def config_of(
    *,
    rows: int,
    dtype: str = "float32",
    engine: dict[str, Any] | None = None,
    micro_rows: int | None = None,
    compile: bool = False,
    **optimizer: Any,
) -> Config:
    """A whole config: `optimizer` holds settings of that section."""
    settings = {
        "model": {"source": "a-model", "dtype": dtype},
        "data": {"task": "sst2", "source": "some-rows", "train": max(1000, rows), "max_length": 6},
        "engine": engine or {},
        "optimizer": {"lr": 1e-3, "self_check": False, "compile": compile, **optimizer},
        "train": {"steps": 10, "rows": rows, "micro_rows": micro_rows},
    }
    return build(Config, settings)


def mode_of(plan: Plan, engine: str, perturb: str, offload: bool = False) -> Planned:
    """The one mode of the plan that is meant."""
    (found,) = [
        p for p in plan.modes if (p.mode.engine, p.mode.perturb, p.mode.offload) == (engine, perturb, offload)
    ]
    return found


def wide_llama(layers: int = 6) -> LlamaConfig:
    """76 M weights: enough that a process's own memory does not hide them."""
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
