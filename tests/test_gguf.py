"""Models in GGUF files: what transformers makes of them, kept as a plain model."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from zo_dist.tasks import resolve_model

WIDTH, LAYERS, HEADS, FFN = 64, 2, 4, 96


def write_gguf(path: Path, seed: int = 0) -> None:
    """A Llama of two layers, its matrices in 8 bits, and a tokenizer of single letters."""
    numbers = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    tokens = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ġa", "Ġb", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ a", "Ġ b", "a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    kv = WIDTH // 2
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH)}
    for layer in range(LAYERS):
        of_layer = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH)}
        of_layer |= {"attn_output": (WIDTH, WIDTH), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        of_layer |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        weight = numbers.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_once_converted(tmp_path: Path) -> None:
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(path)
    folder = resolve_model(str(path), cache)
    assert isinstance(folder, Path)
    assert folder.parent == cache
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    # As transformers has it, which knows how llama.cpp turns the heads' rows.
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    expected = direct.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected[name]), name
    assert model.config.num_key_value_heads == HEADS // 2
    assert AutoTokenizer.from_pretrained(folder)("ab a").input_ids == [30, 28]
    # It is kept, until the file changes.
    written = (folder / "model.safetensors").stat()
    assert resolve_model(str(path), cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    write_gguf(path, seed=1)
    os.utime(path, ns=(1, 1))
    other = resolve_model(str(path), cache)
    assert other != folder
    changed = AutoModelForCausalLM.from_pretrained(other).state_dict()
    assert any(not torch.equal(changed[name], weight) for name, weight in expected.items())
    assert [entry for entry in cache.iterdir() if entry.name.startswith(".")] == []


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF, but not really")
    with pytest.raises(ValueError, match=r"broken\.gguf' cannot be read as GGUF"):
        resolve_model(str(path), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
