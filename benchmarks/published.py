"""MeZO as published (Malladi et al., arXiv 2305.17333, Algorithm 1), to measure against.

Four eager passes over all weights in place, `torch.normal` reseeded for each, one forward per side.
It needs whole weights in the process, so it has no sharded form.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn


class PublishedMeZO:
    """One step per call. `seconds`: how long the last one spent on perturbing, forwards and the update."""

    def __init__(self, model: nn.Module, lr: float, eps: float, seed: int = 0) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps = lr, eps
        self._seeds = torch.Generator().manual_seed(seed)
        self.seconds = {"perturb": 0.0, "forward": 0.0, "update": 0.0}

    @torch.no_grad()
    def step(self, loss: Callable[[], float]) -> float:
        """`loss` is evaluated on either side, at weights that are moved there and back in place."""
        seed = int(torch.randint(2**31, (), generator=self._seeds))
        clock = [time.perf_counter()]

        def lap(part: str) -> None:
            clock.append(time.perf_counter())
            self.seconds[part] += clock[-1] - clock[-2]

        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._add(seed, self.eps)
        lap("perturb")
        plus = loss()
        lap("forward")
        self._add(seed, -2 * self.eps)
        lap("perturb")
        minus = loss()
        lap("forward")
        self._add(seed, self.eps)
        lap("perturb")
        self._add(seed, -self.lr * (plus - minus) / (2 * self.eps))
        lap("update")
        return (plus + minus) / 2

    def _add(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
            p.add_(z, alpha=scale)
