"""Tasks: data sources, prompts, batches, and the losses and scores of language models."""

from zo_dist.tasks.base import Example, Task
from zo_dist.tasks.encoding import EncodedRow, collate, encode, single_token
from zo_dist.tasks.prompts import TASKS, get_task
from zo_dist.tasks.scoring import (
    accuracy_and_loss,
    causal_lm_loss,
    choice_loss,
    option_nll_loss,
    option_scores,
)
from zo_dist.tasks.sources import load_rows, resolve_model
from zo_dist.tasks.splits import Splits, load_splits

__all__ = [
    "TASKS",
    "EncodedRow",
    "Example",
    "Splits",
    "Task",
    "accuracy_and_loss",
    "causal_lm_loss",
    "choice_loss",
    "collate",
    "encode",
    "get_task",
    "load_rows",
    "load_splits",
    "option_nll_loss",
    "option_scores",
    "resolve_model",
    "single_token",
]
