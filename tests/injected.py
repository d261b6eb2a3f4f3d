"""Losses that are given, not computed, so that the rest is compared bit for bit; and a full disk."""

from __future__ import annotations

import itertools
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import table
import torch
from models import loss_of
from torch import Tensor, nn

import zo_dist
from zo_dist import generator, laws, noise


class Injected:
    """A row loss that runs the model, so that its weights are gathered, and returns known numbers.

    They depend on the step, the row, which of the row's directions it is, and the side. Which ones a call is
    for follows from the contract: in module mode each micro-batch is one call (under a pipeline, several) in
    which a row comes with all sides of its first direction, the + first, then with those of the next; in
    shard mode, as in the reference, there is one call for each direction, side and micro-batch. An unshifted
    side is the same for all directions of a row, and is called for but once, except by the reference. A step
    of a `search` is always one direction in shard mode. The numbers are multiples of 2**-10, so sums of them
    are exact in any order.
    """

    def __init__(
        self,
        mode: str,
        directions: int,
        num_forwards: int = 1,
        nan_at: Any = None,
        estimator: str = "two_sided",
        per_row: int = 1,
        search: zo_dist.Projection | None = None,
    ) -> None:
        self.mode, self.num_forwards, self.nan_at, self.search = mode, num_forwards, nan_at, search
        signs = table.ESTIMATORS[estimator].signs
        # Of a row, in order: which of its directions, and the side.
        self.order = [
            (direction if sign else 0, side)
            for direction in range(per_row)
            for side, sign in enumerate(signs)
            if sign or direction == 0 or mode == "reference"
        ]
        self.groups = directions // per_row
        self.turns, self.calls = self._turns(), 0
        # How often a step has come to each row.
        self.step, self.seen = 0, dict[int, int]()

    def _turns(self) -> Iterator[tuple[int, tuple[int, int] | None]]:
        """Of each call the step, and, if it is for one side, of which direction of the row, and which."""
        for step in itertools.count():
            every, iterations = (self.search.every, self.search.iterations) if self.search else (1, 0)
            searches = step % (every + iterations) >= every
            sides = [(0, 0), (0, 1)] if searches else self.order * self.groups
            for side in sides if searches or self.mode != "module" else [None]:
                yield from [(step, side)] * self.num_forwards

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss_of(model, batch)
        step, side = next(self.turns)
        self.calls += 1
        if step != self.step:
            self.step, self.seen = step, {}
        losses = []
        for row in batch["row"].tolist():
            # A rank that has no rows left repeats some, which do not count.
            place = side or self.order[self.seen.get(row, 0) % len(self.order)]
            losses.append(known_loss(step, row, *place))
            self.seen[row] = self.seen.get(row, 0) + 1
            if self.nan_at == (step, row):
                losses[-1] = float("nan")
        weights = [1.0 + row % 3 for row in batch["row"].tolist()]
        return torch.tensor(losses), torch.tensor(weights)


def known_loss(step: int, row: int, direction: int, side: int) -> float:
    return random.Random(f"{step} {row} {direction} {side}").randrange(1 << 12) / 1024


@contextmanager
def remembered_noise() -> Iterator[None]:
    """Each block of random words, and each z, is computed once in this process, then looked up.

    Tests of tiny models otherwise spend their time in Philox: the words of a weight are the same for
    the + and the - side, the update, both perturb modes and every engine, and z is the same in each of the
    reference's runs. The function itself is the
    package's; test_noise.py checks it, and the tests of whole trajectories run it unremembered.
    """
    original = generator.philox

    def philox(counter: tuple[Tensor, ...], schedule: Tensor) -> tuple[Tensor, ...]:
        key = (*((tuple(c.shape), c.numpy().tobytes()) for c in counter), schedule.numpy().tobytes())
        if key not in _words:
            _words[key] = original(counter, schedule)  # type: ignore[arg-type]
        return _words[key]

    def values(self: noise.Noise, *address: Any) -> Tensor:
        key = (type(self), self.kind, self.seed, *address)
        if key not in _values:
            _values[key] = compute(self, *address)
        return _values[key]

    expand, compute = dict(laws.EXPAND), noise.Noise.values

    def gaussian(words: Tensor) -> Tensor:
        key = words.numpy().tobytes()
        if key not in _normals:
            _normals[key] = expand["gaussian"](words)
        return _normals[key]

    generator.philox = philox  # type: ignore[assignment]
    laws.EXPAND["gaussian"] = gaussian
    noise.Noise.values = values  # type: ignore[method-assign]
    try:
        yield
    finally:
        generator.philox = original
        laws.EXPAND.update(expand)
        noise.Noise.values = compute  # type: ignore[method-assign]


_normals: dict[object, Tensor] = {}
_values: dict[object, Tensor] = {}
_words: dict[tuple[object, ...], tuple[Tensor, ...]] = {}


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow further: as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
