"""Noise as a function: z at one element depends on (seed, step, direction, name, element) alone.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
Its 128-bit counter holds `(block, step, direction, stream)` in plain, so two draws can only share a
counter if they are the same draw; its 64-bit key is a hash of `(seed, name)`. One call gives 128
random bits: 128 Rademacher signs, 4 Gaussians, or 32 roundings.

Everything is written in torch operations whose result does not depend on how a tensor is cut, so
any split of a parameter into spans, any chunk size and any rank computes the same bits. The same
functions run eagerly or through `torch.compile`; on a CPU both give equal bits for both laws (no
libm call and no fused multiply-add is involved). On a GPU a compiler may contract a multiply and an
add, which can move a Gaussian by one unit in the last place; Rademacher products are exact there too.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Law = Literal["rademacher", "gaussian"]
LAWS: tuple[str, ...] = get_args(Law)

# Streams keep the uses of one parameter's key apart; the number is the top byte of the counter.
NOISE, ROUNDING, DRAW = 0, 1, 2

# How many elements a kernel works on in one piece, as (rows, columns), and the Philox calls behind
# them. Elements are laid out so that the inner loop of a compiled kernel runs along the columns.
TILE = {
    "rademacher": ((4, 32), 1),  # word, bit
    "gaussian": ((2, 256), 128),  # cosine or sine, pair
    "rounding": ((8, 64), 16),  # window, word
}

# Elements per pass of the eager form: the temporaries of one chunk stay in a core's cache.
EAGER_CHUNK = 1 << 20

log = logging.getLogger(__name__)

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


def _words(header: Tensor, tiles: int, blocks: int) -> Tensor:
    """int32 `[tiles, 4 * blocks]`: the random words of consecutive tiles of consecutive blocks.

    `header` (int64) is `first block, step, stream and direction, then the key schedule`: a tensor,
    not Python numbers, so that one compiled form serves every parameter and step. Two dimensions
    from the start: a view of a flat tensor of unknown size would keep compiled loops scalar.
    """
    rows = torch.arange(tiles, dtype=torch.int64, device=header.device).unsqueeze(-1) * blocks
    number = rows + torch.arange(blocks, dtype=torch.int64, device=header.device) + header[0]
    words = philox((number & _MASK, number >> 32, header[1], header[2]), header[3:])
    stacked = torch.stack(words, dim=-1).flatten(1)
    return torch.where(stacked > 0x7FFFFFFF, stacked - _LOW, stacked).to(torch.int32)


def _rademacher(words: Tensor, scale: Tensor) -> Tensor:
    """float32 `[tiles, 4, 32]`: `scale` with the sign bit flipped where the random bit is set."""
    shifts = 31 - torch.arange(32, dtype=torch.int32, device=words.device)
    flips = (words.unsqueeze(-1) << shifts) & -0x80000000
    return (flips ^ scale.view(torch.int32)).view(torch.float32)


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
    """float32 `[tiles, 2, 256]`: `scale` times standard normals, Box-Muller on pairs of words.

    Radius and angle each take 32 random bits; |z| < 6.8. The polynomials for sine and cosine on
    [-pi/4, pi/4] are those of Cephes `sinf` and `cosf`.
    """
    radial, angular = words.view(-1, 2, 256).unbind(1)
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
    return torch.stack((radius * x, radius * y), dim=1) * scale


_EXPAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rademacher": _rademacher,
    "gaussian": _gaussian,
}


def _windows(words: Tensor) -> Tensor:
    """int32 `[tiles, 8, 64]`, each uniform on 0..65535: the 16-bit windows of a word at every nibble.

    Windows of one word share bits (the correlation of the nearest two is 1/16), which leaves each
    one uniform: rounding stays unbiased for every weight, at a quarter of the Philox calls. A tile
    of 64 words is laid out window by window, so that consecutive elements are consecutive words.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device).unsqueeze(-1)
    word = words.unsqueeze(1)
    # The word turned right by `shifts`. A left shift by 32 has no meaning in C, hence 28 and 4; an
    # arithmetic right shift fills with sign bits, hence the mask.
    left = 28 - shifts
    turned = ((word >> shifts) & ((torch.ones_like(left) << left << 4) - 1)) | (word << left << 4)
    return turned & 0xFFFF


def _stochastic(exact: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `exact` moved to a neighbouring value of a 16-bit `dtype`, still as float32.

    `bits`: int32, uniform on 0..65535. A value that `dtype` holds is never moved.
    """
    if dtype == torch.bfloat16:
        # bfloat16 is the upper half of float32: a carry out of the lower half rounds up.
        return ((exact.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    # float16 drops 13 bits of a normal number; below 2**-14 its values are 2**-24 apart.
    normal = ((exact.view(torch.int32) + (bits & 0x1FFF)) & -0x2000).view(torch.float32)
    # (adding the bits before the floor would itself round, and move values that fit).
    units = exact * 2.0**24
    below = torch.floor(units)
    up = bits.to(torch.float32) >= 65536.0 - (units - below) * 65536.0
    subnormal = (below + up.to(torch.float32)) * 2.0**-24
    # floor loses the sign of a negative zero.
    return torch.where(exact.abs() < 2.0**-14, torch.copysign(subnormal, exact), normal)


# The uses of noise, each one read and one write per element when compiled. Every tensor comes as
# `[tiles, rows, columns]`.
def _shift(out: Tensor, weight: Tensor, header: Tensor, scale: Tensor, law: str) -> None:
    z = _EXPAND[law](_words(header, out.shape[0], TILE[law][1]), scale)
    out.copy_((weight.to(torch.float32) + z).to(out.dtype))


def _accumulate(out: Tensor, header: Tensor, scale: Tensor, law: str) -> None:
    out.add_(_EXPAND[law](_words(header, out.shape[0], TILE[law][1]), scale))


def _round(out: Tensor, exact: Tensor, header: Tensor) -> None:
    bits = _windows(_words(header, out.shape[0], TILE["rounding"][1]))
    out.copy_(_stochastic(exact, bits, out.dtype).to(out.dtype))


@cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel` compiled once per dtype and law: the number of tiles is all that varies."""
    fused = torch.compile(kernel, fullgraph=True)

    def run(*args: Any) -> None:
        for arg in args:
            if isinstance(arg, Tensor) and arg.ndim == 3:
                torch._dynamo.mark_dynamic(arg, 0)
        fused(*args)

    return run


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

        `out` and `weight` must not share memory.
        """
        at = (name, step, NOISE, direction, offset)
        scalar = torch.tensor(scale, dtype=torch.float32, device=out.device)
        self._run(_shift, TILE[self.law], (out, weight), at, scalar, self.law)

    def accumulate(
        self, out: Tensor, name: str, step: int, direction: int, offset: int, scale: float
    ) -> None:
        """`out += scale * z` on a float32 tensor."""
        at = (name, step, NOISE, direction, offset)
        scalar = torch.tensor(scale, dtype=torch.float32, device=out.device)
        self._run(_accumulate, TILE[self.law], (out,), at, scalar, self.law)

    def round(self, out: Tensor, exact: Tensor, name: str, step: int, offset: int) -> None:
        """Write float32 `exact` to a 16-bit `out`, up or down so that the mean is `exact`."""
        self._run(_round, TILE["rounding"], (out, exact), (name, step, ROUNDING, 0, offset))

    def warm_up(self, kinds: set[tuple[torch.dtype, torch.device]]) -> None:
        """Compile what weights of these dtypes and devices will need, and log how long it took."""
        if not self.compile:
            return
        start = time.perf_counter()
        try:
            for dtype, device in kinds:
                self._run_each_kernel(dtype, device)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning("noise runs eagerly, which is slower: it could not be compiled (%s)", error)
            self.compile = False
            return
        log.info("noise kernels compiled in %.0f s", time.perf_counter() - start)

    def _run_each_kernel(self, dtype: torch.dtype, device: torch.device) -> None:
        numel = 2 * math.prod(TILE["gaussian"][0])
        weight = torch.zeros(numel, dtype=dtype, device=device)
        exact = torch.zeros(numel, dtype=torch.float32, device=device)
        self.shift(weight, weight.clone(), "", 0, 0, 0, 0.0)
        self.accumulate(exact, "", 0, 0, 0, 0.0)
        if dtype != torch.float32:
            self.round(weight, exact, "", 0, 0)

    def uniforms(self, name: str, step: int, direction: int, numel: int) -> list[float]:
        """`numel` float64 uniforms in [0, 1), 53 bits each: the stream samplers draw arms from."""
        header = self._header((name, step, DRAW, direction, 0), 0, torch.device("cpu"))
        words = _words(header, 1, numel // 2 + 1).reshape(-1)[: 2 * numel].to(torch.int64) & _MASK
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
        tile: tuple[tuple[int, int], int],
        tensors: tuple[Tensor, ...],
        at: tuple[str, int, int, int, int],
        *extra: object,
    ) -> None:
        """Run `kernel` over flat `tensors` (the first is written), cut at tile boundaries."""
        offset, numel, device = at[4], tensors[0].numel(), tensors[0].device
        shape, blocks = tile
        unit = math.prod(shape)
        chunk = numel if self.compile else EAGER_CHUNK
        run = _compiled(kernel) if self.compile else kernel
        start = 0
        while start < numel:
            lead = (offset + start) % unit
            whole = min(numel - start, chunk) // unit * unit
            header = self._header(at, (offset + start) // unit * blocks, device)
            # The compiler takes a size of 1 for a constant: pad a single tile to two.
            if lead == 0 and whole and not (self.compile and whole == unit):
                # .data: a view of a parameter would have the compiler guard on the parameter's shape.
                pieces = [t[start : start + whole].data.view(-1, *shape).data for t in tensors]
                run(*pieces, header, *extra)
                start += whole
                continue
            # A span may begin or end inside a tile: compute whole tiles, keep what is asked.
            size = min(unit - lead, numel - start) if numel >= chunk else numel - start
            tiles = max(-(-(lead + size) // unit), 2 if self.compile else 1)
            padded = [t.new_zeros(tiles * unit) for t in tensors]
            for pad, t in zip(padded, tensors, strict=True):
                pad[lead : lead + size] = t[start : start + size]
            run(*(pad.view(-1, *shape).data for pad in padded), header, *extra)
            tensors[0][start : start + size] = padded[0][lead : lead + size]
            start += size
