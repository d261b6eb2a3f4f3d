"""Layers that DeepSpeed's AutoTP cut over ranks (`tensor_parallel.autotp_size`), at ZeRO stages 0 to 2.

Where a weight was cut DeepSpeed writes on the parameter, for its universal checkpoints (0.19.8:
module_inject/layers.py, `_set_param_uc_meta`; checkpoint/constants.py, `DS_AUTOTP_UC_META`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_dist.engines.pieces import piece_at
from zo_dist.engines.tensor_parallel import CutEngine
from zo_dist.params import Param, Piece, canonical_name

# Without an import of DeepSpeed: every model is asked for it.
LAYOUT = "ds_autotp_universal_checkpoint_meta"


def cuts_layers(module: nn.Module) -> bool:
    """Has AutoTP cut layers of this module?"""
    return any(_is_cut(param) for param in module.parameters())


class AutoTPEngine(CutEngine):
    """Layers that DeepSpeed cut.

    Raises ValueError, on every rank, for a layer whose layout is not equal runs at equal distances or that
    DeepSpeed does not describe, for cut embeddings, for a head that keeps each rank's logits, and for copies
    that start with other weights.
    """

    name = "deepspeed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, next(module.parameters()).device)
        named = {canonical_name(name): param for name, param in module.named_parameters()}
        with self.jointly():
            _require_whole_ends(module)
            self._group = _group_of(module)
            at = dist.get_rank(self._group)
            self._pieces = {name: _piece(name, param, at) for name, param in named.items() if _is_cut(param)}
        places = {name: at if name in self._pieces else 0 for name in named}
        self._take(named, dist.get_process_group_ranks(self._group), places)

    def shape_of(self, param: nn.Parameter) -> torch.Size:
        return torch.Size(_layout(param)["logical_shape"]) if _is_cut(param) else param.shape

    @contextmanager
    def whole(self, param: Param) -> Iterator[Tensor]:
        if param.name not in self._pieces:
            yield param.param.detach()
            return
        span = self._span(param)
        whole = torch.zeros(param.shape, dtype=span.flat.dtype, device=span.flat.device)
        if span.numel:
            width, stride = span.runs or (span.numel, 1)
            place = whole.view(-1).as_strided((span.numel // width, width), (stride, 1), span.offset)
            place.copy_(span.flat.view_as(place))
        # Of every byte one rank has the value, and the others 0: a sum that keeps all bits.
        dist.all_reduce(whole.view(torch.uint8), group=self._group)
        yield whole


def _layout(param: nn.Parameter) -> dict[str, Any]:
    return getattr(param, LAYOUT, {})


def _is_cut(param: nn.Parameter) -> bool:
    return _layout(param).get("partition_dim") is not None


def _require_whole_ends(module: nn.Module) -> None:
    """ValueError, with the remedy, unless embeddings are whole and the head gives all logits."""
    find_head = getattr(module, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    weight, gathers = getattr(head, "weight", None), getattr(head, "gather_output", False)
    if weight is not None and _layout(weight).get("partition_dim") == 0 and not gathers:
        raise ValueError(
            "AutoTP left each rank the logits of a part of the vocabulary, and losses need all of them: set "
            "tensor_parallel.vocab_parallel_lm_head to false, or gather_output of the head's partition_config"
        )
    for name, layer in module.named_modules():
        if "Embedding" in type(layer).__name__ and any(map(_is_cut, layer.parameters(recurse=False))):
            raise ValueError(
                f"AutoTP cut the embeddings {canonical_name(name)}, which would be another arm than where "
                "they are whole: take them out of tensor_parallel.partition_config"
            )


def _group_of(module: nn.Module) -> dist.ProcessGroup:
    """The ranks over which layers are cut, this one among them."""
    cutting = (m for m in module.modules() if any(map(_is_cut, m.parameters(recurse=False))))
    group: dist.ProcessGroup = next(cutting).mp_group  # type: ignore[assignment]
    return group


def _piece(name: str, param: nn.Parameter, at: int) -> Piece:
    """What rank `at` of a group has of a weight. `widths`: of each block that is cut by itself, its parts."""
    layout = _layout(param)
    widths = layout.get("sub_param_shard_widths") or [layout.get("partition_sizes")]
    piece = None
    if widths[0]:
        whole = torch.Size(layout["logical_shape"])
        index, start, mine = [torch.arange(size) for size in whole], 0, list[Tensor]()
        for parts in widths:
            mine.append(torch.arange(start + sum(parts[:at]), start + sum(parts[: at + 1])))
            start += sum(parts)
        index[layout["partition_dim"]] = torch.cat(mine)
        piece = piece_at(whole, index)
    if piece is None or piece.shape != param.shape:
        raise ValueError(
            f"AutoTP cut parameter {name} into pieces that are not equal runs of rows or columns, or that it "
            "does not describe; leave its layer whole (tensor_parallel.partition_config), or cut the model "
            "by torch's parallelize_module or transformers' plan"
        )
    return piece
