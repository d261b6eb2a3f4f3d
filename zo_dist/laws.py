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
    """Natural logarithm of float32 in (0, 1]; polynomial of Cephes `logf` (S. Moshier), in Estrin's order."""
    # The integers from sqrt(1/2) on, whose upper bits count octaves: no choice has to be made.
    bits = u.view(torch.int32) - 0x3F3504F3
    exponent = (bits >> 23).to(torch.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    f2 = f * f
    f4 = f2 * f2
    a, b = f * -2.4999993993e-1 + 3.3333331174e-1, f * -1.6668057665e-1 + 2.0000714765e-1
    c, d = f * -1.2420140846e-1 + 1.4249322787e-1, f * -1.1514610310e-1 + 1.1676998740e-1
    p = (b * f2 + a) + ((d * f2 + c) + f4 * 7.0376836292e-2) * f4
    tail = p * f * f2 - (exponent * 2.12194440e-4 + f2 * 0.5)
    return (f + tail) + exponent * 0.693359375


def _gaussian(words: Tensor) -> Tensor:
    """float32 `[tiles, 2, 256]` (cosine or sine, pair) of int32 `[tiles, 512]`, by Box-Muller.

    The radius takes 31 random bits and the angle 32; |z| < 6.7. The polynomials for sine and cosine on
    [-pi/4, pi/4] are those of Cephes `sinf` and `cosf`.
    """
    radial, angular = words[:, :256], words[:, 256:]
    # In [2^-32, 1 - 2^-24]: with a factor of 2^-31 the largest words would give 1, and a radius of 0/0.
    u = (radial & 0x7FFFFFFF).to(torch.float32) * (2.0**-31 - 2.0**-55) + 2.0**-32
    square = _log(u) * -2.0
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
