"""Stochastic rounding of float32 to 16 bits: up or down, with the probability that keeps the mean.

Sixteen random bits per element. They are the halves of products of 64-bit Philox words with odd
constants: multiplication by an odd number permutes the integers, so the bits of each element are
exactly uniform and rounding is unbiased for every weight, at one Philox call for 128 elements.
Elements that share a word are nearly uncorrelated (tests/test_noise.py bounds it), not independent.

The arithmetic is on integers that hold two neighbouring elements; float32 values and 16-bit results
are only looked at as integers. A little-endian machine is assumed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zo_dist import generator
from zo_dist.kernels import Kernel

_ROWS, _BLOCKS = 32, 8

# Powers of a multiplier whose lattices are good in few dimensions (Steele and Vigna, "Computationally
# easy, spectrally good multipliers for congruential pseudorandom number generators", 2021).
_MULTIPLIER = 0xD1342543DE82EF95
_BOTH_LOW_HALVES = 0x0000FFFF0000FFFF


@cache
def factors(device: torch.device) -> Tensor:
    """int64 `[32, 1]`: the odd constants, one for each row of a tile."""
    powers = [pow(_MULTIPLIER, k, 1 << 64) for k in range(1, _ROWS + 1)]
    signed = [p - (1 << 64) if p >> 63 else p for p in powers]
    return torch.tensor(signed, device=device).unsqueeze(-1)


def _random_bits(headers: Tensor, tiles: int, factors: Tensor) -> Tensor:
    """int64 `[tiles, 32, 16]`: two uniform 16-bit numbers in each, at bits 0 and 32."""
    x0, x1, x2, x3 = (x[:, 0] for x in generator.blocks(headers, tiles, _BLOCKS))
    words = torch.cat((x0 | x1 << 32, x2 | x3 << 32), dim=1).unsqueeze(1)
    return (words * factors) >> 16 & _BOTH_LOW_HALVES


def _to_bfloat16(out: Tensor, exact: Tensor, headers: Tensor, factors: Tensor) -> None:
    """bfloat16 is the upper half of float32: a carry out of the lower half rounds up."""
    total = exact + _random_bits(headers, out.shape[0], factors)
    pair = (total >> 16 & 0xFFFF) | (total >> 32 & -0x10000)
    out.copy_(pair.to(torch.int32))


def _to_float16(out: Tensor, exact: Tensor, headers: Tensor, factors: Tensor) -> None:
    bits = _random_bits(headers, out.shape[0], factors)
    low = _one_to_float16((exact << 32 >> 32).to(torch.int32), (bits & 0xFFFF).to(torch.int32))
    high = _one_to_float16((exact >> 32).to(torch.int32), (bits >> 32).to(torch.int32))
    out.copy_((low & 0xFFFF) | (high << 16))


def _one_to_float16(exact: Tensor, bits: Tensor) -> Tensor:
    """int32 whose lower half is the float16 that float32 `exact` goes to; both are bit patterns."""
    # float16 drops 13 bits of a normal number; below 2**-14 its values are 2**-24 apart.
    normal = (exact + (bits & 0x1FFF) & -0x2000).view(torch.float32)
    value = exact.view(torch.float32)
    # (adding the bits before the floor would itself round, and move values that fit).
    units = value * 2.0**24
    below = torch.floor(units)
    up = bits.to(torch.float32) >= 65536.0 - (units - below) * 65536.0
    subnormal = (below + up.to(torch.float32)) * 2.0**-24
    # floor loses the sign of a negative zero.
    small = value.abs() < 2.0**-14
    rounded = torch.where(small, torch.copysign(subnormal, value), normal)
    return rounded.to(torch.float16).view(torch.int16).to(torch.int32)


# The kernel for weights of each 16-bit dtype; `exact` and the result come as pairs.
STOCHASTIC = {
    torch.bfloat16: Kernel(_to_bfloat16, (_ROWS, 2 * _BLOCKS), _BLOCKS, pairs=True),
    torch.float16: Kernel(_to_float16, (_ROWS, 2 * _BLOCKS), _BLOCKS, pairs=True),
}
