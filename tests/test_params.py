"""Names, owners, arms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from models import EXPERTS, build
from test_reference import arms_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from workers import Pool

import zo_dist
from zo_dist.params import Arm, canonical_name, group_arms, trainable_params, unwrap

LAYERS = {
    "llama": ("model.layers.0", "model.layers.1"),
    "llama_tied": ("model.layers.0", "model.layers.1"),
    "qwen3": ("model.layers.0", "model.layers.1"),
    "mixtral": ("model.layers.0", "model.layers.1"),
    "qwen3_moe": ("model.layers.0", "model.layers.1"),
    "deepseek": ("model.layers.0", "model.layers.1"),
    "opt": ("model.decoder.layers.0", "model.decoder.layers.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "sequential": ("0", "2", "3", "4", "5"),
}


def arms(model: nn.Module, pattern: str | None = None) -> list[Arm]:
    module = unwrap(model)
    return group_arms(module, trainable_params(module, lambda p: p.shape), pattern)


def names(model: nn.Module) -> list[str]:
    return [p.name for p in trainable_params(unwrap(model), lambda p: p.shape)]


@pytest.mark.parametrize("kind", list(LAYERS))
def test_arms_are_embeddings_each_layer_and_the_rest(kind: str) -> None:
    model = build(kind)
    found = arms(model)
    expected = ["embeddings", *LAYERS[kind], "rest"] if kind != "sequential" else list(LAYERS[kind])
    assert [a.name for a in found] == expected
    assert [sorted(p.name for p in a.params) for a in found] == [sorted(arm) for arm in arms_of(kind, model)]
    assert sum(a.numel for a in found) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("wrapper", ["compile", "checkpoint", "compile a layer"])
def test_wrappers_leave_no_trace_in_names_and_arms(wrapper: str) -> None:
    plain, model = build("llama"), build("llama")
    if wrapper == "compile":
        model = torch.compile(model)
    elif wrapper == "checkpoint":
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer)
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1])
        model.model.layers[0] = torch.compile(model.model.layers[0])
    assert names(model) == names(plain)
    assert [(a.name, [p.name for p in a.params]) for a in arms(model)] == [
        (a.name, [p.name for p in a.params]) for a in arms(plain)
    ]


def names_under_ddp() -> tuple[list[str], list[str]]:
    plain, wrapped = build("sequential"), nn.parallel.DistributedDataParallel(build("sequential"))
    return names(plain), [p.name for p in zo_dist.ZeroOrder(wrapped).params]


def test_ddp_leaves_no_trace(pool: Callable[[int], Pool]) -> None:
    for plain, wrapped in pool(2).run(names_under_ddp):
        assert plain == wrapped


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    model = nn.Sequential()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight", "module.bias"]
    assert canonical_name("a._orig_mod.b._checkpoint_wrapped_module.c") == "a.b.c"


def test_a_tied_weight_has_one_name_and_all_its_owners() -> None:
    model = build("llama_tied")
    tied = [p for p in trainable_params(model, lambda p: p.shape) if len(p.owners) > 1]
    assert [p.name for p in tied] == ["model.embed_tokens.weight"]
    assert [type(owner.module).__name__ for owner in tied[0].owners] == ["Embedding", "Linear"]


def test_frozen_parameters_are_left_out_and_left_alone() -> None:
    model = build("llama")
    for name, param in model.named_parameters():
        param.requires_grad_("layers.1." in name)
    assert [a.name for a in arms(model)] == ["model.layers.1"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = zo_dist.ZeroOrder(model, lr=0.1)
    optimizer.step_batch({"input_ids": torch.arange(12).view(2, 6)}, zo_dist.causal_lm_loss)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) != param.requires_grad, name


def test_peft_models_train_their_adapters_layer_by_layer() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config)
    found = arms(model)
    assert len(found) == 2
    for i, arm in enumerate(found):
        assert arm.name.endswith(f"layers.{i}")
        assert len(arm.params) == 4
        assert all("lora_" in p.name for p in arm.params)
    optimizer = zo_dist.ZeroOrder(model, lr=1e-2, sampler=zo_dist.AdaLeZO(ratio=0.5))
    loss = optimizer.step_batch({"input_ids": torch.arange(12).view(2, 6)}, zo_dist.causal_lm_loss)
    assert 0 < loss < 100


def test_a_nearly_empty_arm_joins_its_neighbour() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 1, bias=False), nn.Linear(1, 1, bias=False))
    assert [a.name for a in arms(model)] == ["0", "1+2"]


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_may_be_arms_of_their_own(kind: str) -> None:
    """And the router another, small as it is; what remains of a layer stays together, and in its place."""
    found = {arm.name: [p.name for p in arm.params] for arm in arms(build(kind), r"mlp\.(experts|gate)\b")}
    layers = (1,) if kind == "deepseek" else (0, 1)
    # deepseek has an embedding in front of a dense layer.
    expected = ["embeddings", *(["model.layers.0"] if kind == "deepseek" else [])]
    for i in layers:
        layer = f"model.layers.{i}"
        expected += [layer, f"{layer}.mlp.gate", f"{layer}.mlp.experts"]
        experts = [f"{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        assert found[f"{layer}.mlp.experts"] == experts
        assert found[f"{layer}.mlp.gate"] == [f"{layer}.mlp.gate.weight"]
        assert not any(".experts." in name or ".gate." in name for name in found[layer])
    assert set(found) == {*expected, "rest"}
    # Layers stay in order, each with its arms; some models have the router after the experts.
    assert [name for name in found if "mlp" not in name] == [*(n for n in expected if "mlp" not in n), "rest"]
    assert sorted(itertools.chain(*found.values())) == sorted(names(build(kind)))


def test_a_pattern_may_name_modules_parameters_or_what_lies_in_several_layers() -> None:
    model = build("llama")
    modules = [arm.name for arm in arms(model, r"layers\.\d+\.[^.]+")]
    assert modules[:3] == ["embeddings", "model.layers.0.self_attn", "model.layers.0.mlp"]
    assert [arm.name for arm in arms(model, r"[^.]+$")] == names(model)
    assert [arm.name for arm in arms(model, r"^model\.")] == ["model.", "rest"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("experts", "arms is 'experts'.*names look like model.layers"), ("(", "not a regular expression")],
)
def test_a_pattern_that_finds_nothing_or_is_none_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zo_dist.ZeroOrder(build("llama"), arms=pattern)


def test_a_state_of_other_arms_is_refused() -> None:
    saved = zo_dist.ZeroOrder(build("llama")).state_dict()
    finer = zo_dist.ZeroOrder(build("llama"), arms=r"[^.]+$")
    with pytest.raises(ValueError, match=f"of 4 arms, this optimizer has {len(finer.params)}"):
        finer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.ReLU(), "no trainable parameter"),
        (lambda: nn.Linear(2, 2).double(), "torch.float64"),
    ],
)
def test_models_without_trainable_weights_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zo_dist.ZeroOrder(make())
