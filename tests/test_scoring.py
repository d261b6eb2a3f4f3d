"""Scores and losses on tiny random models, against a plain evaluation without padding."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from zo_dist.tasks import (
    EncodedRow,
    causal_lm_loss,
    choice_loss,
    collate,
    evaluation_loss,
    option_accuracy,
    option_nll_loss,
    option_scores,
    scoring,
)

VOCAB = 50
TINY: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}
LLAMA = LlamaConfig(**TINY, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**TINY, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32, pad_token_id=0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    # No position_ids in its signature: positions are relative, read from the mask.
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
}

# Rows of unlike lengths, options of unlike lengths, and unlike numbers of options.
ROWS = [
    EncodedRow(((3, 4, 5, 6, 7, 8, 9), (3, 4, 5, 6, 10), (3, 4, 5, 6, 11, 12)), (3, 1, 2), 2),
    EncodedRow(((3, 13, 14), (3, 13, 15, 16)), (1, 2), 0),
    EncodedRow(((17, 3, 18, 19, 20, 21, 22, 23, 24), (17, 3, 25)), (7, 1), 1),
]
SINGLE = [
    EncodedRow(((3, 4, 5, 6, 8), (3, 4, 5, 6, 9)), (1, 1), 1),
    EncodedRow(((7, 8), (7, 9)), (1, 1), 0),
    EncodedRow(((3, 10, 8), (3, 10, 9)), (1, 1), 1),
]


@pytest.fixture(params=BUILDERS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():  # random enough for logits that differ by more than rounding
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_single_tokens_need_no_other_words(model: nn.Module) -> None:
    fast = collate(SINGLE, pad_id=0, fast=True)
    head, widths = cast(Any, model).get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, out: widths.append(out.shape[-1]))
    # The first forward finds out whether that can be.
    few = option_scores(model, fast)
    assert torch.equal(option_scores(model, fast), few)
    # As a head that is perturbed: its forward is another's.
    head.forward = head.forward
    torch.testing.assert_close(few, option_scores(model, fast), **CLOSE)
    del head.forward
    assert torch.equal(option_scores(model, fast), few)
    assert widths == [VOCAB, 2, VOCAB, 2]


class OtherWayRound(nn.Module):
    """A model whose head is given columns first."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("kind", ["scaled", "capped", "columns first"])
def test_models_that_do_more_with_logits_keep_them_all(kind: str) -> None:
    torch.manual_seed(0)
    small = {
        **TINY,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    model: Any
    if kind == "scaled":
        model = GraniteForCausalLM(GraniteConfig(**small, logits_scaling=3.0))
    elif kind == "capped":
        model = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, final_logit_softcapping=100.0))
    else:
        model = OtherWayRound(LlamaForCausalLM(LLAMA))
    model = model.eval().requires_grad_(False)
    fast = collate(SINGLE, pad_id=0, fast=True)
    options = {"input_ids": fast["input_ids"], "attention_mask": fast["attention_mask"], "use_cache": False}
    expected = model(**options).logits[:, -1].gather(1, fast["option_ids"])
    for _ in range(2):
        torch.testing.assert_close(option_scores(model, fast), expected, **CLOSE)


def plain_log_probs(model: nn.Module, tokens: tuple[int, ...]) -> Tensor:
    """log p of each token after the first, from one unpadded forward and all of its logits."""
    input_ids = torch.tensor([tokens])
    log_probs: Tensor = model(input_ids=input_ids).logits[0].float().log_softmax(-1)
    return log_probs[:-1].gather(1, input_ids[0, 1:, None])[:, 0]


def plain_scores(model: nn.Module, row: EncodedRow) -> list[float]:
    return [
        plain_log_probs(model, tokens)[-length:].mean().item()
        for tokens, length in zip(row.sequences, row.option_lengths, strict=True)
    ]


# Float32 sums of another order: a few units in the last place of logits near 10.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize("pad_to_multiple", [1, 16])
def test_padding_does_not_change_scores(model: nn.Module, pad_to_multiple: int) -> None:
    batch = collate(ROWS, 0, fast=False, pad_to_multiple=pad_to_multiple)
    scores = option_scores(model, batch)
    assert scores.dtype == torch.float32
    for row, got in zip(ROWS, scores, strict=True):
        want = plain_scores(model, row) + [-torch.inf] * (3 - len(row.sequences))
        torch.testing.assert_close(got, torch.tensor(want), **CLOSE)


def test_fast_form_equals_general_form(model: nn.Module) -> None:
    fast = collate(SINGLE, 0, fast=True)
    general = collate(SINGLE, 0, fast=False)
    scores = option_scores(model, fast)
    torch.testing.assert_close(  # equal up to one constant for each row
        scores.log_softmax(1), option_scores(model, general).log_softmax(1), **CLOSE
    )
    torch.testing.assert_close(choice_loss(model, fast), choice_loss(model, general), **CLOSE)
    torch.testing.assert_close(option_nll_loss(model, fast), option_nll_loss(model, general), **CLOSE)


def test_choice_loss_is_cross_entropy_over_mean_log_probabilities(model: nn.Module) -> None:
    loss = choice_loss(model, collate(ROWS, 0, fast=False))
    want = [-torch.tensor(plain_scores(model, row)).log_softmax(0)[row.label] for row in ROWS]
    torch.testing.assert_close(loss, torch.stack(want), **CLOSE)


def test_option_nll_loss_sums_the_right_option(model: nn.Module) -> None:
    sums, weights = option_nll_loss(model, collate(ROWS, 0, fast=False))
    assert weights.tolist() == [2, 1, 1]
    want = [
        -plain_log_probs(model, row.sequences[row.label])[-row.option_lengths[row.label] :].sum()
        for row in ROWS
    ]
    torch.testing.assert_close(sums, torch.stack(want), **CLOSE)


def causal_batch(sequences: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    ids, mask = [], []
    for tokens in sequences:
        padding = [0] * (width - len(tokens))
        ids.append(padding + tokens if left else tokens + padding)
        ones = [1] * len(tokens)
        mask.append(padding + ones if left else ones + padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


SEQUENCES = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]


@pytest.mark.parametrize("left", [False, True])
def test_causal_lm_loss_without_labels(model: nn.Module, left: bool) -> None:
    sums, weights = causal_lm_loss(model, causal_batch(SEQUENCES, left))
    assert weights.tolist() == [4, 1, 2]
    want = [-plain_log_probs(model, tuple(tokens)).sum() for tokens in SEQUENCES]
    torch.testing.assert_close(sums, torch.stack(want), **CLOSE)
    same = causal_lm_loss(model, {"input_ids": torch.tensor([SEQUENCES[0]])})
    torch.testing.assert_close((sums[:1], weights[:1]), same, **CLOSE)


def test_causal_lm_loss_is_the_loss_of_transformers(model: nn.Module) -> None:
    batch = causal_batch(SEQUENCES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :3] = -100
    sums, weights = causal_lm_loss(model, {**batch, "labels": labels})
    assert weights.tolist() == [2, 1, 2]
    torch.testing.assert_close(sums.sum() / weights.sum(), model(**batch, labels=labels).loss)


def test_rows_without_labels_count_nothing(model: nn.Module) -> None:
    batch = causal_batch(SEQUENCES)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 0] = 3  # nothing comes before it, so nothing predicts it
    sums, weights = causal_lm_loss(model, {**batch, "labels": labels})
    assert sums.tolist() == weights.tolist() == [0, 0, 0]


class Recorder(nn.Module):
    """A model that hides some arguments of another from the signature, and notes its calls."""

    def __init__(self, model: nn.Module, *, hide: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

        def forward(**arguments: Any) -> Any:
            output = model(**arguments)
            self.calls.append({**arguments, "columns": output.logits.shape[1]})
            return output

        signature = inspect.signature(model.forward)
        shown = [p for name, p in signature.parameters.items() if name not in hide]
        vars(forward)["__signature__"] = signature.replace(parameters=shown)
        self.forward = forward


def losses(model: nn.Module) -> list[Tensor]:
    """Every function, on every form of batch."""
    general, fast = collate(ROWS, 0, fast=False), collate(SINGLE, 0, fast=True)
    labels = torch.full((3, 5), -100)
    labels[1, 3] = 7
    causal = {**causal_batch(SEQUENCES), "labels": labels}
    return [
        option_scores(model, general),
        option_scores(model, fast),
        option_nll_loss(model, general)[0],
        option_nll_loss(model, fast)[0],
        causal_lm_loss(model, causal)[0],
    ]


def test_logits_only_where_needed_and_equal_to_those_of_all_columns() -> None:
    model = build("llama")
    keeping, full = Recorder(model), Recorder(model, hide=("logits_to_keep",))
    windowed = losses(keeping)
    # The longest option has 7 tokens, and the logits before them predict them; the one causal label
    # is in column 3 of 5, so logits of columns 2, 3, 4 are asked for.
    assert [call["columns"] for call in keeping.calls] == [8, 1, 8, 1, 3]
    for got, want in zip(windowed, losses(full), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert [call["columns"] for call in full.calls] == [9, 4, 9, 4, 5]
    assert all(call["use_cache"] is False for call in keeping.calls)


def test_the_model_is_called_once_each() -> None:
    model = Recorder(build("llama"))
    losses(model)
    assert len(model.calls) == 5
    # Only the right option of each row is run: 3 sequences, not 9.
    assert [len(call["input_ids"]) for call in model.calls] == [9, 3, 3, 3, 3]


def test_wrappers_are_looked_through() -> None:
    model = build("gpt2")  # learned positions: a wrapper that hides position_ids changes its scores
    batch = collate(ROWS, 0, fast=False)
    want = option_scores(model, batch)

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any, **arguments: Any) -> Any:
            return self.module(*inputs, **arguments)

    assert torch.equal(option_scores(Wrapper(Wrapper(model)), batch), want)
    compiled = cast(nn.Module, torch.compile(model, backend="eager"))
    assert torch.equal(option_scores(compiled, batch), want)

    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
    assert torch.equal(option_scores(Wrapper(lora), batch), want)  # LoRA starts as no change


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prefix_tuning_runs() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(build("llama"), config)
    assert option_scores(model, collate(ROWS, 0, fast=False)).isfinite().sum() == 7


def test_chunks_of_rows_do_not_change_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    whole = losses(model)
    monkeypatch.setattr(scoring, "_FLOAT32_ELEMENTS", 1)
    for got, want in zip(losses(model), whole, strict=True):
        assert torch.equal(got, want)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    model = build("llama").bfloat16()
    for loss in losses(model):
        assert loss.dtype == torch.float32
    batch = causal_batch(SEQUENCES)
    logits = model(**batch).logits.float()
    want = nn.functional.cross_entropy(logits[0, :4], batch["input_ids"][0, 1:], reduction="sum")
    torch.testing.assert_close(causal_lm_loss(model, batch)[0][0], want)


def test_bad_numbers_stay_visible() -> None:
    batch = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "option_ids": torch.tensor([[1, 2], [1, 2]]),
        "label": torch.tensor([0, 1]),
    }

    class Broken(nn.Module):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 5), torch.nan))

    assert choice_loss(Broken(), batch).isnan().all()


def test_accuracy_and_loss_of_an_evaluation() -> None:
    scores = torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, 3.0]])
    batch = {"label": torch.tensor([0, 1])}
    assert option_accuracy(scores, batch).tolist() == [1.0, 0.0]
    want = [torch.log1p(torch.tensor(-2.0).exp()), -torch.tensor([0.0, 1, 3]).log_softmax(0)[1]]
    torch.testing.assert_close(evaluation_loss(scores, batch), torch.stack(want))
    # ReCoRD: any of several right options counts, the first is trained on.
    batch["option_right"] = torch.tensor([[True, False, False], [False, True, True]])
    assert option_accuracy(scores, batch).tolist() == [1.0, 1.0]


def test_the_loss_of_a_single_option_is_that_of_its_tokens(model: nn.Module) -> None:
    rows = [EncodedRow(row.sequences[:1], row.option_lengths[:1], 0) for row in ROWS]
    batch = collate(rows, 0, fast=False)
    want = torch.tensor([-plain_scores(model, row)[0] for row in rows])
    torch.testing.assert_close(evaluation_loss(option_scores(model, batch), batch), want, **CLOSE)
