"""Cut a language model into the stages of a pipeline: whole layers, and what runs before or after them.

Every stage keeps the whole tree of modules, so that names, arms and shapes are those of the whole model
everywhere; the weights of other stages have no memory (the meta device). A forward of a stage is one of the
whole model: what comes before its layers gives zeros of the right shape, the layer before its first gives
what was received, and the layer after its last ends the forward. Masks, positions and losses are as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zo_dist.params import canonical_name, evaluating, find_layers, is_quantised, runner_of


class Left(BaseException):
    """Ends a forward at the border of a stage, with what goes over it. No error: nothing may catch it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("a forward left its stage")
        self.hidden = hidden


@dataclass
class Stage:
    """What of a model runs on this rank. `received`: the hidden states that its next forward goes on from."""

    index: int
    num_stages: int
    num_micro_batches: int
    first_layer: nn.Module
    runs: frozenset[nn.Module]
    received: Tensor | None = None

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def hidden_of(self, forward: Callable[[], object]) -> Tensor:
        """What `forward` gives the model's first layer, which does not run: what is sent has its shape.

        RuntimeError if `forward` ends without calling the model.
        """

        def leave(_: nn.Module, args: Any, kwargs: Any) -> None:
            raise Left(_first_tensor(args, kwargs))

        hook = self.first_layer.register_forward_pre_hook(leave, with_kwargs=True)
        try:
            forward()
        except Left as left:
            return left.hidden
        finally:
            hook.remove()
        raise RuntimeError("the loss function did not call the model, which under a pipeline it has to")


@dataclass
class _Seen:
    """What one forward of the whole model showed of it."""

    # What owns weights and runs before the layers: the dtype and width of its output, and whether that has
    # one axis more than the input, as of an embedding.
    before: dict[nn.Module, tuple[torch.dtype, int, bool]]
    after: set[nn.Module]
    logits: Tensor


@torch.no_grad()
def cut_into_stage(
    module: nn.Module, index: int, num_stages: int, num_micro_batches: int
) -> tuple[Stage, Tensor]:
    """Leave of `module` what stage `index` runs, and give the logits of `trial` as they were before.

    ValueError for more stages than layers, and for a model whose layers are no chain.
    """
    layers = [layer for _, layer in find_layers(module)]
    if len(layers) < num_stages:
        raise ValueError(
            f"the model has {len(layers)} layers, too few for a pipeline of {num_stages} ranks; start at "
            f"most {max(1, len(layers))}"
        )
    owners = _owners(module)
    inside = {m for layer in layers for m in layer.modules()}
    seen = _observe(module, layers, {runner: name for name, _, runner in owners if runner not in inside})
    first, stop = (i * len(layers) // num_stages for i in (index, index + 1))
    runs = {m for layer in layers[first:stop] for m in layer.modules()}
    if index == 0:
        # With what did not run: the start-up check says so.
        runs |= {runner for _, _, runner in owners} - seen.after - inside
    if index == num_stages - 1:
        runs |= seen.after
    stage = Stage(index, num_stages, num_micro_batches, layers[0], frozenset(runs))
    _drop_weights(owners, runs)
    if index > 0:
        for owner, form in seen.before.items():
            owner.forward = _zeros(*form)
    for i, layer in enumerate(layers):
        if not first <= i < stop:
            layer.forward = _elsewhere(stage, i - first)
    return stage, seen.logits


def trial(module: nn.Module, device: torch.device) -> Tensor:
    """The logits of a row of two tokens."""
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    logits: Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _owners(module: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """`(name, holder, what runs it)` of what directly holds weights."""
    modules = dict(module.named_modules())
    found = [(n, m, modules[runner_of(n, modules)]) for n, m in modules.items() if m._parameters]
    for name, holder, _ in found:
        for attribute, param in holder._parameters.items():
            if param is not None and is_quantised(param):
                raise ValueError(
                    f"parameter {canonical_name(f'{name}.{attribute}')} is stored quantised, which a "
                    "pipeline does not cut; load the model unquantised, or let each rank hold all of it"
                )
    return found


def _observe(module: nn.Module, layers: list[nn.Module], outside: dict[nn.Module, str]) -> _Seen:
    """Run the whole model once and see what of `outside` comes before and what after its layers.

    ValueError if these are no chain.
    """
    around = {m for m in module.modules() if m not in layers and not set(layers).isdisjoint(m.modules())}
    for runner, name in outside.items():
        if runner in around:
            raise _uncut(f"{name or 'the model'} holds weights of its own and has the layers in it")
    seen = _Seen({}, set(), torch.empty(0))
    entered = 0
    last: Tensor | None = None

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal entered
        hidden = args[0] if args else None
        chained = last is None or hidden is last
        if entered >= len(layers) or layer is not layers[entered] or not chained or hidden is None:
            raise _uncut("its layers do not run once each, in order, each on what the one before it returned")
        entered += 1

    def leave(layer: nn.Module, args: Any, out: Any) -> None:
        nonlocal last
        if not isinstance(out, Tensor) or out.shape != args[0].shape or out.dtype != args[0].dtype:
            raise _uncut("a layer does not return hidden states of the shape it was given, and them alone")
        last = out

    def ran(owner: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if entered == len(layers):
            seen.after.add(owner)
            return
        if entered or not isinstance(out, Tensor):
            raise _uncut(f"{outside[owner]} runs between its layers, or returns no tensor")
        seen.before[owner] = out.dtype, out.shape[-1], out.ndim > _first_tensor(args, kwargs).ndim

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    hooks += [owner.register_forward_hook(ran, with_kwargs=True) for owner in outside]
    try:
        with evaluating(module):
            seen.logits = trial(module, next(module.parameters()).device)
    except (TypeError, AttributeError) as error:
        raise _uncut(f"it is called as no causal language model of transformers is: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if entered != len(layers):
        raise _uncut("not all of its layers run")
    return seen


def _uncut(reason: str) -> ValueError:
    return ValueError(
        f"this model cannot be cut into a pipeline: {reason}. Shard it with fully_shard (FSDP2) or ZeRO-3"
    )


def _drop_weights(owners: list[tuple[str, nn.Module, nn.Module]], runs: set[nn.Module]) -> None:
    """Give all weights that no module in `runs` has a stand-in without memory; tied ones stay tied."""
    kept = {p for _, holder, runner in owners if runner in runs for p in holder._parameters.values()}
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for _, holder, _ in owners:
        for attribute, param in holder._parameters.items():
            if param is not None and param not in kept:
                if param not in stand_ins:
                    empty = torch.empty_like(param, device="meta")
                    stand_ins[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
                holder._parameters[attribute] = stand_ins[param]


def _zeros(dtype: torch.dtype, width: int, adds_axis: bool) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = _first_tensor(args, kwargs)
        return x.new_zeros((*(x.shape if adds_axis else x.shape[:-1]), width), dtype=dtype)

    return forward


def _elsewhere(stage: Stage, place: int) -> Callable[..., Any]:
    """The forward of a layer of another stage, `place` layers after the first that is here."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if place > 0:
            raise Left(hidden)
        if place < -1:
            return hidden
        if stage.received is None:
            raise RuntimeError(
                "the loss function called the model again: under a pipeline it may do so once, so texts "
                "cannot be generated"
            )
        received, stage.received = stage.received, None
        return received

    return forward


def _first_tensor(args: Any, kwargs: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
