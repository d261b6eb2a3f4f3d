"""Every rank holds all weights: one process, DDP, or DeepSpeed at stages 0 to 2."""

from __future__ import annotations

import torch
from torch import nn

from zo_dist.engines.base import Engine
from zo_dist.params import Param, Span, canonical_name, require_contiguous, stored_parts


class ReplicatedEngine(Engine):
    """Full copies. Ranks exchange scalars alone; each applies the whole update to its own copy.

    Raises ValueError on every rank if the copies do not start with equal weights.
    """

    name = "replicated"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, next(module.parameters(), torch.empty(0)).device)
        named = [stored_parts(canonical_name(n), p).items() for n, p in module.named_parameters()]
        self.compare_copies((part for parts in named for part in parts), range(self.num_ranks))

    def _span(self, param: Param) -> Span:
        weight = param.param.detach()
        require_contiguous(param.name, weight)
        return Span(param.name, weight.view(-1), 0)
