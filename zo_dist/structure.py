"""What structure the noise has: none, or one of these. Chosen here alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zo_dist.flipout import Flipout, FlipoutNoise
from zo_dist.laws import Law
from zo_dist.lowrank import LowRank, LowRankNoise
from zo_dist.noise import Noise
from zo_dist.orthogonal import Orthogonal, OrthogonalNoise

Structure = LowRank | Flipout | Orthogonal


def noise_of(
    law: Law, seed: int, compile: bool, structure: Structure | None, shapes: Mapping[str, torch.Size]
) -> Noise:
    """The noise of a run whose parameters have these shapes. ValueError for what is no structure."""
    match structure:
        case None:
            return Noise(law, seed, compile)
        case LowRank():
            return LowRankNoise(law, seed, compile, structure, shapes)
        case Flipout():
            return FlipoutNoise(law, seed, compile, shapes)
        case Orthogonal():
            return OrthogonalNoise(law, seed, compile, shapes)
        case _:
            raise ValueError(f"structure is {structure!r}; use LowRank(...), Flipout(), Orthogonal() or None")
