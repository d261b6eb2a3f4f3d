"""How ranks tell whether they have the same: digests of values and weights, and who is the odd one out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from zo_dist import native
from zo_dist.params import Runs

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Elements at a time: they are widened to 64 bits.
_CHUNK = 1 << 22
# 2**20 squares of at most 2**10, in units of 2**-32, stay below 2**63.
_MOMENT_CHUNK = 1 << 20


class DesyncError(RuntimeError):
    """Ranks that are to hold the same no longer do; the message names those that differ."""


def digest(text: str) -> int:
    """48 bits of `text`: exact in a float64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def fingerprint(weight: Tensor, offset: int = 0, runs: Runs | None = None) -> int:
    """64 bits: the wrapped sum of each element's bits times its odd number, as `Span` numbers them.

    No change of a single element leaves it as it was, and the sum of the pieces' is the whole's.
    """
    words = weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])
    if runs is not None:
        # As if they followed each other, and what each run lies farther on.
        of_runs = words.view(-1, runs.width).sum(1, dtype=torch.int64)
        farther = torch.arange(len(of_runs), device=words.device) * (2 * (runs.stride - runs.width))
        return (fingerprint(weight, offset) + int((of_runs * farther).sum())) & (1 << 64) - 1
    if words.device.type == "cpu" and native.library() is not None:
        return native.fingerprint(words, offset)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, len(words), _CHUNK):
        piece = words[start : start + _CHUNK].to(torch.int64)
        first = 2 * (offset + start) + 1
        total += (piece * torch.arange(first, first + 2 * len(piece), 2, device=weight.device)).sum()
    return int(total) & (1 << 64) - 1


def moment_sums(weight: Tensor) -> tuple[int, int]:
    """The sum of the elements in units of 2**-24, and that of their squares in units of 2**-32.

    Whole numbers, whose sum does not depend on the order: each element and square is rounded by itself.
    Elements beyond 32 count as 32.
    """
    flat, first, second = weight.detach().reshape(-1), 0, 0
    in_native = flat.device.type == "cpu" and native.library() is not None
    for start in range(0, len(flat), _MOMENT_CHUNK):
        piece = flat[start : start + _MOMENT_CHUNK]
        if in_native:
            one, square = native.moment_sums(piece)
        else:
            exact = piece.to(torch.float64).clamp(-32.0, 32.0)
            parts = exact * 2.0**24, exact * exact * 2.0**32
            one, square = (int(part.round().to(torch.int64).sum()) for part in parts)
        first, second = first + one, second + square
    return first, second


def require_alike(of_rank: Mapping[int, object], what: str) -> None:
    """Raise DesyncError, naming ranks, if these values are not all equal. Every rank gives the same ones."""
    counts = Counter(of_rank.values())
    if len(counts) == 1:
        return
    value, count = counts.most_common(1)[0]
    odd = ", ".join(str(rank) for rank, theirs in of_rank.items() if theirs != value)
    if 2 * count > len(of_rank):
        which = f"rank {odd} differs from the {count} others"
    else:
        which = f"ranks {', '.join(map(str, of_rank))} differ, with no majority"
    raise DesyncError(
        f"the ranks have come apart in {what}: {which}. They no longer train one model: go on from a "
        "checkpoint, or rebuild the weights from the trajectory"
    )
