"""From the losses of a step's probes to one slope per direction."""

from __future__ import annotations

from torch import Tensor


class TwoSided:
    """`(L(w + eps z) - L(w - eps z)) / (2 eps)`: SPSA (Spall 1992), as in MeZO. Two forwards.

    The antithetic pair cancels the even orders of the loss.
    """

    signs = (1.0, -1.0)

    def slopes(self, losses: Tensor, eps: float) -> Tensor:
        """`losses` float64 `[directions, 2]` in the order of `signs`; returns `[directions]`."""
        return (losses[:, 0] - losses[:, 1]) / (2.0 * eps)


class OneSided:
    """`(L(w + eps z) - L(w)) / eps`. The unshifted probes of all directions share clean weights.

    Biased by O(eps); perturbs half as many copies as `TwoSided`.
    """

    signs = (1.0, 0.0)

    def slopes(self, losses: Tensor, eps: float) -> Tensor:
        """`losses` float64 `[directions, 2]` in the order of `signs`; returns `[directions]`."""
        return (losses[:, 0] - losses[:, 1]) / eps


Estimator = TwoSided | OneSided
