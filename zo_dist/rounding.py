"""How a float32 result is written to weights of 16 bits: stochastic, kahan, nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from zo_dist.noise import Noise
from zo_dist.params import Span

Rounding = Literal["stochastic", "kahan", "nearest"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


class Rounding16:
    """Writes float32 results to weights of any of the three dtypes; one rounding, nothing more.

    `stochastic`: up or down with the probability that keeps the mean exact, from 16 random bits of
    the weight's own stream, so it replays. `kahan`: to nearest, and the part lost is kept beside the
    weight (2 bytes per parameter) and added back next time; in float16, whose smallest number is 6e-8, moves
    below half of that are lost all the same. `nearest`: what published code does;
    updates below half a unit in the last place vanish. float32 weights take the result as it is.
    """

    def __init__(self, mode: Rounding, noise: Noise) -> None:
        if mode not in ROUNDINGS:
            raise ValueError(f"rounding {mode!r} is not known; use one of {', '.join(ROUNDINGS)}")
        self.mode, self.noise = mode, noise
        self.lost: dict[str, Tensor] = {}
        self._scratch: dict[torch.device, Tensor] = {}

    def begin(self, spans: Sequence[Span]) -> None:
        """Make the state there will be, from the start: zeros like each 16-bit span."""
        if self.mode == "kahan":
            self.lost = {s.name: torch.zeros_like(s.flat) for s in spans if s.flat.dtype != torch.float32}

    def scratch(self, flat: Tensor) -> Tensor:
        """float32, as long as `flat`, with anything in it: the same memory from one call to the next."""
        held = self._scratch.get(flat.device)
        if held is None or len(held) < len(flat):
            held = self._scratch[flat.device] = torch.empty_like(flat, dtype=torch.float32)
        return held[: len(flat)]

    def lost_of(self, name: str, start: int, numel: int) -> Tensor | None:
        """What was lost of the chunk that begins `start` into the span; None where nothing is kept."""
        return self.lost[name][start : start + numel] if name in self.lost else None

    def write(
        self,
        flat: Tensor,
        exact: Tensor,
        lost: Tensor | None,
        name: str,
        step: int,
        offset: int,
        noise: Noise | None = None,
    ) -> None:
        """Round float32 `exact`, which is overwritten, into `flat`: elements `offset ...` of `name`.

        `noise`: what knows which elements these are, where they do not follow each other.
        """
        if self.mode == "stochastic" and flat.dtype != torch.float32:
            (noise or self.noise).round(flat, exact, name, step, offset)
            return
        flat.copy_(exact)
        if lost is not None:
            lost.copy_(exact.sub_(flat))
