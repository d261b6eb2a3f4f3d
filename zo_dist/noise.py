"""Noise as a function: z at one element depends on (seed, step, direction, name, element) alone.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
Its 128-bit counter holds `(block, step, direction, stream)` in plain, so two draws can only share a
counter if they are the same draw; its 64-bit key is a hash of `(seed, name)`. One call gives 128
random bits: 128 Rademacher signs, 4 Gaussians, or 8 rounding offsets of 16 bits.

Everything is written in torch operations whose result does not depend on how a tensor is cut, so
any split of a parameter into spans, any chunk size and any rank computes the same bits. The same
functions run eagerly or through `torch.compile`; on a CPU both give equal bits for both laws (no
libm call and no fused multiply-add is involved). On a GPU a compiler may contract a multiply and an
add, which can move a Gaussian by one unit in the last place; Rademacher products are exact there too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Law = Literal["rademacher", "gaussian"]
LAWS: tuple[str, ...] = get_args(Law)

# Streams keep the uses of one parameter's key apart; the number is the top byte of the counter.
NOISE, ROUNDING, DRAW = 0, 1, 2

BLOCK = {"rademacher": 128, "gaussian": 4, "rounding": 8}  # elements served by one Philox call

# Elements per pass of the eager form: the temporaries of one chunk stay in a core's cache.
EAGER_CHUNK = 1 << 20
# Below this many elements a compiled call costs more than it saves.
COMPILE_FROM = 1 << 14

_MASK = 0xFFFFFFFF
_LOW = 1 << 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The 64-bit Philox key of one parameter (or one named stream) of a run, as two 32-bit words."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _schedule(key: tuple[int, int]) -> list[int]:
    """The ten round keys, `k0, k1, k0', k1', ...`."""
    return [(key[i] + r * _WEYL[i]) & _MASK for r in range(_ROUNDS) for i in (0, 1)]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], schedule: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four broadcastable int64 tensors holding 32-bit words.

    `schedule` holds the 20 round-key words, int64. Returns four int64 tensors of 32-bit words.
    """
    x0, x1, x2, x3 = counter
    for r in range(_ROUNDS):
        # M - 2**32 fits a signed 32-bit word, so the product stays inside int64 without overflow.
        p0 = x0 * (_MULTIPLIERS[0] - _LOW)
        p1 = x2 * (_MULTIPLIERS[1] - _LOW)
        hi0 = ((p0 >> 32) + x0) & _MASK
        hi1 = ((p1 >> 32) + x2) & _MASK
        x0, x1, x2, x3 = (
            hi1 ^ x1 ^ schedule[2 * r],
            p1 & _MASK,
            hi0 ^ x3 ^ schedule[2 * r + 1],
            p0 & _MASK,
        )
    return x0, x1, x2, x3


def _words(header: Tensor, numel: int, unit: int) -> Tensor:
    """int32 `[numel / unit, 4]`: the random words of consecutive blocks.

    `header` (int64) is `first block, step, stream and direction, then the key schedule`: a tensor,
    not Python numbers, so that one compiled form serves every parameter and step.
    """
    blocks = torch.arange(numel // unit, dtype=torch.int64, device=header.device) + header[0]
    words = philox((blocks & _MASK, blocks >> 32, header[1], header[2]), header[3:])
    stacked = torch.stack(words, dim=-1)
    return torch.where(stacked > 0x7FFFFFFF, stacked - _LOW, stacked).to(torch.int32)


def _rademacher(words: Tensor, scale: Tensor) -> Tensor:
    """float32 `[32 * words]`: `scale` with the sign bit flipped where the random bit is set."""
    shifts = 31 - torch.arange(32, dtype=torch.int32, device=words.device)
    flips = (words.reshape(-1, 1) << shifts) & -0x80000000
    return (flips ^ scale.view(torch.int32)).view(torch.float32).reshape(-1)


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


def _gaussian(words: Tensor, scale: Tensor) -> Tensor:
    """float32 `[words]`: `scale` times standard normals, Box-Muller on pairs of words.

    Radius and angle each take 32 random bits; |z| < 6.8. The polynomials for sine and cosine on
    [-pi/4, pi/4] are those of Cephes `sinf` and `cosf`.
    """
    pairs = words.reshape(-1, 2)
    # A 32-bit word as float32, moved into (0, 1): int32 is signed, hence the 0.5.
    u = pairs[:, 0].to(torch.float32) * 2.0**-32 + (0.5 + 2.0**-33)
    square = _log(torch.clamp(u, min=2.0**-33, max=1.0 - 2.0**-24)) * -2.0
    # Not sqrt: eager torch hands that to a vendor library that rounds its own way.
    radius = square * torch.rsqrt(square)
    quadrant = pairs[:, 1] & 3
    # The upper 30 bits, signed, cover a quarter turn centred on 0.
    angle = (pairs[:, 1] >> 2).to(torch.float32) * (math.pi * 2.0**-31)
    t = angle * angle
    sine = ((t * -1.9515295891e-4 + 8.3321608736e-3) * t - 1.6666654611e-1) * t * angle + angle
    cosine = (
        ((t * 2.443315711809948e-5 - 1.388731625493765e-3) * t + 4.166664568298827e-2) * t * t - t * 0.5 + 1.0
    )
    swap, flip = (quadrant & 1) == 1, (quadrant & 2) == 2
    x, y = torch.where(swap, -sine, cosine), torch.where(swap, cosine, sine)
    radius = torch.where(flip, -radius, radius)
    return torch.stack((radius * x, radius * y), dim=-1).reshape(-1) * scale


_EXPAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
}


def _rounding(words: Tensor) -> Tensor:
    """int32 `[2 * words]`, uniform on 0..65535: the low, then the high half of each word."""
    return torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=-1).reshape(-1)


# The uses of noise, each one read and one write per element when compiled. Every tensor is flat,
# starts on a block boundary and holds whole blocks.
def _shift(out: Tensor, weight: Tensor, header: Tensor, scale: Tensor, law: str) -> None:
    z = _EXPAND[law](_words(header, out.numel(), BLOCK[law]), scale)
    out.copy_((weight.to(torch.float32) + z).to(out.dtype))


def _accumulate(out: Tensor, header: Tensor, scale: Tensor, law: str) -> None:
    out.add_(_EXPAND[law](_words(header, out.numel(), BLOCK[law]), scale))


def _offsets(out: Tensor, header: Tensor) -> None:
    out.copy_(_rounding(_words(header, out.numel(), BLOCK["rounding"])))


@cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(kernel, dynamic=True, fullgraph=True)


class Noise:
    """The noise of one run: its law and seed, and how it is put on flat tensors.

    `law`: `rademacher` (+1 or -1, the law SPSA was defined with; E z^4 = 1) or `gaussian`.
    `seed`: any integer in [0, 2**63). `compile`: fuse generation and use with `torch.compile`
    (C++ on a CPU, Triton on a GPU); otherwise the same operations run eagerly, in chunks that fit a
    cache. Raises ValueError for an unknown law or a seed out of range.

    In every method, element j of a tensor is element `offset + j` of parameter `name`.
    """

    def __init__(self, law: Law = "rademacher", seed: int = 0, compile: bool = False) -> None:
        if law not in LAWS:
            raise ValueError(f"noise law {law!r} is not known; use one of {', '.join(LAWS)}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r} is out of range; use an integer in [0, 2**63)")
        self.law: Law = law
        self.seed = seed
        self.compile = compile
        self._schedules: dict[str, list[int]] = {}

    def values(self, name: str, step: int, direction: int, offset: int, numel: int) -> Tensor:
        """float32 `[numel]` on the CPU: z itself, for tests and for looking."""
        out = torch.zeros(numel)
        self.accumulate(out, name, step, direction, offset, 1.0)
        return out

    def shift(
        self, out: Tensor, weight: Tensor, name: str, step: int, direction: int, offset: int, scale: float
    ) -> None:
        """`out = weight + scale * z` in float32 arithmetic, rounded once to `out.dtype`.

        `out` may be `weight`.
        """
        at = (name, step, NOISE, direction, offset)
        scalar = torch.tensor(scale, dtype=torch.float32, device=out.device)
        self._run(_shift, BLOCK[self.law], (out, weight), at, scalar, self.law)

    def accumulate(
        self, out: Tensor, name: str, step: int, direction: int, offset: int, scale: float
    ) -> None:
        """`out += scale * z` on a float32 tensor."""
        at = (name, step, NOISE, direction, offset)
        scalar = torch.tensor(scale, dtype=torch.float32, device=out.device)
        self._run(_accumulate, BLOCK[self.law], (out,), at, scalar, self.law)

    def rounding_bits(self, out: Tensor, name: str, step: int, offset: int) -> None:
        """Fill an int32 tensor with integers uniform on 0..65535, for stochastic rounding."""
        self._run(_offsets, BLOCK["rounding"], (out,), (name, step, ROUNDING, 0, offset))

    def uniforms(self, name: str, step: int, direction: int, numel: int) -> list[float]:
        """`numel` float64 uniforms in [0, 1), 53 bits each: the stream samplers draw arms from."""
        header = self._header((name, step, DRAW, direction, 0), 0, torch.device("cpu"))
        words = _words(header, 2 * numel, 2).reshape(-1)[: 2 * numel].to(torch.int64) & _MASK
        high, low = words.reshape(-1, 2).unbind(-1)
        return (((high >> 5) * 2**26 + (low >> 6)).to(torch.float64) * 2.0**-53).tolist()

    def _header(self, at: tuple[str, int, int, int, int], first_block: int, device: torch.device) -> Tensor:
        name, step, stream, direction, _ = at
        schedule = self._schedules.get(name)
        if schedule is None:
            schedule = self._schedules[name] = _schedule(stream_key(self.seed, name))
        head = [first_block, step & _MASK, stream << 24 | direction]
        return torch.tensor(head + schedule, dtype=torch.int64, device=device)

    def _run(
        self,
        kernel: Callable[..., None],
        unit: int,
        tensors: tuple[Tensor, ...],
        at: tuple[str, int, int, int, int],
        *extra: object,
    ) -> None:
        """Run `kernel` over `tensors` (the first is written), cut at block boundaries."""
        offset, numel, device = at[4], tensors[0].numel(), tensors[0].device
        fused = self.compile and numel >= COMPILE_FROM
        chunk = numel if fused else EAGER_CHUNK
        start = 0
        while start < numel:
            lead = (offset + start) % unit
            whole = min(numel - start, chunk) // unit * unit
            header = self._header(at, (offset + start) // unit, device)
            if lead == 0 and whole:
                pieces = tuple(t[start : start + whole] for t in tensors)
                (_compiled(kernel) if fused else kernel)(*pieces, header, *extra)
                start += whole
                continue
            # A span may begin or end inside a block: compute whole blocks, keep what is asked.
            size = min(unit - lead, numel - start) if numel >= chunk else numel - start
            padded = [t.new_zeros(-(-(lead + size) // unit) * unit) for t in tensors]
            for pad, t in zip(padded, tensors, strict=True):
                pad[lead : lead + size] = t[start : start + size]
            kernel(*padded, header, *extra)
            tensors[0][start : start + size] = padded[0][lead : lead + size]
            start += size
