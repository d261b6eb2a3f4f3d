"""The tasks and their prompts, one function each. A new task is one function and one entry here.

sst2, boolq and copa are worded as in MeZO (princeton-nlp/MeZO, large_models/templates.py), so
results compare. siqa and piqa are not among the tasks of the MeZO paper: their wording, plain
"Question: ... Answer:", is also what its code has for them, but there is nothing to compare with.
"""

import difflib

from zo_dist.tasks.base import Example, Task, label_field, text_field
from zo_dist.tasks.packages import Row

_BINARY = {"0": 0, "1": 1}


def _sst2(row: Row) -> Example:
    """Sentiment of a sentence. MeZO: "<text> It was" + " terrible" (0) / " great" (1)."""
    text = text_field(row, "text", "sentence").strip()
    return Example(
        prompt=f"{text} It was",
        options=(" terrible", " great"),
        label=label_field(row, ("label",), _BINARY),
    )


def _boolq(row: Row) -> Example:
    """Yes or no to a question about a passage. MeZO (its default, third wording of BoolQ):
    "<passage> <Question>?" + newline + "Yes" / "No".
    """
    question = text_field(row, "question").strip()
    question = question[:1].upper() + question[1:]
    question += "" if question.endswith("?") else "?"
    # true and 1 mean yes, which is option 0 as in MeZO.
    answers = {"true": 0, "false": 1, "1": 0, "0": 1}
    return Example(
        prompt=f"{text_field(row, 'passage')} {question}\n",
        options=("Yes", "No"),
        label=label_field(row, ("answer", "label"), answers),
    )


def _copa(row: Row) -> Example:
    """The likelier cause or effect of a premise. MeZO: the premise without its full stop,
    " because" / " so", then the choice with a lower-case first word (unless it is "I").
    """
    conjunctions = {"cause": " because", "effect": " so"}
    kind = text_field(row, "question")
    if kind not in conjunctions:
        raise ValueError(f"field question is {kind!r}; legal values: cause, effect")
    premise = text_field(row, "premise").rstrip().removesuffix(".")
    choices = (text_field(row, "choice1"), text_field(row, "choice2"))
    return Example(
        prompt=premise + conjunctions[kind],
        options=tuple(f" {_lower_first_word(choice)}" for choice in choices),
        label=label_field(row, ("label",), _BINARY),
    )


def _lower_first_word(text: str) -> str:
    first, space, rest = text.partition(" ")
    return text if first == "I" else first.lower() + space + rest


def _siqa(row: Row) -> Example:
    """Social IQa: what people feel, want or do. No task of the MeZO paper."""
    prompt = f"Question: {text_field(row, 'context')} {text_field(row, 'question')}\nAnswer:"
    options = tuple(f" {text_field(row, name)}" for name in ("answerA", "answerB", "answerC"))
    return Example(prompt, options, label_field(row, ("label",), {"1": 0, "2": 1, "3": 2}))


def _piqa(row: Row) -> Example:
    """PIQA: which way of doing something works. No task of the MeZO paper."""
    options = tuple(f" {text_field(row, name)}" for name in ("sol1", "sol2"))
    prompt = f"Question: {text_field(row, 'goal')}\nAnswer:"
    return Example(prompt, options, label_field(row, ("label",), _BINARY))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="sst2", read=_sst2, label_fields=("label",)),
        Task(name="boolq", read=_boolq, label_fields=("answer", "label")),
        # MeZO trains Copa as a language model on the right choice (large_models/mezo.sh).
        Task(name="copa", read=_copa, label_fields=("label",), loss="option_nll"),
        Task(name="siqa", read=_siqa, label_fields=("label",)),
        Task(name="piqa", read=_piqa, label_fields=("label",)),
    )
}


def get_task(name: str) -> Task:
    """The task of that name. ValueError naming the legal ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no task {name!r}; {hint}legal tasks: {', '.join(TASKS)}")
    return TASKS[name]
