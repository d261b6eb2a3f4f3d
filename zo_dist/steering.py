"""What makes directions of noise: nothing, or a number that is kept beside each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_dist.noise import Noise
from zo_dist.params import Param, Span
from zo_dist.part import Part

# Elements whose noise is held at a time, in float32.
_CHUNK = 1 << 20

# Some elements' noise of a name, in float32: one for each number that is kept of them.
Drawing = Callable[[str], Tensor]


class Steering(Part):
    """What all share; this one is not used: noise itself is a direction, and nothing is kept.

    `kept`: float32 by canonical name, sharded as the weights are. A direction that is steered is `along` its
    noise and what is kept, in probe and write alike; what is kept changes in a write alone, by `steer`. So
    only whole weights can be shifted where all of it is held: `perturb="module"` is refused on shards.
    Cost: 4 bytes per parameter; shifts and writes are plain torch operations, not fused.

    `setting`: what `ZeroOrder` calls it. `begins_at`: what is kept at the start. `sums_noise`: is `steer`
    given the sum of `scale * z`? Else zeros.
    """

    setting = ""
    begins_at = 0.0
    sums_noise = True

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        # Where in the weight each begins.
        self._first: dict[str, int] = {}

    @property
    def used(self) -> bool:
        return False

    def along(self, drawing: Drawing, kept: Tensor, name: str, step: int) -> Tensor:
        """float32: the direction of the elements that `drawing` draws and `kept` belongs to."""
        raise TypeError(f"{type(self).__name__} does not say what a direction is; override along")

    def steer(
        self,
        estimate: Tensor,
        kept: Tensor,
        noise: Noise,
        name: str,
        step: int,
        terms: Sequence[tuple[int, float]],
        bends: Sequence[tuple[int, float]],
        offset: int,
    ) -> None:
        """Turn `estimate` into the one along directions, and bring `kept` up to date: in place, both float32.

        `terms`: `(direction, scale)`; `bends`: `(direction, curvature)`, of `Curvature.bends`.
        """
        raise TypeError(f"{type(self).__name__} does not say what a write does; override steer")

    def begin(self, spans: Sequence[Span], params: Sequence[Param], perturb: str) -> None:
        """Make what is kept: called once, by `ZeroOrder`.

        ValueError where weights are to be shifted whole, and this rank holds only a part of them.
        """
        if not self.used:
            return
        self.kept = {
            span.name: torch.full_like(span.flat, self.begins_at, dtype=torch.float32) for span in spans
        }
        self._first = {span.name: span.offset for span in spans}
        parts = [p.name for p in params if p.numel and len(self.kept.get(p.name, ())) != p.numel]
        if perturb == "module" and parts:
            raise ValueError(
                f"perturb is 'module', which shifts whole weights, but of what {self.setting} keeps beside "
                f"{parts[0]} this rank has only a part, as the model is sharded: use perturb: shard"
            )

    def of(self, name: str, offset: int, numel: int) -> Tensor:
        """What is kept of elements `offset ...` of a weight, which this rank holds."""
        start = offset - self._first[name]
        return self.kept[name][start : start + numel]

    def shift(
        self,
        outs: Sequence[Tensor],
        weight: Tensor,
        noise: Noise,
        name: str,
        step: int,
        direction: int,
        offset: int,
        scales: Sequence[float],
    ) -> None:
        """As `Noise.shift`, along the direction."""
        for start in range(0, weight.numel(), _CHUNK):
            piece = weight[start : start + _CHUNK]
            drawing = drawing_of(noise, piece, step, direction, offset + start)
            kept = self.of(name, offset + start, piece.numel())
            u, exact = self.along(drawing, kept, name, step), piece.to(torch.float32)
            for out, scale in zip(outs, scales, strict=True):
                out[start : start + _CHUNK] = exact + u * scale

    def shift_rows(
        self, table: Tensor, rows: Tensor, noise: Noise, name: str, step: int, direction: int, scale: float
    ) -> Tensor:
        """As `Noise.shift_rows`, along the direction."""
        nothing = torch.zeros(1, 1, device=table.device).expand(table.shape)

        def drawing(of: str) -> Tensor:
            return noise.shift_rows(nothing, rows, of, step, direction, 1.0)

        kept = self.of(name, 0, table.numel()).view(table.shape)
        u = self.along(drawing, kept[rows.to(kept.device)], name, step)
        return (table[rows].to(torch.float32) + u * scale).to(table.dtype)


def steering_of(*steerings: Steering) -> Steering:
    """That of them which is used, or none."""
    return next((steering for steering in steerings if steering.used), Steering())


def drawing_of(noise: Noise, like: Tensor, step: int, direction: int, offset: int) -> Drawing:
    """What draws the noise of elements `offset ...`, as many as `like` has."""

    def drawing(name: str) -> Tensor:
        z = torch.zeros_like(like, dtype=torch.float32)
        noise.accumulate(z, name, step, [(direction, 1.0)], offset)
        return z

    return drawing
