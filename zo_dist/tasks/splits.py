"""Which rows are trained on, validated on and tested on: the same answer on every rank."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zo_dist.tasks.base import Example, Task
from zo_dist.tasks.packages import Row
from zo_dist.tasks.sources import load_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The examples of a run. No row is in two splits."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_splits(
    task: Task,
    source: str,
    *,
    train: int,
    validation: int,
    test: int,
    seed: int,
    cache: Path | None = None,
) -> Splits:
    """Draw so many rows for each split, at random by `seed` alone.

    A source with labelled train, validation and test splits gives each from its own. With train
    and one labelled held-out split it is MeZO's protocol (large_models/run.py): test comes from the
    held-out split, or is all of it where that has fewer rows; train and validation are disjoint parts of
    train. A source with one split is cut in three. Asking for fewer training rows does not change the others.

    ValueError: fewer rows than asked for, splits of unknown names, a row that the task cannot read.
    """
    wanted = {"test": test, "validation": validation, "train": train}
    for name, count in wanted.items():
        if count < (name == "train"):
            raise ValueError(f"{name} = {count} rows: must be at least {int(name == 'train')}")
    splits = load_rows(source, cache)
    origin = _origins(task, source, splits)

    drawn: dict[str, list[Example]] = {}
    for split in dict.fromkeys(origin.values()):
        rows = splits[split]
        names = [name for name in wanted if origin[name] == split]
        if names == ["test"] and wanted["test"] > len(rows):
            log.info("%s has %d rows to test on: all are taken, not %d", source, len(rows), test)
            wanted["test"] = len(rows)
        total = sum(wanted[name] for name in names)
        if total > len(rows):
            asked = " + ".join(f"{wanted[name]} {name}" for name in names)
            raise ValueError(
                f"{source} has {len(rows)} rows in its split {split!r}, and {asked} = {total} are "
                "asked for; ask for fewer"
            )
        indices = _draw(len(rows), total, f"{seed}/{split}")
        for name in names:
            taken, indices = indices[: wanted[name]], indices[wanted[name] :]
            where = f"row %d of the split {split!r} of {source}"
            drawn[name] = [task.example(rows[index], where % index) for index in taken]
    return Splits(**drawn)


def _origins(task: Task, source: str, splits: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """For each of our splits, the source's split that it is drawn from."""
    filled = [name for name, rows in splits.items() if len(rows)]
    if len(filled) == 1:
        return dict.fromkeys(("test", "validation", "train"), filled[0])
    # Benchmarks publish their test rows without labels.
    held_out = [
        name for name in ("test", "validation", "dev") if name in filled and task.is_labelled(splits[name][0])
    ]
    if "train" not in filled or not held_out:
        found = ", ".join(f"{name} ({len(rows)} rows)" for name, rows in splits.items()) or "none"
        raise ValueError(
            f"{source} has these splits: {found}; needed: a single one with rows, or train and a "
            "labelled validation, dev or test"
        )
    validation = held_out[1] if len(held_out) > 1 else "train"
    return {"test": held_out[0], "validation": validation, "train": "train"}


def _draw(total: int, count: int, seed: str) -> list[int]:
    """The first `count` of a random permutation of range(total).

    A Fisher-Yates shuffle that stops early and stores only what moved. It uses `random()` alone: of
    the generator's methods the one whose sequence Python promises never to change.
    """
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    drawn = []
    for i in range(count):
        j = i + int(generator.random() * (total - i))
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn
