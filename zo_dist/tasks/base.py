"""What a task is: a function from a row of a data set to a prompt and what should follow it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zo_dist.tasks.metrics import TEXT_METRICS
from zo_dist.tasks.packages import Row

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class Example:
    """A prompt, the texts that may follow it, and which of them is right.

    An option continues the prompt character by character: it brings its own leading space. A prompt of
    messages is put into the tokenizer's chat template, and an option is then the assistant's message. Blanks
    at the outer ends of both together go, as in MeZO, unless both are taken `as_is`.
    `also_right`: further options that count as right, though none of them is trained on. `answers`: the
    texts that a generated one is compared with. `where`: the row that it was read from, for messages.
    """

    prompt: str | tuple[Message, ...]
    options: tuple[str, ...]
    label: int = 0  # index into options
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    as_is: bool = False
    where: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `read` turns a row into an Example and raises ValueError for a bad row.

    `loss` is how MeZO trains it: "choice" is cross-entropy over the options' scores
    (`choice_loss`, its train_as_classification), "option_nll" the likelihood of the right option
    (`option_nll_loss`). `metrics`: what is reported besides the loss. "accuracy": the share of rows whose
    best-scored option is right; "f1", "em": of a text that the model generates, up to the first `stop`
    if there is one. `label_fields`: where a row holds its answer, by any of these names. `source`: the
    published data set on the hub, with its configuration after the colon.
    """

    name: str
    read: Callable[[Row], Example]
    label_fields: tuple[str, ...] = ("label",)
    loss: Literal["choice", "option_nll"] = "choice"
    metrics: tuple[str, ...] = ("accuracy",)
    stop: str | None = None
    source: str | None = None

    @property
    def generates(self) -> bool:
        return any(metric in TEXT_METRICS for metric in self.metrics)

    def example(self, row: Row, where: str) -> Example:
        """Read one row; `where` names it in the ValueError that a bad row raises."""
        try:
            return dataclasses.replace(self.read(row), where=where)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}, {where}: {error}") from error

    def is_labelled(self, row: Row) -> bool:
        """False for the rows of a hidden test set: no answer, an empty one, or -1."""
        return any(_holds_answer(row.get(name)) for name in self.label_fields)


def text_field(row: Row, *names: str) -> str:
    """The string under the first of `names` that the row has. ValueError: none, or no string."""
    value = field(row, names)
    if not isinstance(value, str):
        raise ValueError(f"field {' or '.join(names)} is {value!r}, not a string")
    return value


def texts_field(row: Row, name: str, inner: str | None = None) -> tuple[str, ...]:
    """The strings of a list, which may lie under the key `inner` of the field.

    ValueError: no such list, an empty one, or one of something else.
    """
    value = field(row, (name,))
    if inner is not None:
        value = value.get(inner) if isinstance(value, Mapping) else None
    where = name if inner is None else f"{name}.{inner}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"field {where} is {value!r}, not a list of at least one string")
    if not all(isinstance(text, str) for text in value):
        raise ValueError(f"field {where} is {value!r}, not a list of strings")
    return tuple(value)


def label_field(row: Row, names: Sequence[str], legal: Mapping[str, int]) -> int:
    """The option that the row's answer stands for, by its lower-case text in `legal`.

    So 1 and "1", True and "true" mean the same. ValueError: a value that is not in `legal`.
    """
    value = field(row, names)
    try:
        return legal[str(value).strip().lower()]
    except KeyError:
        raise ValueError(
            f"field {' or '.join(names)} is {value!r}; legal values: {', '.join(legal)}"
        ) from None


def field(row: Row, names: Sequence[str]) -> object:
    """What the row has under the first of `names` that it has. ValueError if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"field {' or '.join(names)} is missing; the row has {', '.join(row)}")


def _holds_answer(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_answer(inner) for inner in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) > 0
    return value is not None and str(value) not in ("", "-1")
