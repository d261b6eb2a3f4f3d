"""Which arms each direction of a step perturbs.

A sampler's draws are a function of the seed and of the coefficients seen so far, and those are the
same on every rank; so every rank draws the same arms and nothing is sent. Draws come from the
counter-based generator under their own name, apart from the noise of any parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zo_dist.noise import Noise
from zo_dist.part import Part

_STREAM = "zo_dist.sampler"


@dataclass(frozen=True, slots=True)
class Draw:
    """The arms of one direction, ascending and unique, and the weight of each one's update."""

    arms: tuple[int, ...]
    weights: tuple[float, ...]


class Sampler(Part):
    """What all samplers share; `Dense` is the simplest complete one.

    `bind` is called once, by `ZeroOrder`, when the number of arms is known.
    """

    num_arms: int
    noise: Noise

    def bind(self, num_arms: int, noise: Noise) -> None:
        if num_arms < 1:
            raise ValueError(f"a sampler needs at least one arm, not {num_arms}")
        self.num_arms, self.noise = num_arms, noise

    def draw(self, step: int, direction: int) -> Draw:
        """The arms of one direction of one step."""
        raise TypeError(f"{type(self).__name__} does not say how to draw; override draw")

    def observe(self, draws: Sequence[Draw], coefs: Sequence[float]) -> None:
        """Learn from one step: the loss slope (loss per parameter unit) along each direction."""

    @property
    def lr_factor(self) -> float:
        """The expected update, as a share of a dense step at the same `lr` (mean over arms)."""
        return 1.0


class Dense(Sampler):
    """Every arm in every direction: MeZO (Malladi et al. 2023, arXiv 2305.17333)."""

    def draw(self, step: int, direction: int) -> Draw:
        return Draw(tuple(range(self.num_arms)), (1.0,) * self.num_arms)


class Uniform(Sampler):
    """A uniform subset without replacement, updates not reweighted: LeZO (arXiv 2410.09823).

    `sparsity`: the share of arms left out of a direction, in [0, 1); at least one arm is kept. The
    paper thins the decoder layers; whether embeddings and head are always perturbed is not stated,
    so here every arm is drawn alike. The expected update is `1 - sparsity` of a dense one, which is
    what `lr_factor` says.
    """

    def __init__(self, sparsity: float = 0.75) -> None:
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity is {sparsity}; it must lie in [0, 1)")
        self.sparsity = sparsity

    @property
    def _num_kept(self) -> int:
        return max(1, round((1.0 - self.sparsity) * self.num_arms))

    def draw(self, step: int, direction: int) -> Draw:
        uniforms = self.noise.uniforms(_STREAM, step, direction, self.num_arms)
        ranked = sorted(range(self.num_arms), key=lambda arm: (uniforms[arm], arm))
        kept = tuple(sorted(ranked[: self._num_kept]))
        return Draw(kept, (1.0,) * len(kept))

    @property
    def lr_factor(self) -> float:
        return self._num_kept / self.num_arms


class AdaLeZO(Sampler):
    """A bandit over arms (arXiv 2604.18264, with the details of its published code).

    K = max(1, int(ratio * num_arms)) draws with replacement from
    `p = (1 - gamma) * softmax(score / tau) + gamma / num_arms`; an arm drawn n times is perturbed
    once and its update weighs `n * min(1 / (K p), clip)`, which is unbiased when `clip` is infinite.
    After a step `q <- (1 - alpha) q + alpha |g|` for each drawn arm, direction by direction.

    `ratio` in (0, 1]; `tau` > 0; `gamma` in [0, 1]; `alpha` in (0, 1]; `clip` > 0, may be infinite.
    `normalise`: scores are `q / max(q)`, as in the published code but not in the paper's equation;
    without it a softmax over raw slopes collapses onto one arm. With the published defaults and 34
    arms most weights are clipped and the expected update is about 0.70 of a dense one: `lr_factor`
    tells the figure of the moment.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        tau: float = 0.6,
        gamma: float = 0.1,
        alpha: float = 0.1,
        clip: float = 4.0,
        normalise: bool = True,
    ) -> None:
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio is {ratio}; it must lie in (0, 1]")
        if not tau > 0.0:
            raise ValueError(f"tau is {tau}; it must be above 0")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must lie in (0, 1]")
        if not clip > 0.0:
            raise ValueError(f"clip is {clip}; it must be above 0 (.inf never clips)")
        self.ratio, self.tau, self.gamma = ratio, tau, gamma
        self.alpha, self.clip, self.normalise = alpha, clip, normalise

    def bind(self, num_arms: int, noise: Noise) -> None:
        super().bind(num_arms, noise)
        self.num_draws = max(1, int(self.ratio * num_arms))
        self._learn([0.0] * num_arms)

    def _learn(self, q: list[float]) -> None:
        self.q = q
        top = max(q)
        scores = [x / top for x in q] if self.normalise and top > 1e-6 else q
        highest = max(scores)
        exps = [math.exp((s - highest) / self.tau) for s in scores]
        total = math.fsum(exps)
        self.probabilities = [(1.0 - self.gamma) * e / total + self.gamma / self.num_arms for e in exps]

    def draw(self, step: int, direction: int) -> Draw:
        uniforms = self.noise.uniforms(_STREAM, step, direction, self.num_draws)
        counts: dict[int, int] = {}
        for u in uniforms:
            arm, left = 0, u
            while arm < self.num_arms - 1 and left >= self.probabilities[arm]:
                left -= self.probabilities[arm]
                arm += 1
            counts[arm] = counts.get(arm, 0) + 1
        arms = tuple(sorted(counts))
        return Draw(arms, tuple(counts[arm] * self._weight(arm) for arm in arms))

    def _weight(self, arm: int) -> float:
        # An arm whose probability underflowed to 0 (tau tiny, gamma 0) cannot have been drawn.
        return min(1.0 / max(self.num_draws * self.probabilities[arm], 1e-300), self.clip)

    def observe(self, draws: Sequence[Draw], coefs: Sequence[float]) -> None:
        q = list(self.q)
        for draw, coef in zip(draws, coefs, strict=True):
            for arm in draw.arms:
                q[arm] = (1.0 - self.alpha) * q[arm] + self.alpha * abs(coef)
        self._learn(q)

    @property
    def lr_factor(self) -> float:
        expected = (self.num_draws * p * self._weight(arm) for arm, p in enumerate(self.probabilities))
        return math.fsum(expected) / self.num_arms

    def state_dict(self) -> dict[str, list[float]]:
        return {"q": list(self.q)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        if set(state) != {"q"} or len(state["q"]) != self.num_arms:
            raise ValueError(
                f"AdaLeZO's state holds q, one number for each of {self.num_arms} arms; "
                f"got { ({k: len(v) for k, v in state.items()}) }"
            )
        self._learn([float(x) for x in state["q"]])
