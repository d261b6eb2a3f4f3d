"""The laws of noise: from random 32-bit words to z, in torch operations that cut or compiled give equal bits.

No libm call and no fused multiply-add is in them, so that native.cpp can repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Law = Literal["rademacher", "gaussian"]
LAWS: tuple[str, ...] = get_args(Law)

# Of each law, the shape of a tile of z, and the Philox calls whose words make one.
TILES = {"rademacher": ((4, 32), 1), "gaussian": ((2, 256), 128)}


def _rademacher(words: Tensor) -> Tensor:
    """float32 `[tiles, 4, 32]` (word, bit) of int32 `[tiles, 4]`: -1 where the bit is set, else 1."""
    # The bit as the sign of an integer. A choice, and not a flip of the float's sign bit: compiled
    # loops take integers apart as floats through memory.
    shifts = 31 - torch.arange(32, dtype=torch.int32, device=words.device)
    return torch.where(words.unsqueeze(-1) << shifts < 0, -1.0, 1.0)


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float32 in (0, 1]; polynomial of Cephes `logf` (S. Moshier)."""
    bits = u.view(torch.int32)
    exponent = ((bits >> 23) - 127).to(torch.float32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32)
    high = mantissa > math.sqrt(2.0)
    mantissa = torch.where(high, mantissa * 0.5, mantissa)
    exponent = torch.where(high, exponent + 1.0, exponent)
    f = mantissa - 1.0
    square = f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    for c in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * f + c
    tail = p * f * square - exponent * 2.12194440e-4 - square * 0.5
    return (f + tail) + exponent * 0.693359375


def _gaussian(words: Tensor) -> Tensor:
    """float32 `[tiles, 2, 256]` (cosine or sine, pair) of int32 `[tiles, 512]`, by Box-Muller.

    Radius and angle each take 32 random bits; |z| < 6.8. The polynomials for sine and cosine on
    [-pi/4, pi/4] are those of Cephes `sinf` and `cosf`.
    """
    radial, angular = words[:, :256], words[:, 256:]
    # A 32-bit word as float32, moved into (0, 1): int32 is signed, hence the 0.5.
    u = radial.to(torch.float32) * 2.0**-32 + (0.5 + 2.0**-33)
    square = _log(torch.clamp(u, min=2.0**-33, max=1.0 - 2.0**-24)) * -2.0
    # Not sqrt: eager torch hands that to a vendor library that rounds its own way.
    radius = square * torch.rsqrt(square)
    quadrant = angular & 3
    # The upper 30 bits, signed, cover a quarter turn centred on 0.
    angle = (angular >> 2).to(torch.float32) * (math.pi * 2.0**-31)
    t = angle * angle
    sine = ((t * -1.9515295891e-4 + 8.3321608736e-3) * t - 1.6666654611e-1) * t * angle + angle
    cosine = (
        ((t * 2.443315711809948e-5 - 1.388731625493765e-3) * t + 4.166664568298827e-2) * t * t - t * 0.5 + 1.0
    )
    swap, flip = (quadrant & 1) == 1, (quadrant & 2) == 2
    x, y = torch.where(swap, -sine, cosine), torch.where(swap, cosine, sine)
    radius = torch.where(flip, -radius, radius)
    return torch.stack((radius * x, radius * y), dim=1)


EXPAND: dict[str, Callable[[Tensor], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
}
