"""The random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).

Its 128-bit counter holds `(block, step, direction, stream)` in plain, so two draws can only share a
counter if they are the same draw; its 64-bit key is a hash of `(seed, name)`. One call gives 128
random bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
LOW = 1 << 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The 64-bit Philox key of one parameter (or one named stream) of a run, as two 32-bit words."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def key_schedule(key: tuple[int, int]) -> list[int]:
    """The ten round keys, `k0, k1, k0', k1', ...`."""
    return [(key[i] + r * _WEYL[i]) & MASK for r in range(_ROUNDS) for i in (0, 1)]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], schedule: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 tensors holding 32-bit words.

    `schedule` holds the 20 round-key words along dim 0, int64. Returns four int64 tensors of 32-bit words.
    """
    x0, x1, x2, x3 = counter
    for r in range(_ROUNDS):
        # M - 2**32 fits a signed 32-bit word, so the product stays inside int64 without overflow.
        p0 = x0 * (_MULTIPLIERS[0] - LOW)
        p1 = x2 * (_MULTIPLIERS[1] - LOW)
        hi0 = ((p0 >> 32) + x0) & MASK
        hi1 = ((p1 >> 32) + x2) & MASK
        x0, x1, x2, x3 = (
            hi1 ^ x1 ^ schedule[2 * r],
            p1 & MASK,
            hi0 ^ x3 ^ schedule[2 * r + 1],
            p0 & MASK,
        )
    return x0, x1, x2, x3


def blocks(headers: Tensor, tiles: int | Tensor, num: int) -> tuple[Tensor, ...]:
    """Four int64 tensors `[tiles, headers, num]`: the 32-bit words of `num` blocks of each tile.

    `tiles`: how many, from number 0 on, or an int64 tensor of their numbers. Each header (int64) is
    `first block, step, stream and direction, then the key schedule`: a tensor, not Python numbers, so
    that one compiled form serves every parameter and step. Tiles have a dimension of their own from the
    start: a view of a flat tensor of unknown size would keep compiled loops scalar.
    """
    if not isinstance(tiles, Tensor):
        tiles = torch.arange(tiles, dtype=torch.int64, device=headers.device)
    rows = tiles.unsqueeze(-1).unsqueeze(-1) * num
    heads = headers.t().unsqueeze(-1)
    number = rows + torch.arange(num, dtype=torch.int64, device=headers.device) + heads[0]
    return philox((number & MASK, number >> 32, heads[1], heads[2]), heads[3:])


def words(headers: Tensor, tiles: int | Tensor, num: int) -> Tensor:
    """int32 `[tiles, headers, 4 * num]`: a tile's first words of all blocks, then their second ones ..."""
    joined = torch.cat(blocks(headers, tiles, num), dim=-1)
    return torch.where(joined > 0x7FFFFFFF, joined - LOW, joined).to(torch.int32)
