"""Models in GGUF files, as llama.cpp has them: dequantised once, into files that ranks read in parts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from zo_dist.cache import default_cache, made_once


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """The folder with what `dequantise` makes of a file, kept in `cache` until the file changes.

    ValueError for a file that transformers cannot read.
    """
    gguf, about = gguf.resolve(), gguf.stat()
    which = hashlib.sha256(f"{gguf} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    final = (cache or default_cache()).expanduser() / f"{gguf.stem}-{which}"
    try:
        return made_once(final, lambda scratch, ready: dequantise(gguf, ready))
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ValueError(f"{str(gguf)!r} cannot be read as GGUF: {error or type(error).__name__}") from error


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a plain bfloat16 model with its tokenizer. Memory: the whole model, in float32."""
    # Slow to import, and data packages do without them.
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # where packed weights are possible, refuse them
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options, **dense)
    # Some versions mark the result as quantised, and it then refuses to be saved: move its weights
    # into a model built from the bare config.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
