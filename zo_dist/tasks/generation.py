"""Texts that the model writes, and their scores: transformers' `generate`, greedy, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zo_dist.engines import forwards_in_step
from zo_dist.params import evaluating
from zo_dist.tasks.metrics import TextMetric, f1
from zo_dist.tasks.scoring import Batch, base_model, contiguous_head_input, head_of

if TYPE_CHECKING:  # the package is imported without transformers, which takes a second
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextGenerator:
    """The model's greedy continuation of each row's prompt: `generate(model, batch) -> list of R texts`.

    batch: input_ids and attention_mask [R, T], padded on the left. `max_new_tokens`: the most tokens of a
    text. A text ends before the first `stop`, if one is given (its row is generated no further), or with
    a token that the model's generation config names as the end. Outer blanks go.

    Sampling, beams and penalties that a model's generation config asks for are off: two probes differ by
    their weights alone. Cost: one forward per token of the longest text; on sharded weights each of them
    gathers all weights, and all ranks make as many as the one with the longest text (`synced_gpus`).
    Raises ValueError for a model without `generate`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 50
    stop: str | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> list[str]:
        module = model if hasattr(model, "generate") else base_model(model)
        generate = getattr(module, "generate", None)
        if generate is None:
            raise ValueError(f"{type(module).__name__} has no generate: texts need a transformers model")
        prompts = batch["input_ids"]
        with evaluating(module), contiguous_head_input(head_of(base_model(model))):
            tokens = generate(
                input_ids=prompts,
                attention_mask=batch["attention_mask"],
                generation_config=self._config(),
                synced_gpus=forwards_in_step(module),
                tokenizer=self.tokenizer,
            )
        texts = self.tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
        return [(text.partition(self.stop)[0] if self.stop else text).strip() for text in texts]

    def _config(self) -> GenerationConfig:
        from transformers import GenerationConfig

        pad = self.tokenizer.pad_token_id
        return GenerationConfig(  # type: ignore[no-untyped-call,unused-ignore]
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            stop_strings=None if self.stop is None else [self.stop],
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
        )


@dataclass(frozen=True)
class TextScore:
    """`metric(text, answers)` of what `generate` writes for each row: [R] float32, on the batch's device.

    batch: what `generate` takes, and `answers`, a list of R sequences of strings. For `zo_dist.Objective`.
    """

    generate: Callable[[nn.Module, Batch], list[str]]
    metric: TextMetric = f1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        texts = self.generate(model, batch)
        scores = [self.metric(text, right) for text, right in zip(texts, batch["answers"], strict=True)]
        return torch.tensor(scores, device=batch["input_ids"].device)
