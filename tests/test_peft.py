"""PEFT models train as they are: adapters move, the frozen base keeps its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from workers import Pool

import zo_dist
from zo_dist.engines.build import fsdp2_mesh, shard_with_fsdp2
from zo_dist.replay import identity

ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    ),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


# docs/integrations.md: lr and eps of published runs; for the others, those of the nearest kind.
PRESETS = {"lora": (5e-5, 1e-2), "ia3": (5e-5, 1e-2), "prompt": (1e-2, 1e-1), "prefix": (1e-2, 1e-1)}
LAYERS = [f"base_model.model.model.layers.{i}" for i in range(3)]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def build(adapter: str) -> Any:
    return get_peft_model(base(), ADAPTERS[adapter]())


def labelled_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (6, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("perturb", ["module", "shard"])
def test_adapters_move_and_the_base_does_not(adapter: str, perturb: Any, tmp_path: Path) -> None:
    model = build(adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr, eps = PRESETS[adapter]
    optimizer = zo_dist.ZeroOrder(model, lr=lr, eps=eps, perturb=perturb)
    # An arm is a layer that has an adapter; virtual tokens are one arm.
    arms = [arm.name for arm in optimizer.arms]
    assert arms == LAYERS if adapter in ("lora", "ia3") else len(arms) == 1
    batch = labelled_rows()

    def closure() -> torch.Tensor:
        return model(**batch).loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_stacked_lora_probes_have_the_losses_of_single_ones() -> None:
    batch = labelled_rows()
    stacked = zo_dist.ZeroOrder(build("lora"), lr=1e-2, eps=1e-2, directions=3)
    single = zo_dist.ZeroOrder(build("lora"), lr=1e-2, eps=1e-2, directions=3, perturb="shard")
    for _ in range(5):
        # float32: a slice's GEMM may add in another order than the whole batch's.
        assert stacked.step_batch(batch, zo_dist.causal_lm_loss) == pytest.approx(
            single.step_batch(batch, zo_dist.causal_lm_loss), abs=1e-5
        )


# A base in 8 bits, by torchao


def quantised() -> Any:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed (pip install -e '.[quantised]')"
    )
    model = base()
    quantization.quantize_(model.model.layers, quantization.Int8WeightOnlyConfig())
    return model


def test_an_adapter_beside_quantised_weights_is_trained() -> None:
    model = get_peft_model(quantised().requires_grad_(False), ADAPTERS["lora"]())
    optimizer = zo_dist.ZeroOrder(model, lr=1e-2, eps=1e-2, directions=2)
    assert [arm.name for arm in optimizer.arms] == LAYERS
    frozen = identity(optimizer)["frozen"]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = [optimizer.step_batch(labelled_rows(), zo_dist.causal_lm_loss) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], weight) for name, weight in before.items())
    assert identity(optimizer)["frozen"] == frozen
    model.base_model.model.model.layers[1].mlp.up_proj.weight.qdata[3, 5] += 1
    assert identity(optimizer)["frozen"] != frozen


def test_quantised_weights_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj.weight is stored quantised \(Int8Tensor\)"):
        zo_dist.ZeroOrder(quantised().requires_grad_(True))


def step_on_ranks(is_sharded: bool) -> float:
    model = get_peft_model(quantised().requires_grad_(False), ADAPTERS["lora"]())
    if is_sharded:
        shard_with_fsdp2(model, fsdp2_mesh(torch.device("cpu")))
    return zo_dist.ZeroOrder(model, lr=1e-2, eps=1e-2).step_batch(labelled_rows(), zo_dist.causal_lm_loss)


def test_ranks_hold_a_quantised_base_whole(pool: Callable[[int], Pool]) -> None:
    quantised()
    first, second = pool(2).run(step_on_ranks, False)
    assert first == second
    for error in pool(2).errors(step_on_ranks, True):
        assert error.startswith("ValueError: FSDP2 cannot split weights that are stored as Int8Tensor"), error
