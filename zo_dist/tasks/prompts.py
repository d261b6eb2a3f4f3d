"""The tasks and their prompts: one table, one row per task.

The eleven of the MeZO paper (arXiv 2305.17333) are worded, scored and trained as in its code
(princeton-nlp/MeZO, large_models/templates.py, tasks.py and mezo.sh), so results compare. The others are
not among them: siqa, piqa and qasc are plain questions and answers, instruct is anybody's own data.
"""

import difflib
from collections.abc import Callable, Mapping
from string import Formatter

from zo_dist.tasks.base import Example, Message, Task, field, label_field, text_field, texts_field
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


def _wsc(row: Row) -> Example:
    """Does a pronoun (span2_text) stand for a name (span1_text)?"""
    pronoun, name = text_field(row, "span2_text").lower(), text_field(row, "span1_text")
    question = f'In the previous sentence, does the pronoun "{pronoun}" refer to {name}? Yes or No?'
    return Example(
        prompt=f"{text_field(row, 'text')}\n{question}\n",
        options=("No", "Yes"),
        label=label_field(row, ("label",), _BINARY),
    )


def _record(row: Row) -> Example:
    """Which entity fills the gap of a sentence about a passage. Several may be right.

    MeZO (ReCoRDTemplateGPT3): the sentence with an entity put in is an option, as one more highlight of
    the passage; what is trained on is the first answer.
    """
    query = text_field(row, "query")
    entities, answers = texts_field(row, "entities"), texts_field(row, "answers")
    missing = [answer for answer in answers if answer not in entities]
    if missing:
        raise ValueError(f"field answers has {missing[0]!r}, which is none of the entities")
    first, *others = (entities.index(answer) for answer in answers)
    return Example(
        prompt=text_field(row, "passage").replace("@highlight\n", "- ") + "\n-",
        options=tuple(f" {query.replace('@placeholder', entity)}" for entity in entities),
        label=first,
        also_right=tuple(others),
    )


def _squad(row: Row) -> Example:
    """An answer in a few words of the context. The first published answer is trained on."""
    title, context = text_field(row, "title"), text_field(row, "context")
    question, answers = text_field(row, "question").strip(), texts_field(row, "answers", "text")
    return _answered(f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", answers)


def _drop(row: Row) -> Example:
    """A number, date or span worked out from a passage. Each span of an answer is right by itself."""
    question, answers = text_field(row, "question").strip(), texts_field(row, "answers_spans", "spans")
    return _answered(f"Passage: {text_field(row, 'passage')}\nQuestion: {question}\nAnswer:", answers)


def _qasc(row: Row) -> Example:
    """An answer to a question about a fact, as Natural Instructions has QASC. No task of the MeZO paper."""
    return _answered(f"{text_field(row, 'input')}\nAnswer:", texts_field(row, "target"))


def _answered(prompt: str, answers: tuple[str, ...]) -> Example:
    """A question whose answer is a line of text, as MeZO writes them."""
    return Example(prompt, options=(f" {answers[0]}\n",), answers=answers)


def _instruct(row: Row) -> Example:
    """One conversation or instruction; the last message, or what stands for it, is the answer.

    `messages` as chat models have them, or `instruction`, `input` (may be absent or empty) and `output`,
    go through the tokenizer's chat template. `prompt` and `completion` are taken as they are.
    """
    if row.get("messages") is not None:
        *before, last = (_message(message) for message in _list(row, "messages"))
        if last["role"] != "assistant" or not before:
            raise ValueError("field messages must end with one of the role assistant, and not begin with it")
        return Example(tuple(before), options=(last["content"],))
    if row.get("prompt") is not None:
        return Example(text_field(row, "prompt"), options=(text_field(row, "completion"),), as_is=True)
    if row.get("instruction") is None:
        raise ValueError(
            "field messages is missing, and so are prompt (with completion) and instruction (with output); "
            f"the row has {', '.join(row)}"
        )
    parts = [text_field(row, "instruction"), text_field(row, "input") if row.get("input") else ""]
    request = {"role": "user", "content": "\n\n".join(part for part in parts if part)}
    return Example((request,), options=(text_field(row, "output"),))


def _list(row: Row, name: str) -> list[object]:
    value = field(row, (name,))
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name} is {value!r}, not a list with anything in it")
    return value


def _message(message: object) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ValueError(f"field messages has {message!r}; each needs a role and a content")
    return {"role": text_field(dict(message), "role"), "content": text_field(dict(message), "content")}


def fixed(template: str, *options: str) -> Callable[[Row], Example]:
    """A reader of rows that are asked alike: `{field}` in `template` is a text of the row.

    The row's `label` counts `options` from 0.
    """
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    labels = {str(number): number for number in range(len(options))}

    def read(row: Row) -> Example:
        texts = {name: text_field(row, name) for name in names}
        return Example(template.format(**texts), options, label_field(row, ("label",), labels))

    return read


_RTE = fixed('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', "Yes", "No")
_CB = fixed('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n', "Yes", "No", "Maybe")
_WIC = fixed(
    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n'
    "{sentence2}\n",
    *("No", "Yes"),
)
_MULTIRC = fixed(
    '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    *("No", "Yes"),
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="sst2", read=_sst2, source="nyu-mll/glue:sst2"),
        Task(name="rte", read=_RTE, source="aps/super_glue:rte"),
        Task(name="cb", read=_CB, source="aps/super_glue:cb"),
        Task(name="boolq", read=_boolq, source="google/boolq", label_fields=("answer", "label")),
        Task(name="wsc", read=_wsc, source="aps/super_glue:wsc.fixed"),
        Task(name="wic", read=_WIC, source="aps/super_glue:wic"),
        Task(name="multirc", read=_MULTIRC, source="aps/super_glue:multirc"),
        # Of the tasks with options, MeZO trains these two as a language model on the right one.
        Task(name="copa", read=_copa, source="aps/super_glue:copa", loss="option_nll"),
        Task(
            name="record",
            read=_record,
            source="aps/super_glue:record",
            label_fields=("answers",),
            loss="option_nll",
        ),
        Task(
            name="squad",
            read=_squad,
            source="rajpurkar/squad",
            label_fields=("answers",),
            loss="option_nll",
            metrics=("f1", "em"),
            stop="\n",
        ),
        Task(
            name="drop",
            read=_drop,
            source="ucinlp/drop",
            label_fields=("answers_spans",),
            loss="option_nll",
            metrics=("f1", "em"),
            stop="\n",
        ),
        Task(name="siqa", read=_siqa),
        Task(name="piqa", read=_piqa),
        Task(
            name="qasc",
            read=_qasc,
            label_fields=("target",),
            loss="option_nll",
            metrics=("f1", "em"),
            stop="\n",
        ),
        Task(
            name="instruct",
            read=_instruct,
            label_fields=("messages", "completion", "output"),
            loss="option_nll",
            metrics=(),
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name. ValueError naming the legal ones."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no task {name!r}; {hint}legal tasks: {', '.join(TASKS)}")
    return TASKS[name]
