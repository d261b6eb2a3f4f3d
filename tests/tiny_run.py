"""A tiny model, tokenizer and data set on disk, and a config that trains them in seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ["lovely", "clever", "warm", "bright"]
BAD = ["dull", "cold", "dreary", "clumsy"]


def write_rows(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Sentences of four words, labelled 1 if the words are good."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = " ".join(draw.choices(GOOD if i % 2 else BAD, k=4))
        rows.append({"text": f"number {i} {words}", "label": i % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(path: Path, *, tied: bool = True, layers: int = 3) -> Path:
    """A random Llama with a byte-level tokenizer trained on the rows' words; 33 rows of odd shapes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = " ".join([*GOOD, *BAD, "number", "It was great", "It was terrible"])
    # An odd vocabulary, so that two ranks hold embeddings of different sizes.
    trainer = trainers.BpeTrainer(
        vocab_size=401, special_tokens=["<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([f" {words}"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=401,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def tiny_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run on the files in `folder`, made if absent; `sections` change them."""
    model, rows = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        write_model(model)
    if not rows.exists():
        write_rows(rows)
    settings: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32"},
        "data": {"task": "sst2", "source": str(rows), "train": 20, "validation": 9, "test": 21},
        "optimizer": {"lr": 1e-3, "directions": 2},
        "train": {"steps": 3, "rows": 4, "eval_every": 2, "eval_micro_rows": 4, "tensorboard": False},
    }
    settings["train"]["output"] = str(folder / "run")
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return settings


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder, **sections)))
    return path


def launch(args: list[str], ranks: int = 2, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The same command on so many new ranks (see workers.py): the first failure, and what all said."""
    ended = workers.launch([args] * ranks, timeout)
    code = next((rank.returncode for rank in ended if rank.returncode), 0)
    texts = ("".join(rank.stdout for rank in ended), "".join(rank.stderr for rank in ended))
    return subprocess.CompletedProcess(args, code, *texts)


def as_on_one_process(folder: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """The result of a run on two processes, whose losses before and after are those of a run on one."""
    results = []
    for ranks, of_ranks in ((1, {"kind": "replicated"}), (2, engine)):
        place = folder / str(ranks)
        place.mkdir()
        done = launch(["train", str(write_config(place, engine=of_ranks))], ranks)
        assert done.returncode == 0, done.stderr
        (result,) = place.rglob("result.json")
        results.append(json.loads(result.read_text()))
    one, other = results
    for key in ("loss_before", "loss_after"):
        assert other[key] == pytest.approx(one[key], abs=1e-3)
    assert one["loss_after"] != one["loss_before"]
    return dict(other)


def environment() -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | settings


def result_of(output: str) -> dict[str, Any]:
    """The machine-readable line of a run; a launcher may print more after it."""
    (line,) = (line for line in output.splitlines() if line.startswith("result: "))
    result: dict[str, Any] = json.loads(line.removeprefix("result: "))
    return result
