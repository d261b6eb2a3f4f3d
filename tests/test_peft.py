"""PEFT models train as they are: adapters move, the frozen base keeps its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import zo_dist

ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


def build(adapter: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return get_peft_model(LlamaForCausalLM(config), ADAPTERS[adapter]())


def labelled_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (6, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("perturb", ["module", "shard"])
def test_adapters_move_and_the_base_does_not(adapter: str, perturb: Any) -> None:
    model = build(adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = zo_dist.ZeroOrder(model, lr=1e-2, eps=1e-2, perturb=perturb)
    batch = labelled_rows()

    def closure() -> torch.Tensor:
        return model(**batch).loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name


def test_stacked_lora_probes_have_the_losses_of_single_ones() -> None:
    batch = labelled_rows()
    stacked = zo_dist.ZeroOrder(build("lora"), lr=1e-2, eps=1e-2, directions=3)
    single = zo_dist.ZeroOrder(build("lora"), lr=1e-2, eps=1e-2, directions=3, perturb="shard")
    for _ in range(5):
        # float32: a slice's GEMM may add in another order than the whole batch's.
        assert stacked.step_batch(batch, zo_dist.causal_lm_loss) == pytest.approx(
            single.step_batch(batch, zo_dist.causal_lm_loss), abs=1e-5
        )
