"""How far each parameter is perturbed, beside the others: a factor on its noise, in probe and write alike.

With factor s, the direction of a parameter is s * z, so what it moves by goes with s squared: a diagonal
preconditioner with one number per tensor. Factors have a mean square of 1 over all weights, and leave the
size of a whole perturbation as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from zo_dist.engines import Engine
from zo_dist.params import Arm, Param
from zo_dist.part import Part
from zo_dist.samplers import Draw
from zo_dist.trajectory import StepRecord

# Of the nets: mean and variance of the weights, the losses of both sides, the factor before.
NUM_INPUTS, NUM_HIDDEN = 5, 64

# Bits of a factor. What another machine's tanh rounds otherwise is far below, so that factors need not be in
# the log to be the same there.
_BITS = 12


class Scale(Part):
    """What all share; this one leaves every parameter as it is.

    State and results are the same on every rank. `bind` is called once, by `ZeroOrder`.
    """

    def bind(self, arms: Sequence[Arm]) -> None:
        self.params: list[Param] = [param for arm in arms for param in arm.params]

    def factors(self, engine: Engine) -> dict[str, float]:
        """The factor of each parameter in the step to come, by name; 1 for those left out. A collective."""
        return {}

    def observe(self, record: StepRecord, draws: Sequence[Draw]) -> None:
        """Learn from a step that was written, with the last `factors`."""


class RunningScale(Scale):
    """Factors of arms by the slopes they took part in: nothing is learnt beforehand.

    For each arm a running mean of the squared slopes of directions that drew it, whose root is its factor,
    no more than `limit` times above or below the others' mean. `alpha` in (0, 1]: the weight of the newest.
    A slope is taken for as long a perturbation as that of no scale: squared, it is divided by the mean square
    of the drawn weights' factors (and lengths, see `Draw`), else factors would feed on themselves. Directions
    that draw every arm tell none from another. (Ours; no paper has it.)
    """

    def __init__(self, alpha: float = 0.05, limit: float = 4.0) -> None:
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must lie in (0, 1]")
        if not 1.0 <= limit < math.inf:
            raise ValueError(f"limit is {limit}; it must be finite and at least 1")
        self.alpha, self.limit = alpha, limit

    def bind(self, arms: Sequence[Arm]) -> None:
        super().bind(arms)
        self._arms, self._squares = list(arms), [0.0] * len(arms)
        self._in_force = [1.0] * len(arms)

    def factors(self, engine: Engine) -> dict[str, float]:
        seen = [square for square in self._squares if square]
        if not seen:
            return {}
        mean = math.fsum(seen) / len(seen)
        roots = [min(max(math.sqrt((s or mean) / mean), 1 / self.limit), self.limit) for s in self._squares]
        by_name = {p.name: root for arm, root in zip(self._arms, roots, strict=True) for p in arm.params}
        factors = _of_mean_square_1(by_name, {p.name: float(p.numel) for p in self.params})
        self._in_force = [factors[arm.params[0].name] for arm in self._arms]
        return factors

    def observe(self, record: StepRecord, draws: Sequence[Draw]) -> None:
        for draw, slope in zip(draws, record.slopes, strict=True):
            if len(draw.arms) == len(self._arms):
                continue
            sizes = [float(self._arms[arm].numel) for arm in draw.arms]
            scales = [self._in_force[a] * length for a, length in zip(draw.arms, draw.lengths, strict=True)]
            squares = [n * scale**2 for n, scale in zip(sizes, scales, strict=True)]
            found = slope * slope / (math.fsum(squares) / math.fsum(sizes))
            for arm in draw.arms:
                before = self._squares[arm] or found
                self._squares[arm] = (1.0 - self.alpha) * before + self.alpha * found

    def state_dict(self) -> dict[str, list[float]]:
        return {"squares": list(self._squares)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        if set(state) != {"squares"} or len(state["squares"]) != len(self._squares):
            raise ValueError(
                f"RunningScale's state holds squares, one for each of {len(self._squares)} arms; got "
                f"{ ({key: len(values) for key, values in state.items()}) }"
            )
        self._squares = [float(x) for x in state["squares"]]


class ScaleNets(nn.Module):
    """One small net for each block (a parameter tensor): 5 inputs, 64 hidden, tanh, absolute value.

    449 numbers per block, float64. ZO Fine-tuner (arXiv 2510.00419) and its code.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(num_blocks, NUM_HIDDEN, NUM_INPUTS, dtype=torch.float64))
        self.hidden_bias = nn.Parameter(torch.empty(num_blocks, NUM_HIDDEN, dtype=torch.float64))
        self.out = nn.Parameter(torch.empty(num_blocks, NUM_HIDDEN, dtype=torch.float64))
        self.out_bias = nn.Parameter(torch.empty(num_blocks, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """`[blocks, 5]` to `[blocks]`: how far each block is perturbed, before all are normalised."""
        hidden = torch.tanh((self.hidden * inputs.unsqueeze(1)).sum(2) + self.hidden_bias)
        return ((self.out * hidden).sum(1) + self.out_bias).abs()


class LearnedScale(Scale):
    """Factors by nets that `zo-dist learn-scale` trained on this model or one of the same shapes.

    ZO Fine-tuner (arXiv 2510.00419). `path`: what it wrote, read by `ZeroOrder`. Per step, inputs are the
    mean and variance of each block, the mean losses of both sides in the step before and the factor
    before. Cost: a pass over this rank's weights and 32 bytes per parameter tensor and rank. Where we
    differ: an embedding that is also the head counts whole in the normalisation, not by the tokens of a
    batch; factors are cut to 12 bits, so that the log of a run replays anywhere.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser()

    def bind(self, arms: Sequence[Arm]) -> None:
        super().bind(arms)
        self._nets, self._rows, tokens = load_nets(self._path)
        # What logs and ranks compare: the file may lie elsewhere on another machine.
        self.content = hashlib.sha256(self._path.read_bytes()).hexdigest()
        missing = [p.name for p in self.params if self._rows.get(p.name, (0, ()))[1] != tuple(p.shape)]
        if missing:
            raise ValueError(
                f"{self._path} was learnt for other parameters: it lacks {len(missing)} of "
                f"{len(self.params)} of this model, or has them in another shape, first {missing[0]}; "
                "learn a scale with this model"
            )
        self._energies = energies(self.params, tokens)
        self._sigmas = [1.0] * len(self.params)
        self._losses = [0.0, 0.0]

    def factors(self, engine: Engine) -> dict[str, float]:
        moments = engine.moments(self.params)
        rows = torch.tensor([self._rows[p.name][0] for p in self.params])
        inputs = torch.zeros(len(self._rows), NUM_INPUTS, dtype=torch.float64)
        inputs[rows] = inputs_of([moments[p.name] for p in self.params], self._losses, self._sigmas)
        with torch.no_grad():
            found = self._nets(inputs)[rows].tolist()
        self._found = [cut(sigma) for sigma in found]
        return _of_mean_square_1(
            {p.name: sigma for p, sigma in zip(self.params, self._found, strict=True)}, self._energies
        )

    def observe(self, record: StepRecord, draws: Sequence[Draw]) -> None:
        self._sigmas, self._losses = self._found, list(record.losses)

    def state_dict(self) -> dict[str, list[float]]:
        return {"sigmas": list(self._sigmas), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        if {key: len(values) for key, values in state.items()} != {"sigmas": len(self.params), "losses": 2}:
            raise ValueError(
                f"LearnedScale's state holds sigmas of {len(self.params)} parameters and 2 losses; got "
                f"{ ({key: len(values) for key, values in state.items()}) }"
            )
        self._sigmas, self._losses = list(state["sigmas"]), list(state["losses"])


def inputs_of(
    moments: Sequence[tuple[float, float]], losses: Sequence[float], sigmas: Sequence[float]
) -> Tensor:
    """float64 `[blocks, 5]`: what the nets see."""
    pairs = zip(moments, sigmas, strict=True)
    return torch.tensor([[*of, *losses, sigma] for of, sigma in pairs], dtype=torch.float64)


def energies(params: Sequence[Param], tokens: int) -> dict[str, float]:
    """What a block counts in the normalisation: its numbers, or of an embedding those of so many tokens."""
    counts = {}
    for param in params:
        looked_up = all(isinstance(owner.module, nn.Embedding) for owner in param.owners)
        counts[param.name] = float(min(param.numel, tokens * param.shape[-1]) if looked_up else param.numel)
    return counts


def normaliser(sigmas: Tensor, counts: Tensor) -> Tensor:
    """What makes the mean square of `sigmas` 1, over all weights."""
    return torch.sqrt(counts.sum() / (counts * sigmas * sigmas).sum())


def save_nets(
    path: str | Path, nets: ScaleNets, params: Sequence[Param], tokens: int, told: dict[str, Any]
) -> None:
    """Write what `LearnedScale` reads; `told`: what else is to be known of it, for JSON."""
    blocks = json.dumps([[param.name, list(param.shape)] for param in params])
    metadata = {"blocks": blocks, "tokens": str(tokens), "told": json.dumps(told)}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_bytes(save({key: t.detach() for key, t in nets.state_dict().items()}, metadata))
    partial.replace(target)


def load_nets(path: str | Path) -> tuple[ScaleNets, dict[str, tuple[int, tuple[int, ...]]], int]:
    """The nets; the row and shape of each parameter's block; tokens. ValueError if it holds no such thing."""
    try:
        data = Path(path).read_bytes()
        tensors = load(data)
        # The header is JSON after its length: `load` does not tell the metadata.
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        blocks, tokens = json.loads(metadata["blocks"]), int(metadata["tokens"])
        nets = ScaleNets(len(blocks))
        nets.load_state_dict(tensors)
    except OSError as error:
        raise ValueError(f"the scale {str(path)!r} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not what zo-dist learn-scale writes: {error}") from error
    return nets, {name: (row, tuple(shape)) for row, (name, shape) in enumerate(blocks)}, tokens


def _of_mean_square_1(factors: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
    energy = math.fsum(counts[name] * factor * factor for name, factor in factors.items())
    if not energy > 0.0:
        return {}
    common = math.sqrt(math.fsum(counts[name] for name in factors) / energy)
    return {name: cut(factor * common) for name, factor in factors.items()}


def cut(x: float) -> float:
    """`x` with so many bits as other machines, with functions of their own, agree on."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * (1 << _BITS)), exponent - _BITS)
