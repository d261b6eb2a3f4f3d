"""Noise as a function: z at one element depends on (seed, step, direction, name, element) alone.

One Philox call (`generator.py`) gives 128 Rademacher signs or 4 Gaussians. Everything is written in
torch operations whose result does not depend on how a tensor is cut, so any split of a parameter into
spans, any chunk size and any rank computes the same bits. The same functions run eagerly or through
`torch.compile` (`kernels.py`), and native.cpp repeats them for CPUs; there all three give equal bits for
both laws (no libm call and no fused multiply-add is involved). On a GPU a compiler may contract a
multiply and an add, which can move a Gaussian by one unit in the last place; Rademacher products are
exact there too.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from zo_dist import generator, native
from zo_dist.kernels import EAGER_CHUNK, Kernel, run
from zo_dist.laws import EXPAND, LAWS, TILES, Law
from zo_dist.params import Span
from zo_dist.stochastic import STOCHASTIC, factors

# Which bits there are: raised with any change of them, so that a log is not replayed with others.
VERSION = 2

# Streams keep the uses of one parameter's key apart; the number is the top byte of the counter.
NOISE, ROUNDING, DRAW = 0, 1, 2

# Directions added in one pass: more would save little and take longer to compile.
GROUP = 4

log = logging.getLogger(__name__)


def _unit(headers: Tensor, tiles: int | Tensor, law: str) -> list[Tensor]:
    """For each header, z of these tiles."""
    return [EXPAND[law](words) for words in generator.words(headers, tiles, TILES[law][1]).unbind(1)]


# The uses of noise, each one read and one write per element when compiled. Tensors come in tiles.
def _shift(*arguments: Any) -> None:
    *outs, weight, headers, scales, law = arguments
    (z,), exact = _unit(headers, weight.shape[0], law), weight.to(torch.float32)
    for out, scale in zip(outs, scales, strict=True):
        out.copy_((exact + z * scale).to(out.dtype))


def _combine(out: Tensor, *arguments: Any) -> None:
    *inputs, headers, scales, law, onto, function, options = arguments
    parts = [z * scale for z, scale in zip(_unit(headers, out.shape[0], law), scales, strict=True)]
    total = out + parts[0] if onto else parts[0]
    for part in parts[1:]:
        total = total + part
    out.copy_(function(total, *options, *inputs) if function else total)


_SHIFT = {
    (law, sides): Kernel(_shift, *tile, outputs=sides) for law, tile in TILES.items() for sides in (1, 2)
}
_COMBINE = {law: Kernel(_combine, *tile) for law, tile in TILES.items()}


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers, for which the host does not wait: it goes to a GPU from pinned memory."""
    if device.type in ("cpu", "meta"):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


class Noise:
    """The noise of one run: its law and seed, and how it is put on flat tensors.

    `law`: `rademacher` (+1 or -1, the law SPSA was defined with; E z^4 = 1) or `gaussian`.
    `seed`: any integer in [0, 2**63). `compile`: fuse generation and use, on a CPU by native.cpp, else
    with `torch.compile`; otherwise the same operations run eagerly, in chunks that fit a cache. Raises
    ValueError for an unknown law or a seed out of range.

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

    @property
    def fused(self) -> bool:
        """Do kernels run compiled now? Not while a dispatch mode (a counter, a profiler) looks on."""
        return self.compile and not is_in_torch_dispatch_mode()

    def in_native(self, tensor: Tensor) -> bool:
        """Does the code of native.cpp serve for this tensor? Else it is `torch.compile`, or eager torch."""
        return self.fused and tensor.device.type == "cpu" and native.library() is not None

    @property
    def kind(self) -> str:
        """What tells this noise from any other of its seed."""
        return self.law

    def has_sides(self, name: str) -> bool:
        """Is z of this parameter made of two thin matrices? Then `add_products` takes it."""
        return False

    def add_products(
        self, out: Tensor, x: Tensor, name: str, step: int, terms: Sequence[tuple[int, float, slice]]
    ) -> None:
        """`out[rows] += scale * x[rows] @ z.T` for each `(direction, scale, rows)`, without z itself."""
        raise TypeError(f"{type(self).__name__} has no sides")

    def is_product(self, name: str) -> bool:
        """Is z of this parameter, and any sum over directions, the product of two thin matrices, `sides`?"""
        return False

    def sides(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        device: torch.device,
        offset: int = 0,
        numel: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """These in float32, `[rows, inner]` and `[inner, columns]`: their product is the sum of `scale * z`.

        Over `(direction, scale)`, in order; directions share the second. Of the first, the rows that `numel`
        elements from `offset` on lie in, or all.
        """
        raise TypeError(f"{type(self).__name__} is no product")

    def factor(
        self,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        device: torch.device,
        offset: int = 0,
        numel: int | None = None,
    ) -> Tensor:
        """float32, flat: what a step draws of `sides`, the first or numbers that weigh their products."""
        raise TypeError(f"{type(self).__name__} is no product")

    def sides_of(
        self, name: str, step: int, factor: Tensor, offset: int = 0, numel: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `sides`, of what took the place of `factor`."""
        raise TypeError(f"{type(self).__name__} is no product")

    def require_factor(self, lasting: bool) -> None:
        """ValueError if this noise has none that a rule that is `factored` moves.

        `lasting`: it is to be of products that last for the run.
        """
        raise ValueError(
            "factored is true: the rule is to keep its moments in a factor of noise of low rank, but this "
            "noise has full rank; give structure LowRank(...), or set factored to false"
        )

    def factor_span(self, span: Span) -> Span:
        """What a rule that is `factored` moves in place of `span`: of a matrix its part of `factor`.

        A span of that, not filled in. Raises as `require_factor`.
        """
        self.require_factor(False)
        return span

    def carry(self, name: str, left: Tensor, before: int, step: int) -> None:
        """Change `left`, flat rows of a first side, from the second side of step `before` to that of `step`.

        In place, so that their product is the nearest to what it was. Nothing if `before` is -1.
        """
        raise TypeError(f"{type(self).__name__} is no product")

    def values(self, name: str, step: int, direction: int, offset: int, numel: int) -> Tensor:
        """float32 `[numel]` on the CPU: z itself, for tests and for looking."""
        out = torch.zeros(numel)
        self.accumulate(out, name, step, [(direction, 1.0)], offset)
        return out

    def shift(
        self,
        outs: Sequence[Tensor],
        weight: Tensor,
        name: str,
        step: int,
        direction: int,
        offset: int,
        scales: Sequence[float],
    ) -> None:
        """`out = weight + scale * z` for one or two outs, in float32, rounded once to their dtype.

        Two cost one reading of the weight and one z. `outs` and `weight` must not share memory.
        """
        if self.in_native(weight):
            native.shift(outs, weight, self.law, self.address(name, step, NOISE, direction), offset, scales)
            return
        kernel = _SHIFT[self.law, len(outs)]
        self._add_noise(kernel, (*outs, weight), name, step, [direction], scales, offset)

    def shift_rows(
        self, table: Tensor, rows: Tensor, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        """`[len(rows), width]`: rows of a matrix, shifted as `shift` shifts them in the whole.

        Eagerly, so for few rows: some 30 passes over what is returned.
        """
        width, unit = table.shape[1], math.prod(TILES[self.law][0])
        header = self._headers(name, step, NOISE, [direction], 0, table.device)
        spread = torch.arange(-(-width // unit) + 1, device=table.device)
        columns = torch.arange(width, device=table.device)
        factor = to_device(scale, torch.float32, table.device)
        size = max(1, EAGER_CHUNK // width)
        out = table.new_empty(len(rows), width)
        for some, shifted in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            first = some.to(torch.int64) * width
            tiles = (first // unit).unsqueeze(1) + spread
            (z,) = _unit(header, tiles.flatten(), self.law)
            z = z.view(len(some), -1).gather(1, (first % unit).unsqueeze(1) + columns)
            shifted.copy_(table[some].to(torch.float32) + z * factor)
        return out

    def accumulate(
        self, out: Tensor, name: str, step: int, terms: Sequence[tuple[int, float]], offset: int
    ) -> None:
        """`out += scale * z` for each `(direction, scale)` in order, on a float32 tensor."""
        if self.in_native(out):
            native.accumulate(out, self.law, self.address(name, step, NOISE), offset, terms)
            return
        self._combine(out, (), name, step, terms, offset, True, None, ())

    def combine(
        self,
        out: Tensor,
        inputs: Sequence[Tensor],
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        function: Callable[..., Tensor],
        options: tuple[object, ...],
    ) -> None:
        """`out = function(total, *options, *inputs)`, `total` being the sum of `scale * z` in order.

        On float32 `out`, in one pass for up to `GROUP` terms, and one pass for every `GROUP` more.
        `function` works element by element; `inputs` are as long as `out`.
        """
        onto, last = len(terms) > 1, (len(terms) - 1) // GROUP * GROUP
        if onto:
            out.zero_()
        self.accumulate(out, name, step, terms[:last], offset)
        self._combine(out, inputs, name, step, terms[last:], offset, onto, function, options)

    def _combine(
        self,
        out: Tensor,
        inputs: Sequence[Tensor],
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        offset: int,
        onto: bool,
        *more: object,
    ) -> None:
        for i in range(0, len(terms), GROUP):
            group = list(terms[i : i + GROUP])
            if self.fused and onto:
                # Filled up with zeros, which change no sum, so that one kernel serves.
                group += [(group[0][0], 0.0)] * (GROUP - len(group))
            directions, scales = [d for d, _ in group], [s for _, s in group]
            kernel = _COMBINE[self.law]
            self._add_noise(kernel, (out, *inputs), name, step, directions, scales, offset, onto, *more)

    def round(self, out: Tensor, exact: Tensor, name: str, step: int, offset: int) -> None:
        """Write float32 `exact` to a 16-bit `out`, up or down so that the mean is `exact`."""
        if self.in_native(out):
            native.round(out, exact, self.address(name, step, ROUNDING), offset)
            return

        def arguments(block: int) -> tuple[object, ...]:
            return self._headers(name, step, ROUNDING, [0], block, out.device), factors(out.device)

        run(STOCHASTIC[out.dtype], (out, exact), offset, arguments, fused=self.fused)

    def warm_up(self, kinds: set[tuple[torch.dtype, torch.device]], use: Callable[..., None]) -> None:
        """Compile what `use(weights)` needs for weights of these dtypes and devices; log the seconds.

        `weights` is a flat tensor of a few tiles. Where nothing can be compiled, noise runs eagerly
        from then on, and the log says so.
        """
        if not self.compile:
            return
        start = time.perf_counter()
        try:
            for dtype, device in sorted(kinds, key=str):
                use(torch.zeros(1 << 16, dtype=dtype, device=device))
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning("noise runs eagerly, which is slower: it could not be compiled (%s)", error)
            self.compile = False
            return
        log.info("noise kernels compiled in %.0f s", time.perf_counter() - start)

    def uniforms(self, name: str, step: int, direction: int, numel: int) -> list[float]:
        """`numel` float64 uniforms in [0, 1), 53 bits each: the stream samplers draw arms from."""
        header = self._headers(name, step, DRAW, [direction], 0, torch.device("cpu"))
        words = torch.stack(generator.blocks(header, 1, numel // 2 + 1), dim=-1).reshape(-1, 2)[:numel]
        high, low = words.unbind(-1)
        return (((high >> 5) * 2**26 + (low >> 6)).to(torch.float64) * 2.0**-53).tolist()

    def _add_noise(
        self,
        kernel: Kernel,
        tensors: tuple[Tensor, ...],
        name: str,
        step: int,
        directions: Sequence[int],
        scales: Sequence[float],
        offset: int,
        *more: object,
    ) -> None:
        device = tensors[0].device
        factors = to_device(scales, torch.float32, device)

        def arguments(block: int) -> tuple[object, ...]:
            return self._headers(name, step, NOISE, directions, block, device), factors, self.law, *more

        run(kernel, tensors, offset, arguments, fused=self.fused)

    def address(self, name: str, step: int, stream: int, direction: int = 0) -> native.Address:
        """What tells native.cpp where the random bits of this use are."""
        key0, key1 = self._schedule(name)[:2]
        return native.Address(key0, key1, step & generator.MASK, stream << 24 | direction)

    def _schedule(self, name: str) -> list[int]:
        if name not in self._schedules:
            self._schedules[name] = generator.key_schedule(generator.stream_key(self.seed, name))
        return self._schedules[name]

    def _headers(
        self, name: str, step: int, stream: int, directions: Sequence[int], block: int, device: torch.device
    ) -> Tensor:
        """int64 `[directions, 23]`, a header of `generator.words` for each direction."""
        schedule = self._schedule(name)
        heads = [[block, step & generator.MASK, stream << 24 | d, *schedule] for d in directions]
        return to_device(heads, torch.int64, device)
