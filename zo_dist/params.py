"""Which parameters there are, what they are called, and how they group into arms.

Names are canonical: no segment that a wrapper put in (DDP, `torch.compile`, activation
checkpointing) reaches noise, logs or checkpoints, so a run means the same under every wrapper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Attribute names under which wrappers keep the module they wrap. `module` is an ordinary word, so
# it counts only at the root, where DDP and DeepSpeed engines put it.
_WRAPPER_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROOT_WRAPPERS = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine"}

# An arm that holds less than this share of the mean arm wastes a draw: it joins its neighbour.
_NEAR_EMPTY = 0.01

ShapeOf = Callable[[nn.Parameter], torch.Size]
PieceOf = Callable[[str, nn.Parameter], "Piece | None"]


class Runs(NamedTuple):
    """How a piece lies in a weight, where it is no run of it: runs of `width` elements, `stride` apart."""

    width: int
    stride: int


class Piece(NamedTuple):
    """What a rank has of a weight while its owner runs: a tensor of `shape`, placed as a `Span`."""

    shape: torch.Size
    offset: int = 0
    runs: Runs | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A local piece of one parameter: a contiguous run, or (under tensor parallelism) several.

    `flat` is a 1-D view of the weights this rank holds; its element j is element `offset + j` of
    the whole parameter, flattened row-major; with `runs`, `offset + j // width * stride + j % width`.
    Padding never belongs to a span.
    """

    name: str
    flat: Tensor
    offset: int
    runs: Runs | None = None

    @property
    def numel(self) -> int:
        return self.flat.numel()

    def number(self, j: int) -> int:
        """Which element of the parameter element `j` of `flat` is."""
        width, stride = self.runs or (self.numel, 0)
        return self.offset + j // width * stride + j % width

    def place(self, number: int) -> int:
        """Where in `flat` an element of the parameter is: `number`, taken back."""
        width, stride = self.runs or (0, self.numel + 1)
        row, column = divmod(number - self.offset, stride)
        return row * width + column

    def lasting(self) -> Tensor:
        """`flat`, in memory that is this span's alone for as long as it is wanted."""
        return self.flat


def require_contiguous(name: str, weight: Tensor) -> None:
    """ValueError for a weight whose elements do not follow each other in memory."""
    if not weight.is_contiguous():
        raise ValueError(f"parameter {name} is not contiguous; replace it by its .contiguous() copy")


def runs_of(offset: int, numel: int, runs: Runs | None) -> Iterator[tuple[int, slice]]:
    """The contiguous runs of a piece, in order: the number of the first element, and which of the piece."""
    width, stride = runs or (max(1, numel), 0)
    for row, start in enumerate(range(0, numel, width)):
        yield offset + row * stride, slice(start, min(start + width, numel))


class Owner(NamedTuple):
    """A module whose forward uses a parameter, and where it finds it.

    `holder` is `module` itself, or a `ParameterDict` or `ParameterList` in it: those have no forward
    of their own.
    """

    module: nn.Module
    holder: nn.Module
    attribute: str


@dataclass(frozen=True, slots=True)
class Param:
    """One trainable parameter: canonical name, whole shape, and the modules that own it.

    A tied weight has several owners and one name. `piece`: what of it is here while an owner runs, where
    that is not all (tensor parallelism).
    """

    name: str
    param: nn.Parameter
    shape: torch.Size
    owners: tuple[Owner, ...]
    piece: Piece | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Arm:
    """What a sampler draws: one decoder layer, the embeddings, or the rest."""

    name: str
    params: tuple[Param, ...]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, a DeepSpeed engine or a compiled module."""
    while True:
        if type(model).__name__ in _ROOT_WRAPPERS:
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside: every forward, and both sides of a direction, see the same function."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def canonical_name(name: str) -> str:
    """`name` (as `unwrap(model).named_parameters()` gives it) without wrapper segments."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)


def trainable_params(
    module: nn.Module, shape_of: ShapeOf, piece_of: PieceOf = lambda name, param: None
) -> list[Param]:
    """The parameters with `requires_grad`, in registration order, each tied weight once.

    `module` is unwrapped. Raises ValueError when there are none, when one has a dtype other than
    float32, bfloat16 or float16 or is stored quantised, or when two get the same canonical name.
    """
    owners: dict[nn.Parameter, list[Owner]] = {}
    names: dict[nn.Parameter, str] = {}
    modules = dict(module.named_modules())
    for prefix, holder in modules.items():
        runs = runner_of(prefix, modules)
        for attribute, param in holder._parameters.items():
            if param is not None and param.requires_grad:
                owners.setdefault(param, []).append(Owner(modules[runs], holder, attribute))
                names.setdefault(param, canonical_name(f"{prefix}.{attribute}".lstrip(".")))
    if not owners:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on those to train")
    seen: set[str] = set()
    for param, name in names.items():
        if is_quantised(param):
            raise ValueError(
                f"parameter {name} is stored quantised ({type(param).__name__}), in steps wider than a shift "
                "by eps; set requires_grad=False on it and train an adapter beside it (PEFT's LoRA)"
            )
        if param.dtype not in DTYPES:
            raise ValueError(
                f"parameter {name} has dtype {param.dtype}; cast it to float32, bfloat16 or float16, "
                "or set requires_grad=False"
            )
        if name in seen:
            raise ValueError(f"two different parameters are called {name} once wrappers are removed")
        seen.add(name)
    return [Param(names[p], p, shape_of(p), tuple(o), piece_of(names[p], p)) for p, o in owners.items()]


def runner_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module whose forward uses what `name` holds: itself, or what a `ParameterDict` or list is in."""
    while isinstance(modules[name], nn.ParameterDict | nn.ParameterList) and name:
        name = name.rpartition(".")[0]
    return name


def is_quantised(param: Tensor) -> bool:
    """Is it stored in several tensors (torchao)?"""
    return is_traceable_wrapper_subclass(param) and type(param).__name__ != "DTensor"


def stored_parts(name: str, param: Tensor) -> dict[str, Any]:
    """What a parameter is stored in, by name: itself, or the tensors of a quantised one (torchao)."""
    if not is_quantised(param):
        return {name: param}
    parts: dict[str, Any] = {}
    flattened: Any = param
    for part in flattened.__tensor_flatten__()[0]:
        parts.update(stored_parts(f"{name}.{part}", getattr(param, part)))
    return parts


def frozen_params(module: nn.Module, shape_of: ShapeOf) -> list[Param]:
    """The parameters without `requires_grad`, in registration order, each once, as they are stored.

    `module` is unwrapped.
    """
    found: dict[nn.Parameter, list[Param]] = {}
    for prefix, holder in module.named_modules():
        for attribute, param in holder._parameters.items():
            if param is not None and not param.requires_grad and param not in found:
                name = canonical_name(f"{prefix}.{attribute}".lstrip("."))
                owners = (Owner(holder, holder, attribute),)
                parts = stored_parts(name, param).items()
                found[param] = [Param(n, part, shape_of(part), owners) for n, part in parts]
    return [param for params in found.values() for param in params]


def group_arms(module: nn.Module, params: Sequence[Param], pattern: str | None = None) -> list[Arm]:
    """The arms: embeddings, each layer in order, the rest; near-empty ones joined to a neighbour.

    Layers are found by structure: the outermost `nn.ModuleList` (or `nn.Sequential`) objects whose
    children are repeated blocks, of one class in a list and of any class in a Sequential.
    Embeddings are the parameters of `nn.Embedding` modules outside the layers. An arm below 1% of
    the mean arm's size (the final norm of a model with a tied head) joins the arm before it.

    `pattern`: a regular expression for finer arms. A parameter in whose name it is found is of the arm that
    is called as the name is up to the end of what was found; what is not found stays where it was.
    Those arms are joined to none. ValueError if it is no expression, or is found in no name.
    """
    layers = find_layers(module)
    layer_of = {id(m): name for name, layer in layers for m in layer.modules()}
    groups: dict[str, list[Param]] = {"embeddings": []}
    groups.update({name: [] for name, _ in layers})
    groups["rest"] = []
    for p in params:
        owner = p.owners[0].module
        if id(owner) in layer_of:
            groups[layer_of[id(owner)]].append(p)
        elif any(isinstance(o.module, nn.Embedding) for o in p.owners):
            groups["embeddings"].append(p)
        else:
            groups["rest"].append(p)
    finer = {} if pattern is None else _matched(params, pattern)
    named: dict[str, list[Param]] = {}
    for name, members in groups.items():
        for p in members:
            named.setdefault(finer.get(p.name, canonical_name(name)), []).append(p)
    arms = [Arm(name, tuple(members)) for name, members in named.items()]
    return _join_near_empty(arms, alone=set(finer.values()))


def _matched(params: Sequence[Param], pattern: str) -> dict[str, str]:
    """The names of parameters in which the pattern is found, and what they are up to its end."""
    try:
        found = {p.name: re.search(pattern, p.name) for p in params}
    except re.error as error:
        raise ValueError(f"arms is {pattern!r}, not a regular expression: {error}") from error
    matched = {name: name[: match.end()] for name, match in found.items() if match and match.group()}
    if not matched:
        raise ValueError(
            f"arms is {pattern!r}, which is found in the name of no trained parameter; names look like "
            f"{params[len(params) // 2].name}"
        )
    return matched


def find_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """`(name, layer)` of the repeated blocks, in registration order; found by structure."""

    def walk(prefix: str, node: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = [(f"{prefix}{n}", c) for n, c in node.named_children()]
        filled = [(n, c) for n, c in children if next(c.parameters(), None) is not None]
        repeated = isinstance(node, nn.ModuleList) and len({type(c) for _, c in filled}) == 1
        if len(filled) > 1 and (repeated or isinstance(node, nn.Sequential)):
            yield from filled
            return
        for name, child in children:
            yield from walk(f"{name}.", child)

    return list(walk("", module))


def _join_near_empty(arms: list[Arm], alone: Collection[str]) -> list[Arm]:
    """`alone`: arms that stay as they are."""
    mean = sum(arm.numel for arm in arms) / len(arms)
    joined: list[Arm] = []
    for arm in arms:
        small = joined and min(arm.numel, joined[-1].numel) < _NEAR_EMPTY * mean
        if small and arm.name not in alone and joined[-1].name not in alone:
            before = joined.pop()
            arm = Arm(f"{before.name}+{arm.name}", before.params + arm.params)
        joined.append(arm)
    return joined
