"""Losses that are given, not computed, so that the rest is compared bit for bit; and a full disk."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import table
import torch
from models import loss_of
from torch import Tensor, nn

from zo_dist import generator, laws, noise


class Injected:
    """A row loss that runs the model, so that its weights are gathered, and returns known numbers.

    They depend on the step, the row, which of the row's directions it is, and the side. Which ones a call is
    for follows from the contract: in module mode each micro-batch is one call (under a pipeline, several) in
    which a row comes with all sides of its first direction, the + first, then with those of the next; in
    shard mode, as in the reference, there is one call for each direction, side and micro-batch. An unshifted
    side is the same for all directions of a row, and is called for but once, except by the reference. The
    numbers are multiples of 2**-10, so sums of them are exact in any order.
    """

    def __init__(
        self,
        mode: str,
        directions: int,
        num_forwards: int = 1,
        nan_at: Any = None,
        estimator: str = "two_sided",
        per_row: int = 1,
    ) -> None:
        self.mode, self.num_forwards, self.nan_at = mode, num_forwards, nan_at
        signs = table.ESTIMATORS[estimator].signs
        # Of a row, in order: which of its directions, and the side.
        self.order = [
            (direction if sign else 0, side)
            for direction in range(per_row)
            for side, sign in enumerate(signs)
            if sign or direction == 0 or mode == "reference"
        ]
        groups = directions // per_row
        self.calls_per_step = num_forwards * (1 if mode == "module" else groups * len(self.order))
        self.calls = 0
        # How often a step has come to each row.
        self.seen: dict[int, int] = {}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss_of(model, batch)
        step, turn = self.calls // self.calls_per_step, self.calls // self.num_forwards % len(self.order)
        if self.calls % self.calls_per_step == 0:
            self.seen = {}
        self.calls += 1
        losses = []
        for row in batch["row"].tolist():
            # A rank that has no rows left repeats some, which do not count.
            place = self.order[self.seen.get(row, 0) % len(self.order) if self.mode == "module" else turn]
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
