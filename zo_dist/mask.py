"""Which weights within a parameter are trained: all, or only those of small magnitude (Sparse-MeZO).

A mask is no tensor. Stored weights are as they were when a step probes and when it writes, so each chunk of
them tells anew, and the same in both, which of its elements take part.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.engines import Engine
from zo_dist.params import Param
from zo_dist.part import Part

# Elements whose magnitudes or clean values are held beside them at a time.
_CHUNK = 1 << 20
# Bits of a threshold that one exchange between ranks settles, and the numbers it takes per parameter.
_DIGIT = 8
_COUNTS = 1 << _DIGIT


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallWeights:
    """Only the smallest weights are trained: Sparse-MeZO (arXiv 2402.15751).

    `share` in (0, 1]: how many of each parameter's starting weights, those of the smallest magnitude; 1 is
    all of them, the paper's sparsity is `1 - share`. Vectors (biases, norms) are trained whole.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share is {self.share}; it must lie in (0, 1], 1 trains all weights")


class Mask(Part):
    """The weights of a run that are trained: those with `|w| <= threshold`, each parameter having its own.

    A threshold is the magnitude that `share` of the parameter's weights did not exceed when `bind` was
    called (more of them where several have that very magnitude). It stays for the run, while the weights
    compared with it are those of the step: one that moves beyond is not trained again. Weights that are
    left out keep their bits, what rounding lost of them and what the rule keeps of them; they do not
    decay. Nothing is stored per weight.

    Where we differ: the paper makes its mask anew from weights that are perturbed, so that those near the
    threshold may be in at one side of a probe and out at the other, or in the write. Here all three see
    the stored weights, which a probe does not touch, and have the same mask. Only where an engine casts
    weights for the forward (`compute_dtype`) does a probe see the cast ones: some that lie within a
    rounding above the threshold are shifted, and not written.
    """

    def __init__(self, small: SmallWeights | None = None) -> None:
        self.share = 1.0 if small is None else small.share
        # By canonical name; a parameter that has none is trained whole.
        self.thresholds: dict[str, float] = {}

    def bind(self, engine: Engine, params: Sequence[Param]) -> None:
        """Take the thresholds from the weights as they are. A collective; once, by `ZeroOrder`.

        Raises ValueError on every rank where one is 0. Cost: four passes over this rank's weights, and 2 KiB
        sent per parameter, rank and pass.
        """
        if self.share == 1.0:
            return
        cut = [param for param in params if len(param.shape) > 1 and param.numel]
        ranks = {param.name: max(1, round(self.share * param.numel)) for param in cut}
        self.thresholds = smallest(engine, cut, ranks)
        zeros = [name for name, threshold in self.thresholds.items() if threshold == 0.0]
        if zeros:
            raise ValueError(
                f"mask.share is {self.share}, and so many weights of {zeros[0]} are 0, as the second "
                "factor of a LoRA is at the start: each would move once and never again. Raise the share, "
                "leave out the mask, or set requires_grad=False on the parameter"
            )

    def cuts(self, name: str) -> bool:
        """Are some weights of this parameter left out?"""
        return name in self.thresholds

    def put_back(self, outs: Sequence[Tensor], clean: Tensor, name: str) -> None:
        """Give `outs`, flat, the elements of `clean` that are left out; `clean` tells which those are."""
        if not self.cuts(name):
            return
        for start in range(0, clean.numel(), _CHUNK):
            piece = slice(start, start + _CHUNK)
            trained = self._trained(clean[piece], name)
            for out in outs:
                torch.where(trained, out[piece], clean[piece], out=out[piece])

    @contextmanager
    def kept(self, weights: Tensor, others: Sequence[Tensor], name: str) -> Iterator[None]:
        """What is left out of flat `weights`, and beside them of `others`, is afterwards as it was before.

        Holds a copy of all of them inside.
        """
        if not self.cuts(name):
            yield
            return
        trained = self._trained(weights, name)
        before = [tensor.clone() for tensor in (weights, *others)]
        yield
        for tensor, old in zip((weights, *others), before, strict=True):
            torch.where(trained, tensor, old, out=tensor)

    def _trained(self, weights: Tensor, name: str) -> Tensor:
        """bool, as long as `weights`; a weight that is no number is left out."""
        # Of the weights' own dtype, so that no device compares in another.
        return weights.abs() <= torch.tensor(self.thresholds[name], dtype=weights.dtype)

    def state_dict(self) -> dict[str, float]:
        """The thresholds: later weights do not tell them."""
        return dict(self.thresholds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state.keys() != self.thresholds.keys():
            raise ValueError(
                f"the saved state has thresholds of {len(state)} parameters, this mask has "
                f"{len(self.thresholds)}: it is of another mask, or of other parameters"
            )
        self.thresholds = dict(state)


def smallest(engine: Engine, params: Sequence[Param], ranks: Mapping[str, int]) -> dict[str, float]:
    """Of each whole weight the magnitude that is number `ranks[name]`, from 1, in ascending order.

    Exact, and the same for any number of ranks and sharding: nothing but whole numbers is added up. The bits
    of a magnitude in float32 have its order, so they are found from the highest down, a digit at a time, by
    counting. What is no number counts as the largest, and no more than the largest finite number is returned.
    A collective: four passes over this rank's weights, and 2 KiB sent per parameter, rank and pass.
    """
    found, left = dict.fromkeys(ranks, 0), dict(ranks)
    for shift in range(32 - _DIGIT, -1, -_DIGIT):
        counts = _counts(engine, params, found, shift)
        for name, of_digit in counts.items():
            digit = 0
            while left[name] > of_digit[digit]:
                left[name] -= of_digit[digit]
                digit += 1
            found[name] = found[name] << _DIGIT | digit
    largest = torch.finfo(torch.float32).max
    values = {name: struct.unpack("<f", struct.pack("<I", bits))[0] for name, bits in found.items()}
    return {name: value if math.isfinite(value) else largest for name, value in values.items()}


def _counts(
    engine: Engine, params: Sequence[Param], found: Mapping[str, int], shift: int
) -> dict[str, list[int]]:
    """How many elements of each whole weight, beginning as was `found`, have each digit at `shift` next."""
    mine: dict[str, Tensor] = {}
    for span in engine.spans(params):
        counts = mine[span.name] = torch.zeros(_COUNTS, dtype=torch.float64)
        for piece in torch.split(span.flat, _CHUNK):
            bits = piece.to(torch.float32).view(torch.int32) & 0x7FFFFFFF
            digits = bits[bits >> shift >> _DIGIT == found[span.name]] >> shift & (_COUNTS - 1)
            counts += torch.bincount(digits, minlength=_COUNTS).cpu()
    return engine.add_up(params, mine, _COUNTS)
