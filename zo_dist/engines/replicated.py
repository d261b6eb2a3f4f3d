"""Every rank holds all weights: one process, DDP, or DeepSpeed at stages 0 to 2."""

from __future__ import annotations

import torch
from torch import nn

from zo_dist.engines.base import Engine
from zo_dist.params import Param, Span, canonical_name


class ReplicatedEngine(Engine):
    """Full copies. Ranks exchange scalars alone; each applies the whole update to its own copy.

    Raises ValueError on every rank if the copies do not start with equal weights.
    """

    name = "replicated"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, next(module.parameters(), torch.empty(0)).device)
        if self.num_ranks > 1:
            self.require_equal("the starting weights", self._fingerprints())

    def _fingerprints(self) -> dict[str, int]:
        """Per parameter, the wrapped sum of its bits times their position: any order or bit shows."""
        prints = {}
        for name, param in self.module.named_parameters():
            bits = param.detach().reshape(-1).view(torch.uint8).view(-1, param.element_size())
            words = torch.zeros(len(bits), dtype=torch.int64, device=param.device)
            for byte in range(param.element_size()):
                words += bits[:, byte].to(torch.int64) << (8 * byte)
            positions = torch.arange(1, len(words) + 1, device=param.device)
            prints[canonical_name(name)] = int((words * positions).sum())
        return prints

    def _span(self, param: Param) -> Span:
        weight = param.param.detach()
        if not weight.is_contiguous():
            raise ValueError(
                f"parameter {param.name} is not contiguous; replace it by its .contiguous() copy"
            )
        return Span(param.name, weight.view(-1), 0)
