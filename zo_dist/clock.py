"""Where the time of a run goes: seconds by what they were spent on, read now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up the host's seconds. What is inside of something else counts for itself, and not for that.

    It waits for no device: work that an accelerator is still at counts for what next waits for it. The
    forwards of a step do, whose losses are read; so on an accelerator `perturb` and `update` are what the
    host took to start them, and the rest of both is in `forward`. Cost: two readings of the clock.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._now, self._since = "", time.perf_counter()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Inside, seconds are spent on `what`."""
        outer = self._turn_to(what)
        try:
            yield
        finally:
            self._turn_to(outer)

    def read(self) -> dict[str, float]:
        """The seconds since the last reading; those spent on nothing named are left out."""
        self._turn_to(self._now)
        spent, self._spent = self._spent, {}
        return {what: seconds for what, seconds in spent.items() if what}

    def _turn_to(self, what: str) -> str:
        before, now = self._now, time.perf_counter()
        self._spent[before] = self._spent.get(before, 0.0) + now - self._since
        self._now, self._since = what, now
        return before
