"""Tiny models of every kind that tests train, with weights large enough for losses to move."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, LENGTH = 37, 6


class OneElement(nn.Module):
    """Multiplies by a parameter of one element: a row fewer than ranks, and nearly empty arms."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Tied(nn.Module):
    """A Linear used twice through two modules that share its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _sequential() -> nn.Module:
    # 5, 7 and 1 rows: uneven on 2 and 3 ranks, and on most of them none of the last two.
    return nn.Sequential(
        nn.Linear(3, 5),
        nn.Tanh(),
        Tied(),
        nn.Linear(5, 7, bias=False),
        OneElement(),
        nn.Linear(7, 1),
    )


_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2}
_HF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_key_value_heads": 1, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24},
    ),
    # A dense first layer, then an expert for all tokens beside those that are chosen; low-rank attention.
    "deepseek": (
        "DeepseekV3",
        {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
        | {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}
# Their experts are one tensor for all experts of a layer.
EXPERTS = ("mixtral", "qwen3_moe", "deepseek")
# What tensor parallelism cuts in two has as many heads.
_IN_TWO = {
    "llama_in_two": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    # Which AutoTP cuts in two and one.
    "llama_in_three": (
        "Llama",
        {"num_key_value_heads": 3, "num_attention_heads": 3, "hidden_size": 24, "tie_word_embeddings": False},
    ),
    "qwen3_in_two": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}),
}
KINDS = (*_HF, "opt", "gpt2", "sequential")


def build(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The same model, weight for weight, wherever it is built; in eval mode, without gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _skeleton(kind)
        for name, param in model.named_parameters():
            norm = param.ndim == 1 and name.endswith("weight")
            nn.init.normal_(param, 1.0 if norm else 0.0, 0.3)
    return model.to(dtype).eval()


def _skeleton(kind: str) -> nn.Module:
    if kind == "sequential":
        return _sequential()
    if kind == "opt":
        config = transformers.OPTConfig(
            **_COMMON, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16
        )
        return transformers.OPTForCausalLM(config)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        )
    family, options = (_HF | _IN_TWO)[kind]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    config = getattr(transformers, f"{family}Config")(**(_COMMON | sizes | options))
    return getattr(transformers, f"{family}ForCausalLM")(config)


def rows_for(kind: str, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A batch with `rows` rows and the row's number in `row`."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"row": torch.arange(rows)}
    if kind == "sequential":
        batch["x"] = torch.randn(rows, 3, generator=generator).to(dtype)
        batch["y"] = torch.randn(rows, generator=generator).to(dtype)
    else:
        batch["input_ids"] = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    return batch


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The model's own loss, per row."""
    from zo_dist import causal_lm_loss

    if "x" in batch:
        return (model(batch["x"]).float().squeeze(1) - batch["y"].float()).square()
    return causal_lm_loss(model, {"input_ids": batch["input_ids"]})


def two_outputs(loss: Any, unit: float = 1.0) -> Any:
    """Of the losses of `loss` times `unit`, l of a row: `l**2 / 4 + l / 4 - 1 / 8`, of two outputs."""
    from zo_dist import Composite

    def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = loss(model, batch)
        losses = (out[0] if isinstance(out, tuple) else out) * unit
        return torch.stack([losses, 2.0 * losses - 1.0], dim=1)

    return Composite(outputs, lambda o, _: o[:, 0].square() / 4.0 + o[:, 1] / 8.0, width=2)  # type: ignore[arg-type]


def step(optimizer: Any, steps: int = 1, loss: Any = loss_of) -> None:
    """Steps of "sequential" on 6 rows, other ones in each."""
    dtype = optimizer.params[0].param.dtype
    for _ in range(steps):
        rows = rows_for("sequential", 6, seed=optimizer.step_count, dtype=dtype)
        optimizer.step_batch(rows, loss)


def cut(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch.items()}


def losses_by_mode(kind: str, **options: Any) -> dict[str, Tensor]:
    """What the loss function saw in one step over 4 rows, in each perturb mode, in its order."""
    import table

    losses = {}
    for mode in table.MODES:
        seen: list[Tensor] = []

        def loss(model: nn.Module, batch: Any, seen: list[Tensor] = seen) -> Any:
            out = loss_of(model, batch)
            seen.append((out[0] if isinstance(out, tuple) else out).clone())
            return out

        optimizer = table.optimizer(build(kind), perturb=mode, lr=0.0, self_check=False, **options)
        optimizer.step_batch(rows_for(kind, 4), loss)
        losses[mode] = torch.cat(seen)
    return losses


def assert_both_modes_see_the_same_losses(kind: str, **options: Any) -> None:
    """Stacked, where linear layers with noise of two sides are not shifted, against shards that are."""
    losses = losses_by_mode(kind, directions=2, eps=2.0**-5, **options)
    assert len(set(losses["module"].tolist())) == 8
    # A few dozen roundings in sequence on a loss of this size, as in test_perturb.py.
    tolerance = 64 * 2.0**-23 * float(losses["shard"].max())
    torch.testing.assert_close(losses["module"], losses["shard"], rtol=0, atol=tolerance)
