"""`ZOSFTTrainer`: TRL's SFTTrainer with zeroth-order steps. Written against trl 1.16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from trl import SFTTrainer

from zo_dist.integrations.transformers import ZOTrainerMixin
from zo_dist.probes import Batch, RowLoss


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose steps are zeroth-order; see `ZOTrainerMixin` for `zo` and `row_loss`.

    With `loss_type="nll"` and padded rows, the loss on completions or assistant turns alone included, all
    probes of a step share one forward of the model's own head. Everything else (`dft`, packing, an
    auxiliary loss) goes by SFTTrainer's `compute_loss`, once per probe. Its fused head reads the head's
    weight outside the module that owns it: where the head is trained, that needs `zo={"perturb": "shard"}`.
    Entropy and token accuracy are logged by evaluations alone, and `num_tokens` is not counted.

    Raises ValueError, before any weight is written, for a trained head that would not be perturbed.
    """

    def _computes_usual_loss(self) -> bool:
        own = type(self).compute_loss is SFTTrainer.compute_loss
        return own and self.args.loss_type == "nll" and not self.aux_loss_enabled

    def _row_loss_for(self, batches: Sequence[Batch]) -> RowLoss | None:
        row_loss = super()._row_loss_for(batches)
        if row_loss is None and self.optimizer.perturb == "module" and self._trains_head():
            raise ValueError(
                "the model's head is trained, and SFTTrainer's fused head would read its weight unshifted: "
                'set zo={"perturb": "shard"}, freeze the head, or use loss_type="nll" without packing'
            )
        return row_loss

    def _trains_head(self) -> bool:
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        return any(param.requires_grad for param in head.parameters())

    def _zo_step(self, batches: Sequence[Any], num_items_in_batch: Any) -> float:
        # Probes run in eval mode, by which SFTTrainer's compute_loss tells whose metrics it counts.
        of_evaluation, self._metrics["eval"] = self._metrics["eval"], defaultdict(list)
        try:
            return super()._zo_step(batches, num_items_in_batch)
        finally:
            self._metrics["eval"] = of_evaluation
