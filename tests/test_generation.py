"""Texts that models write, and training on their scores: one process, 2 ranks, both perturb modes."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from workers import Pool, needs_deepspeed, wrap

from zo_dist import Objective, TextGenerator, TextScore, ZeroOrder, causal_lm_loss
from zo_dist.config import Config, load_config
from zo_dist.engines import Engine
from zo_dist.evaluate import evaluate
from zo_dist.loop import require_objective
from zo_dist.params import trainable_params
from zo_dist.parts import Probe, Shifts
from zo_dist.perturb import ModulePerturbation, ShardPerturbation
from zo_dist.tasks import EncodedRow, get_task
from zo_dist.train import run_evaluation, run_training

DOCS = Path(__file__).parent.parent / "docs"
WORDS = ["red", "green", "blue", "ice", "sun", "yes", "no", "maybe"]
NEWLINE, END = 10, 1
MAX_NEW = 9


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; one token is a line break, one a word with a line break after it.

    transformers tells what tokens stand for from how they follow "abcdef", which has to be a word too.
    """
    vocabulary = {"<pad>": 0, "</s>": END, **{word: i + 2 for i, word in enumerate(WORDS)}}
    vocabulary |= {"\n": NEWLINE, "so\n": NEWLINE + 1, "abcdef": NEWLINE + 2, "<unk>": NEWLINE + 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(kind: str = "llama", layers: int = 3, spread: float = 0.5) -> Any:
    """Random enough that greedy texts differ between rows."""
    torch.manual_seed(1)
    size: dict[str, Any] = {"vocab_size": 14, "pad_token_id": 0, "eos_token_id": END, "bos_token_id": END}
    if kind == "gpt2":  # learned positions: padding would shift them
        model: Any = GPT2LMHeadModel(GPT2Config(**size, n_embd=16, n_layer=layers, n_head=4, n_positions=40))
    else:
        size |= {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=layers, num_key_value_heads=2))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(spread * torch.randn_like(param))
    return model.eval()


def make_batch(rows: int = 6) -> dict[str, Any]:
    torch.manual_seed(2)
    input_ids = torch.randint(2, NEWLINE, (rows, 7))
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        attention_mask[row, : row % 4] = 0
    answers = [(WORDS[row % 8], WORDS[(3 * row) % 8] + " ice") for row in range(rows)]
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask, "answers": answers}


def share_of_red(text: str, answers: Any) -> float:
    """A metric that moves with every word of a text."""
    return sum(1 + WORDS.index(word) for word in text.split() if word in WORDS) / 40


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_are_those_of_transformers_row_by_row(kind: str) -> None:
    model, tokenizer, batch = make_model(kind), make_tokenizer(), make_batch()
    # What a model on the hub may ask for: sampling, penalties.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=END, pad_token_id=0
    )
    texts = TextGenerator(tokenizer, MAX_NEW)(model.train(), batch)
    assert model.training  # put back; there is no dropout in the texts
    model.eval()
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        tokens = ids[mask.bool()][None]
        # Without a cache and without padding: the whole sequence again for each token.
        for _ in range(MAX_NEW):
            following = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
            if following.item() == END:
                break
        written = tokens[0, int(mask.sum()) :]
        assert text == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert len(set(texts)) > 2
    plain = model.generate(
        **{key: batch[key] for key in ("input_ids", "attention_mask")},
        max_new_tokens=MAX_NEW,
        do_sample=False,
        repetition_penalty=1.0,
    )
    decoded = tokenizer.batch_decode(plain[:, 7:], skip_special_tokens=True)
    assert texts == [text.strip() for text in decoded]


class Scripted(nn.Module):
    """A model that writes what it is told, and notes how many tokens it was asked for."""

    def __init__(self, written: list[int]) -> None:
        super().__init__()
        self.inner = make_model()
        self.inner.register_forward_hook(self._say)
        self.written, self.asked = written, 0

    def _say(self, module: nn.Module, args: object, output: Any) -> None:
        output.logits.fill_(0.0)
        output.logits[:, -1, self.written[self.asked]] = 9.0
        self.asked += 1


@pytest.mark.parametrize("line_break", [NEWLINE, NEWLINE + 1])
def test_a_text_stops_at_a_line_break_also_inside_a_token(line_break: int) -> None:
    model, batch = Scripted([2, 4, line_break, 5, 6, 7, 8]), make_batch(2)
    texts = TextGenerator(make_tokenizer(), 7, stop="\n")(model.inner, batch)
    assert texts == ["red blue" if line_break == NEWLINE else "red blue so"] * 2
    assert model.asked == 3
    model.asked = 0
    assert TextGenerator(make_tokenizer(), 7)(model.inner, batch)[0].endswith("no")
    assert model.asked == 7


def test_a_model_that_cannot_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no generate"):
        TextGenerator(make_tokenizer())(nn.Linear(2, 2), make_batch())


# --- perturbed texts -----------------------------------------------------------------------------


def score() -> TextScore:
    return TextScore(TextGenerator(make_tokenizer(), MAX_NEW), share_of_red)


@pytest.mark.parametrize("mode", ["module", "shard"])
def test_texts_at_a_shift_of_nothing_are_the_unshifted_ones(mode: str) -> None:
    model, batch = make_model(), make_batch()
    optimizer = ZeroOrder(model, compile=False)
    params = trainable_params(model, optimizer.engine.shape_of)
    probe = Probe(0, 1.0, frozenset(p.name for p in params))
    clean = score()(model, batch)
    for shift in (0.0, 0.1):
        shifts = Shifts(optimizer.noise, 0, shift)
        if mode == "module":
            copies = ModulePerturbation(params, shifts)
            with copies.installed(), copies.probes([(probe, 6)]):
                scores = score()(model, batch)
        else:
            with ShardPerturbation(shifts, lambda: None).shifted(optimizer.engine.spans(params), probe):
                scores = score()(model, batch)
        assert torch.equal(scores, clean) == (shift == 0.0)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("trained", ["", "layers.2"], ids=["all", "last layer"])
def test_both_perturb_modes_see_the_same_scores(directions: int, trained: str) -> None:
    """Stacked probes with one KV cache, or a `generate` for each; the first layers are not shared then."""
    slopes = []
    for mode in ("module", "shard"):
        model = make_model()
        for name, param in model.named_parameters():
            param.requires_grad_(trained in name)
        options: dict[str, Any] = {"directions": directions, "compile": False, "eps": 0.1, "lr": 0.0}
        optimizer = ZeroOrder(model, perturb=mode, **options)
        losses = [optimizer.step_batch(make_batch(), Objective(score())) for _ in range(3)]
        slopes.append((losses, optimizer.record.slopes))
    assert slopes[0] == slopes[1]
    assert any(slopes[0][1])


def test_lists_of_a_batch_are_cut_like_its_tensors() -> None:
    """Each direction's rows come with their own answers, in every micro-batch and in both modes."""
    seen: list[tuple[list[int], list[int]]] = []

    def rows(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        seen.append((batch["input_ids"][:, 0].tolist(), batch["names"]))
        return -logits[:, -1, 3]

    input_ids = torch.arange(2, 8)[:, None].repeat(1, 3)
    batches = [
        {"input_ids": input_ids[a:b], "names": input_ids[a:b, 0].tolist(), "tags": ["x", "y"]}
        for a, b in ((0, 4), (4, 6))
    ]
    for mode in ("module", "shard"):
        optimizer = ZeroOrder(make_model(), perturb=mode, directions=3, compile=False, self_check=False)
        optimizer.step_batch(batches, Objective(rows))
    assert all(ids == names for ids, names in seen)
    assert {len(ids) for ids, _ in seen} == {8, 4, 2, 1}


def test_the_start_up_check_is_made_with_the_smooth_loss() -> None:
    """A score that no shift moves is no dead arm."""
    optimizer = ZeroOrder(make_model(), compile=False)
    flat = Objective(lambda model, batch: model(input_ids=batch["input_ids"]).logits.sum((1, 2)) * 0.0)
    assert optimizer.step_batch(make_batch(), flat) == 1.0
    assert optimizer.record.slopes == (0.0,)
    with pytest.raises(ValueError, match="does not change the loss"):
        ZeroOrder(make_model(), compile=False).step_batch(make_batch(), flat.score)


# --- sharded -------------------------------------------------------------------------------------


def texts_on_rank(engine: str, trained: str) -> dict[str, Any]:
    """Texts of unlike lengths on the ranks, clean and perturbed, and the score of an evaluation."""
    import torch.distributed as dist

    rank, model, batch = dist.get_rank(), make_model(), make_batch()
    for name, param in model.named_parameters():
        param.requires_grad_(trained in name)
    # Rank 0 has the rows that end soonest, so that it waits for rank 1.
    mine = {key: value[3 * rank : 3 * rank + 3] for key, value in batch.items()}
    wrapped = wrap(engine, model)
    result: dict[str, Any] = {}
    for mode in ("module", "shard"):
        options: dict[str, Any] = {"directions": 1, "compile": False, "eps": 0.1, "lr": 0.0}
        optimizer = ZeroOrder(wrapped, perturb=mode, **options)
        result["texts"] = TextGenerator(make_tokenizer(), MAX_NEW)(optimizer.engine.module, mine)
        optimizer.engine.publish()
        loss = optimizer.step_batch(mine, Objective(score()))
        result[mode] = loss, optimizer.record.slopes
    rows = [
        EncodedRow(((*ids[mask.bool()].tolist(), 3),), (1,), 0, (), answers, tuple(ids[mask.bool()].tolist()))
        for ids, mask, answers in zip(*batch.values(), strict=True)
    ]
    found = evaluate(
        optimizer.engine,
        rows[:5],  # three batches of two: one rank runs a row that does not count
        micro_rows=2,
        pad_id=0,
        fast=False,
        metrics=("f1", "em"),
        generate=TextGenerator(make_tokenizer(), MAX_NEW),
    )
    return result | {"score": (found.metrics, found.loss)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process sees of the same rows."""
    results: dict[str, Any] = {}
    for trained in ("", "layers.2"):
        model, batch = make_model(), make_batch()
        for name, param in model.named_parameters():
            param.requires_grad_(trained in name)
        optimizer = ZeroOrder(model, compile=False, eps=0.1, lr=0.0)
        loss = optimizer.step_batch(batch, Objective(score()))
        results[trained] = loss, optimizer.record.slopes
    results["texts"] = TextGenerator(make_tokenizer(), MAX_NEW)(make_model(), make_batch())
    return results


@pytest.mark.parametrize("trained", ["", "layers.2"], ids=["all", "last layer"])
@pytest.mark.parametrize("engine", ["fsdp2", "replicated", pytest.param("zero3", marks=needs_deepspeed)])
def test_two_ranks_write_the_same_texts(
    engine: str, trained: str, pool: Callable[[int], Pool], alone: dict[str, Any]
) -> None:
    lengths = [len(text.split()) for text in alone["texts"]]
    assert max(lengths[:3]) != max(lengths[3:]), "the ranks are to stop at different tokens"
    results = pool(2).run(texts_on_rank, engine, trained)
    assert results[0]["texts"] + results[1]["texts"] == alone["texts"]
    for result in results:
        for mode in ("module", "shard"):
            loss, slopes = result[mode]
            # The same numbers, added up in another order.
            assert loss == pytest.approx(alone[trained][0], rel=1e-6)
            assert slopes == pytest.approx(alone[trained][1], rel=1e-5, abs=1e-6)
        assert result["score"] == results[0]["score"]


# --- runs ----------------------------------------------------------------------------------------


def write_run(folder: Path, **train: Any) -> Path:
    """Questions whose answer is the thing's colour, a tiny model, and a config that lowers 1 - F1."""
    import yaml

    make_model(layers=1, spread=0.2).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"input": f"{WORDS[i % 5]} {WORDS[(i // 5) % 5]}", "target": ["yes"]} for i in range(40)]
    (folder / "rows.json").write_text(json.dumps({"examples": rows}))
    settings = {
        "model": {"source": str(folder / "model"), "dtype": "float32"},
        "data": {
            "task": "qasc",
            "source": f"{folder / 'rows.json'}:examples",
            "train": 16,
            "validation": 8,
            "test": 16,
            "max_new_tokens": 2,
        },
        "optimizer": {"lr": 0.05, "eps": 0.05, "directions": 8},
        "train": {
            "steps": 20,
            "objective": "f1",
            "rows": 16,
            "eval_every": 10,
            "tensorboard": False,
            "output": str(folder / "run"),
            **train,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def train_on_rank(path: Path) -> dict[str, Any]:
    ranks = Engine(nn.Identity(), torch.device("cpu"))
    config = load_config(path, ["engine.kind=fsdp2"])
    return run_training(config, ranks)


def test_training_on_f1_raises_f1_on_two_ranks(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    path = write_run(tmp_path)
    result, other = pool(2).run(train_on_rank, path)
    assert result["f1_after"] == other["f1_after"]
    assert (result["engine"], result["ranks"]) == ("fsdp2", 2)
    assert result["f1_before"] < 0.3
    assert result["f1_after"] > result["f1_before"] + 0.3
    # The weights that were best by the objective, and what was written of it.
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [e["f1"] for e in events if e["event"] == "eval" and e["split"] == "validation"]
    assert len(validations) == 2
    best = load_config(path, [f"model.source={tmp_path / 'run' / 'best'}"])
    again = run_evaluation(best, Engine(nn.Identity(), torch.device("cpu")))
    assert list(again)[:3] == ["f1", "em", "loss"]
    assert again["f1"] > 0.3
    assert (tmp_path / "run" / "run.png").stat().st_size > 5000


def test_objectives_are_those_of_the_task(tmp_path: Path) -> None:
    require_objective("accuracy", get_task("sst2"))
    require_objective("em", get_task("drop"))
    with pytest.raises(ValueError, match="objective is f1; for the task 'sst2' it may be loss, accuracy"):
        require_objective("f1", get_task("sst2"))
    with pytest.raises(ValueError, match="for the task 'instruct' it may be loss"):
        require_objective("accuracy", get_task("instruct"))
    config: Config = load_config(write_run(tmp_path), ["data.max_new_tokens=3000"])
    with pytest.raises(ValueError, match="max_new_tokens is 3000; it must be below the 2048 tokens"):
        run_training(config, Engine(nn.Identity(), torch.device("cpu")))
    config = load_config(tmp_path / "config.yaml", ["data.source=null"])
    with pytest.raises(ValueError, match="no published data set of the task 'qasc'"):
        run_training(config, Engine(nn.Identity(), torch.device("cpu")))


def test_the_example_of_an_own_score_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(layers=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["objective.py", "--model", str(tmp_path), "--steps", "2", "--lr", "1e-3"]
    )
    runpy.run_path(str(DOCS / "examples" / "objective.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("loss ")


def test_a_smooth_loss_is_the_default_check() -> None:
    assert Objective(score()).check is causal_lm_loss
