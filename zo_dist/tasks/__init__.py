"""Tasks: data sources, prompts, batches, and the losses and scores of language models."""

from zo_dist.tasks.base import Example, Task
from zo_dist.tasks.encoding import EncodedRow, collate, collate_prompts, encode, single_token
from zo_dist.tasks.generation import TextGenerator, TextScore
from zo_dist.tasks.metrics import TEXT_METRICS, exact_match, f1
from zo_dist.tasks.prompts import TASKS, get_task
from zo_dist.tasks.scoring import (
    COMPOSITES,
    accuracy_score,
    causal_lm_loss,
    choice_loss,
    choice_margin,
    evaluation_loss,
    option_accuracy,
    option_nll_loss,
    option_scores,
)
from zo_dist.tasks.sources import load_rows, resolve_model
from zo_dist.tasks.splits import Splits, load_splits

__all__ = [
    "COMPOSITES",
    "TASKS",
    "TEXT_METRICS",
    "EncodedRow",
    "Example",
    "Splits",
    "Task",
    "TextGenerator",
    "TextScore",
    "accuracy_score",
    "causal_lm_loss",
    "choice_loss",
    "choice_margin",
    "collate",
    "collate_prompts",
    "encode",
    "evaluation_loss",
    "exact_match",
    "f1",
    "get_task",
    "load_rows",
    "load_splits",
    "option_accuracy",
    "option_nll_loss",
    "option_scores",
    "resolve_model",
    "single_token",
]
