"""The shared prefix changes how often early layers run, never what the probes' losses are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import zo_dist

TINY = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=6, n_head=4)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**TINY, intermediate_size=64, num_key_value_heads=2, num_local_experts=4)
    ),
}
ROWS = 7
LAST_LAYER = {"llama": "layers.5", "opt": "decoder.layers.5", "gpt2": "h.5", "mixtral": "layers.5"}


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (ROWS, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def train_late_layers(model: nn.Module) -> nn.Module:
    """Only the last three of six layers are trained, so the first three are always a prefix."""
    for name, param in model.named_parameters():
        param.requires_grad_(any(f".{i}." in name for i in (3, 4, 5)))
    return model


def run(model: nn.Module, directions: int, shared: bool) -> tuple[list[float], list[Tensor], list[int]]:
    optimizer = zo_dist.ZeroOrder(model, lr=1e-3, directions=directions, self_check=False)
    rows_seen: list[int] = []
    optimizer.layers[1].register_forward_pre_hook(lambda m, args: rows_seen.append(args[0].shape[0]))
    if not shared:
        optimizer.layers = []
    losses = [optimizer.step_batch(batch(), zo_dist.causal_lm_loss) for _ in range(4)]
    return losses, [p.detach().clone() for p in model.parameters()], rows_seen


@pytest.mark.parametrize("directions", [1, 3, ROWS])
@pytest.mark.parametrize("kind", MODELS)
def test_same_bits_and_half_the_rows(kind: str, directions: int) -> None:
    torch.manual_seed(0)
    model = train_late_layers(MODELS[kind]())
    losses, weights, rows = run(copy.deepcopy(model), directions, shared=True)
    plain_losses, plain_weights, plain_rows = run(model, directions, shared=False)
    # Each row of a prefix layer is computed by the same kernels from the same input; a GEMM over half
    # the rows may still add in another order: float32 losses of about 4.6 differ by some 1e-6 at most.
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for ours, plain in zip(weights, plain_weights, strict=True):
        # lr 1e-3 times the slopes' difference, 1e-5 / eps of 1e-3, over 4 steps.
        assert torch.allclose(ours, plain, rtol=0, atol=4e-5)
    assert set(rows) == {ROWS}
    assert set(plain_rows) == {2 * ROWS}


@pytest.mark.parametrize("kind", MODELS)
def test_what_comes_after_the_layers_costs_no_layer(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for name, param in model.named_parameters():
        param.requires_grad_(any(norm in name for norm in ("model.norm", "decoder.final_layer_norm", "ln_f")))
    plain = copy.deepcopy(model)
    last, rows = model.base_model.get_submodule(LAST_LAYER[kind]), []
    last.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    losses, weights, _ = run(model, 3, shared=True)
    plain_losses, plain_weights, _ = run(plain, 3, shared=False)
    # As above: a layer's products over half the rows.
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for ours, theirs in zip(weights, plain_weights, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=4e-5)
    assert set(rows) == {ROWS}


def test_no_prefix_when_a_drawn_module_runs_before_the_layers(caplog: pytest.LogCaptureFixture) -> None:
    """OPT with a projection in front of its layers, trained: its layers must see both sides' rows."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=16))
    for name, param in model.named_parameters():
        param.requires_grad_("project_in" in name or ".5." in name)
    caplog.set_level("INFO")
    losses, weights, rows = run(copy.deepcopy(model), 3, shared=True)
    assert "no shared prefix" in caplog.text
    plain_losses, plain_weights, _ = run(model, 3, shared=False)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))
    assert set(rows) == {2 * ROWS}


class Repeated(nn.Module):
    """Runs its first layer again after the last one, as models that share weights over depth do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, self.layers[0]]:
            x = torch.tanh(layer(x))
        return x


def test_a_layer_that_runs_again_takes_all_rows() -> None:
    torch.manual_seed(0)
    model = Repeated()
    model.layers[0].requires_grad_(False)
    model.layers[1].requires_grad_(False)
    optimizer = zo_dist.ZeroOrder(model, lr=0.1, directions=2, self_check=False)
    seen: list[int] = []
    model.layers[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    x = torch.randn(4, 8)
    optimizer.step_batch({"x": x}, lambda m, b: m(b["x"]).square().mean(1))
    assert seen == [4, 8]


class Positioned(nn.Module):
    """A layer that is told the positions of its tokens, as one row of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(self.mix(x) + positions[:, None] / 7)


class PositionedLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Positioned() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, torch.arange(x.shape[1]))
        return x


def test_positions_are_no_rows_even_where_there_are_as_many() -> None:
    torch.manual_seed(0)
    model = PositionedLayers()
    model.layers[0].requires_grad_(False)
    x = torch.randn(3, 6, 6)  # two sides of three rows: as many as positions
    stacked, single = copy.deepcopy(model), copy.deepcopy(model)
    first, second = (zo_dist.ZeroOrder(m, lr=0.1, self_check=False) for m in (stacked, single))
    loss = first.step_batch({"x": x}, lambda m, b: m(b["x"]).square().mean((1, 2)))
    # The same rows by the same kernels, but for the order of sums in a product over more rows.
    assert loss == pytest.approx(second.step(lambda: single(x).square().mean()), abs=1e-6)
    assert first.record.slopes == pytest.approx(second.record.slopes, abs=1e-6 / first.eps)


def test_a_draw_of_the_embeddings_costs_the_prefix_of_that_step_alone() -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]()
    model.requires_grad_(False)
    for module in (model.model.embed_tokens, model.model.layers[5]):
        module.requires_grad_(True)
    optimizer = zo_dist.ZeroOrder(model, lr=1e-3, sampler=zo_dist.AdaLeZO(ratio=0.5), self_check=False)
    rows_seen: list[int] = []
    optimizer.layers[1].register_forward_pre_hook(lambda m, args: rows_seen.append(args[0].shape[0]))
    (embeddings,) = (i for i, arm in enumerate(optimizer.arms) if "embed_tokens" in arm.params[0].name)
    drawn = []
    for _ in range(12):
        optimizer.step_batch(batch(), zo_dist.causal_lm_loss)
        drawn.append(embeddings in optimizer.record.arms[0])
    # The try that found it out went no further than the embeddings.
    assert rows_seen == [2 * ROWS if with_embeddings else ROWS for with_embeddings in drawn]
    assert False in drawn[drawn.index(True) :]


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_layers_that_are_given_biases_of_heads_run_on_all_rows(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=6, n_head=4))
    else:
        # As many heads as there are stacked rows.
        heads = 2 * ROWS
        model = MptForCausalLM(
            MptConfig(vocab_size=97, d_model=4 * heads, n_layers=6, n_heads=heads, max_seq_len=32)
        )
    losses, weights, _ = run(train_late_layers(copy.deepcopy(model)), 1, shared=True)
    expected, theirs, _ = run(train_late_layers(model), 1, shared=False)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_layers_that_take_up_keys_and_values_of_others_run_on_all_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last layers of a Gemma 4 have none of their own, and get those of shared layers in an object."""
    torch.manual_seed(0)
    small = {
        **TINY,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    small |= {"intermediate_size": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    config = Gemma4TextConfig(
        **small,
        global_head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    )
    model = Gemma4ForCausalLM(config)
    for name, param in model.named_parameters():
        param.requires_grad_("layers.4.mlp" in name)
    caplog.set_level("INFO")
    losses, weights, _ = run(copy.deepcopy(model), 1, shared=True)
    assert "no shared prefix" in caplog.text
    expected, theirs, _ = run(model, 1, shared=False)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))
