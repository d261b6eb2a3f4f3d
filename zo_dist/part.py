"""What the parts of a step share: options, which ranks compare and logs name, and a state for snapshots."""

from __future__ import annotations

from typing import Any


class Part:
    """A sampler, an estimator, coefficients, a rule, a scale or a mask; this one keeps no state.

    State is made of numbers, strings, lists and dicts, the same on every rank. Tensors that are kept beside
    weights are no state in this sense (see `Rule.kept`).
    """

    @property
    def options(self) -> dict[str, int | float | str]:
        """The settings it was made with: its plain attributes. What changes is kept in lists and dicts."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float | str)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict`; raises ValueError if it is another part's."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")
