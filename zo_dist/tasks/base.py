"""What a task is: a function from a row of a data set to a prompt and its options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from zo_dist.tasks.packages import Row


@dataclass(frozen=True)
class Example:
    """A prompt, the texts that may follow it, and which of them is right.

    An option continues the prompt character by character: it brings its own leading space.
    """

    prompt: str
    options: tuple[str, ...]
    label: int  # index into options


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `read` turns a row into an Example and raises ValueError for a bad row.

    `loss` is how MeZO trains it: "choice" is cross-entropy over the options' scores
    (`choice_loss`, its train_as_classification), "option_nll" the likelihood of the right option
    (`option_nll_loss`). `label_fields`: where a row holds its answer, by any of these names.
    """

    name: str
    read: Callable[[Row], Example]
    label_fields: tuple[str, ...]
    loss: Literal["choice", "option_nll"] = "choice"

    def example(self, row: Row, where: str) -> Example:
        """Read one row; `where` names it in the ValueError that a bad row raises."""
        try:
            return self.read(row)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}, {where}: {error}") from error

    def is_labelled(self, row: Row) -> bool:
        """False for the rows of a hidden test set: no answer, an empty one, or -1."""
        answers = [row[name] for name in self.label_fields if name in row]
        return any(answer is not None and str(answer) not in ("", "-1") for answer in answers)


def text_field(row: Row, *names: str) -> str:
    """The string under the first of `names` that the row has. ValueError: none, or no string."""
    value = _field(row, names)
    if not isinstance(value, str):
        raise ValueError(f"field {' or '.join(names)} is {value!r}, not a string")
    return value


def label_field(row: Row, names: Sequence[str], legal: Mapping[str, int]) -> int:
    """The option that the row's answer stands for, by its lower-case text in `legal`.

    So 1 and "1", True and "true" mean the same. ValueError: a value that is not in `legal`.
    """
    value = _field(row, names)
    try:
        return legal[str(value).strip().lower()]
    except KeyError:
        raise ValueError(
            f"field {' or '.join(names)} is {value!r}; legal values: {', '.join(legal)}"
        ) from None


def _field(row: Row, names: Sequence[str]) -> object:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"field {' or '.join(names)} is missing; the row has {', '.join(row)}")
