"""Shapes of common models, so that they can be planned where no hub is reached, and any other model's.

Each is what the `config.json` of the named hub repository holds of shapes. `tests/test_plan.py` builds each
of them and holds it to the number of parameters that is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from zo_dist.settings import nearest
from zo_dist.tasks import resolve_model


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


def _gated(
    kind: str,
    vocabulary: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


_QWEN: dict[str, Any] = {"head_dim": 128}
_EXPERTS: dict[str, Any] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    **_QWEN,
}

# By short name: the hub repository whose config.json it is, and its shape.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-125m": ("facebook/opt-125m", _opt(768, 12, 12)),
    "opt-1.3b": ("facebook/opt-1.3b", _opt(2048, 24, 32)),
    "opt-2.7b": ("facebook/opt-2.7b", _opt(2560, 32, 32)),
    "opt-6.7b": ("facebook/opt-6.7b", _opt(4096, 32, 32)),
    "opt-13b": ("facebook/opt-13b", _opt(5120, 40, 40)),
    "opt-30b": ("facebook/opt-30b", _opt(7168, 48, 56)),
    "opt-66b": ("facebook/opt-66b", _opt(9216, 64, 72)),
    "llama-2-7b": (
        "meta-llama/Llama-2-7b-hf",
        _gated("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
    ),
    "llama-2-13b": (
        "meta-llama/Llama-2-13b-hf",
        _gated("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
    ),
    "llama-2-70b": (
        "meta-llama/Llama-2-70b-hf",
        _gated("llama", 32000, 8192, 28672, 80, 64, 8, 4096),
    ),
    "llama-3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        _gated("llama", 128256, 4096, 14336, 32, 32, 8, 8192),
    ),
    "llama-3-70b": (
        "meta-llama/Meta-Llama-3-70B",
        _gated("llama", 128256, 8192, 28672, 80, 64, 8, 8192),
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _gated("llama", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True, head_dim=64),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _gated("llama", 128256, 3072, 8192, 28, 24, 8, 131072, tied=True, head_dim=128),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        _gated("mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, num_local_experts=8, num_experts_per_tok=2),
    ),
    "qwen3-0.6b": (
        "Qwen/Qwen3-0.6B",
        _gated("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, tied=True, **_QWEN),
    ),
    "qwen3-8b": ("Qwen/Qwen3-8B", _gated("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, **_QWEN)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _gated("qwen3", 151936, 5120, 17408, 40, 40, 8, 40960, **_QWEN)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _gated("qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, **_QWEN)),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        _gated("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, **_EXPERTS),
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        _gated("llama", 49152, 576, 1536, 30, 9, 3, 8192, tied=True),
    ),
}


def read_shape(source: str, revision: str | None = None, trust: bool = False) -> tuple[str, PretrainedConfig]:
    """`(what model.source is, the config)` of a name in SHAPES, its hub id, a `pypi:` package, a folder, a
    `config.json`, or another hub id, which needs the hub. ValueError for what is none of them.
    """
    by_id = {repository.lower(): name for name, (repository, _) in SHAPES.items()}
    name = by_id.get(source.lower(), source.lower())
    if name in SHAPES and not Path(source).exists():
        repository, shape = SHAPES[name]
        settings = dict(shape)
        return repository, AutoConfig.for_model(settings.pop("model_type"), **settings)
    path = Path(source)
    # A config.json stands for its folder: that is where a model would be loaded from.
    resolved = str(path.parent if path.name == "config.json" else source)
    try:
        found = AutoConfig.from_pretrained(
            str(resolve_model(resolved)), revision=revision, trust_remote_code=trust
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"there is no model {source!r}: {nearest(source, SHAPES)} Else a folder, a config.json, a pypi: "
            f"package or a hub id, where the hub is reached ({reason})"
        ) from error
    return resolved, found
