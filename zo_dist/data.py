"""From the config to the tokens of each split."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zo_dist.config import DataConfig
from zo_dist.tasks import EncodedRow, Task, TextGenerator, encode, get_task, load_splits, single_token

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The rows of a run. `fast`: which form `collate` gives them. `truncated`: rows cut short.

    `generate`: what writes the answers of the task; None where it has options.
    """

    task: Task
    train: list[EncodedRow]
    validation: list[EncodedRow]
    test: list[EncodedRow]
    truncated: int
    fast: bool
    pad_id: int
    generate: TextGenerator | None


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> RunData:
    """Draw and tokenise the splits; `longest` is the model's own limit in tokens.

    ValueError for a source, a task, or a row that cannot be read.
    """
    task = get_task(config.task)
    source = config.source or task.source
    if source is None:
        raise ValueError(f"data.source is null, but there is no published data set of the task {task.name!r}")
    try:
        splits = load_splits(
            task,
            source,
            train=config.train,
            validation=config.validation,
            test=config.test,
            seed=config.seed,
        )
    except StopIteration:  # from the datasets library, for a file without a line
        raise ValueError(f"data.source {source} holds no row; it must have some") from None
    limits = [limit for limit in (config.max_length, longest) if limit is not None]
    max_length = min(limits) if limits else 2**31
    if task.generates and config.max_new_tokens >= max_length:
        raise ValueError(
            f"data.max_new_tokens is {config.max_new_tokens}; it must be below the {max_length} tokens of "
            "prompt and answer (data.max_length, or the model's own limit)"
        )
    lengths = max_length, config.max_new_tokens
    train, cut_train = encode(splits.train, tokenizer, *lengths)
    validation, cut_validation = encode(splits.validation, tokenizer, *lengths)
    test, cut_test = encode(splits.test, tokenizer, *lengths)
    truncated = cut_train + cut_validation + cut_test
    total = len(train) + len(validation) + len(test)
    log.log(
        logging.WARNING if truncated else logging.INFO,
        "%d of %d rows were longer than %d tokens and lost the start of their prompt",
        *(truncated, total, max_length),
    )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return RunData(
        task=task,
        train=train,
        validation=validation,
        test=test,
        truncated=truncated,
        fast=single_token(train + validation + test),
        # Masked, so that which token it is does not matter.
        pad_id=int(pad_id or 0),
        generate=TextGenerator(tokenizer, config.max_new_tokens, task.stop) if task.generates else None,
    )
