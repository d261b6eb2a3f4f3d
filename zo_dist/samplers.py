"""Which arms each direction of a step perturbs.

A sampler's draws are a function of the seed and of the coefficients seen so far, and those are the
same on every rank; so every rank draws the same arms and nothing is sent. Draws come from the
counter-based generator under their own name, apart from the noise of any parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from zo_dist.noise import Noise
from zo_dist.part import Part

Weigh = Literal["update", "both"]

_STREAM = "zo_dist.sampler"


@dataclass(frozen=True, slots=True)
class Draw:
    """The arms of one direction, ascending and unique.

    An arm's noise is multiplied by its `lengths` in the probe (times eps), and by its `weights` in the
    update (times the coefficient): the mean of their product is what the arm gets of the gradient.
    """

    arms: tuple[int, ...]
    weights: tuple[float, ...]
    lengths: tuple[float, ...]


class Sampler(Part):
    """What all samplers share; `Dense` is the simplest complete one.

    `bind` is called once, by `ZeroOrder`, with how many weights each arm has.
    """

    num_arms: int
    noise: Noise
    # Where the weights of arms are, if it gives them any: see `Bandit`.
    weigh: Weigh = "update"

    def bind(self, sizes: Sequence[int], noise: Noise) -> None:
        if not sizes:
            raise ValueError("a sampler needs at least one arm, not 0")
        self.num_arms, self.noise = len(sizes), noise

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
        ones = (1.0,) * self.num_arms
        return Draw(tuple(range(self.num_arms)), ones, ones)


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
        ones = (1.0,) * len(kept)
        return Draw(kept, ones, ones)

    @property
    def lr_factor(self) -> float:
        return self._num_kept / self.num_arms


class Bandit(Sampler):
    """Draws with replacement from `probabilities`, which a subclass learns: see `AdaLeZO`.

    An arm that K draws had n times is perturbed once and has the weight `a = n * min(1 / (K p), clip)`,
    whose mean is 1 when `clip` is infinite. `weigh`: where a is. In the `update` alone, as published, an arm
    that is drawn often puts its slope, unweighted, into the updates of all arms drawn along with it, as
    noise. In `both`, probe and update each have the root of a: the mean is the same, the variance another
    (docs/methods.md, Samplers). `gamma` in [0, 1]: the share of p that is not learnt; `clip` > 0, may be
    infinite.
    """

    probabilities: list[float]
    num_draws: int

    def __init__(self, gamma: float, clip: float, weigh: Weigh) -> None:
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
        if not clip > 0.0:
            raise ValueError(f"clip is {clip}; it must be above 0 (.inf never clips)")
        if weigh not in get_args(Weigh):
            raise ValueError(f"weigh is {weigh!r}; use one of {', '.join(get_args(Weigh))}")
        self.gamma, self.clip, self.weigh = gamma, clip, weigh

    def _prefer(self, preferences: list[float], rest: list[float]) -> None:
        """p of what was learnt, and of `rest`, whose mean is 1."""
        total = math.fsum(preferences)
        self.probabilities = [
            (1.0 - self.gamma) * x / total + self.gamma * y / self.num_arms
            for x, y in zip(preferences, rest, strict=True)
        ]

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
        weights = tuple(counts[arm] * self._weight(arm) for arm in arms)
        if self.weigh == "update":
            return Draw(arms, weights, (1.0,) * len(arms))
        roots = tuple(map(math.sqrt, weights))
        return Draw(arms, roots, roots)

    def _weight(self, arm: int) -> float:
        # An arm whose probability underflowed to 0 (tau tiny, gamma 0) cannot have been drawn.
        return min(1.0 / max(self.num_draws * self.probabilities[arm], 1e-300), self.clip)

    @property
    def lr_factor(self) -> float:
        expected = (self.num_draws * p * self._weight(arm) for arm, p in enumerate(self.probabilities))
        return math.fsum(expected) / self.num_arms

    def _check(self, state: dict[str, list[float]], **lengths: int) -> None:
        if {key: len(values) for key, values in state.items()} != lengths:
            raise ValueError(
                f"{type(self).__name__}'s state for {self.num_arms} arms holds so many numbers: {lengths}; "
                f"got { ({key: len(values) for key, values in state.items()}) }"
            )


class AdaLeZO(Bandit):
    """A bandit over arms (arXiv 2604.18264, with the details of its published code).

    Draws and weights are those of `Bandit`, with K = max(1, int(ratio * num_arms)) and
    `p = (1 - gamma) * softmax(score / tau) + gamma / num_arms`. After a step `q <- (1 - alpha) q + alpha |g|`
    for each drawn arm, direction by direction.

    `ratio` in (0, 1]; `tau` > 0; `gamma` in [0, 1]; `alpha` in (0, 1]; `clip` > 0, may be infinite.
    `weigh`: as of `Bandit`; `both` is not published. There a seldom drawn arm is perturbed more when it is,
    and its |g| with it: scores then spread less than with `update`.
    `normalise`: scores are `q / max(q)`, as in the published code but not in the paper's equation;
    without it a softmax over raw slopes collapses onto one arm. `correct`, not published: q begins at 0
    and favours the arms that were drawn early; with it the score is q over `1 - (1 - alpha)^draws`, and an
    arm not drawn yet has the mean of the others. With the published defaults and 34 arms most weights are
    clipped and the expected update is about 0.70 of a dense one: `lr_factor` tells the figure of the moment.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        tau: float = 0.6,
        gamma: float = 0.1,
        alpha: float = 0.1,
        clip: float = 4.0,
        normalise: bool = True,
        correct: bool = False,
        weigh: Weigh = "update",
    ) -> None:
        super().__init__(gamma, clip, weigh)
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio is {ratio}; it must lie in (0, 1]")
        if not tau > 0.0:
            raise ValueError(f"tau is {tau}; it must be above 0")
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; it must lie in (0, 1]")
        self.ratio, self.tau, self.alpha = ratio, tau, alpha
        self.normalise, self.correct = normalise, correct

    def bind(self, sizes: Sequence[int], noise: Noise) -> None:
        super().bind(sizes, noise)
        self.num_draws = max(1, int(self.ratio * self.num_arms))
        self._learn([0.0] * self.num_arms, [0.0] * self.num_arms)

    def _learn(self, q: list[float], visits: list[float]) -> None:
        self.q, self.visits = q, visits
        self.scores = self._corrected() if self.correct else q
        top = max(self.scores)
        scores = [x / top for x in self.scores] if self.normalise and top > 1e-6 else self.scores
        highest = max(scores)
        self._prefer([math.exp((s - highest) / self.tau) for s in scores], [1.0] * self.num_arms)

    def _corrected(self) -> list[float]:
        pairs = list(zip(self.q, self.visits, strict=True))
        seen = [x / (1.0 - (1.0 - self.alpha) ** n) for x, n in pairs if n]
        mean = math.fsum(seen) / max(len(seen), 1)
        known = iter(seen)
        return [next(known) if n else mean for _, n in pairs]

    def observe(self, draws: Sequence[Draw], coefs: Sequence[float]) -> None:
        q, visits = list(self.q), list(self.visits)
        for draw, coef in zip(draws, coefs, strict=True):
            for arm in draw.arms:
                q[arm] = (1.0 - self.alpha) * q[arm] + self.alpha * abs(coef)
                visits[arm] += 1.0
        self._learn(q, visits)

    def state_dict(self) -> dict[str, list[float]]:
        state = {"q": list(self.q)}
        return state | {"visits": list(self.visits)} if self.correct else state

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        lengths = {"q": self.num_arms, "visits": self.num_arms} if self.correct else {"q": self.num_arms}
        self._check(state, **lengths)
        self._learn(list(map(float, state["q"])), list(map(float, state.get("visits", self.visits))))
