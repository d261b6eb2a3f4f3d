"""The bandit that fits each arm's sensitivity to all slopes, instead of sharing one slope among arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from zo_dist.noise import Noise
from zo_dist.samplers import Bandit, Draw

# How much of the running size of slopes stays at the next direction: some 50 of them.
_STAYS = 0.98

# Squares of slopes are cut at so many times what the fit expects: 3 deviations of a normal slope.
_CUT = 9.0

# A fit may think an arm insensitive, but what is drawn counts at least this much of a mean weight.
_LEAST = 0.25


class FittedAdaLeZO(Bandit):
    """Arms drawn as a whole estimate of least variance wants them, by credit that is fitted. (Ours.)

    Draws and weights are those of `Bandit` with `weigh: both` and no clip, so that `E[g^2 | draw]` is the sum
    of a |G|^2 over the drawn arms, G being an arm's gradient. Where AdaLeZO gives all of them the same |g|,
    here v, an arm's squared gradient per weight, is the mean of its posterior, given all slopes so far and a
    prior of weights alike, and `p = (1 - gamma) * size * sqrt(v) / sum + gamma * size / sum`. The first, with
    the true v, makes the least variance; the second, where p begins, that of `Dense` (docs/methods.md,
    Samplers).

    * `draws`, at least 1: K, how many a direction has. The fewer, the less the variance, and the more each
      slope tells of its arms: 1 is best, and cheapest.
    * `gamma` in [0, 1]: no direction is longer than that of `Dense` by more than `1 / sqrt(gamma)`.
    * `memory`, in steps, at least 1 or infinite: an observation's weight falls by `1 / memory` a step. A
      squared slope is about its mean m times chi-square of one degree, a deviation of 1.4 m, so many are
      needed: with one draw, an arm of probability p is known to `1.4 / sqrt(p * directions * memory)`.
      Each counts by `1 / (2 m^2)`, is cut at 9 m, and is counted in units of a running size of slopes:
      neither a loss that falls nor one odd batch moves all arms.
    * `spread` > 0: the prior's deviation, in means; log-normal arms of sigma 0.8 have 1.

    State: num_arms squared floats; a step takes some num_arms^2 operations and K^2 per direction, in
    plain float64 in a fixed order: 0.5 ms for 34 arms, and the same bits on every rank and machine.
    """

    def __init__(
        self, draws: int = 1, gamma: float = 0.1, memory: float = 1000.0, spread: float = 1.0
    ) -> None:
        super().__init__(gamma, math.inf, "both")
        if draws < 1:
            raise ValueError(f"draws is {draws}; it must be at least 1")
        if not memory >= 1.0:
            raise ValueError(f"memory is {memory}; it must be at least 1 (.inf never forgets)")
        if not 0.0 < spread < math.inf:
            raise ValueError(f"spread is {spread}; it must be finite and above 0")
        self.num_draws, self.memory, self.spread = draws, memory, spread

    def bind(self, sizes: Sequence[int], noise: Noise) -> None:
        super().bind(sizes, noise)
        # Of each arm, over the mean arm's.
        self._sizes = [size * self.num_arms / sum(sizes) for size in sizes]
        # Normal equations of the weighted least squares, and sum and weight of the running size.
        self._matrix = [[0.0] * self.num_arms for _ in sizes]
        self._target = [0.0] * self.num_arms
        self._slopes = [0.0, 0.0]
        self._learn([1.0] * self.num_arms)

    def _learn(self, v: list[float]) -> None:
        """`v`: in units of the running size, about 1 on average."""
        self.v = v
        pairs = zip(self._sizes, v, strict=True)
        self._prefer([size * math.sqrt(x) for size, x in pairs], self._sizes)

    def observe(self, draws: Sequence[Draw], coefs: Sequence[float]) -> None:
        keep = 1.0 - 1.0 / self.memory
        self._matrix = [[keep * x for x in row] for row in self._matrix]
        self._target = [keep * x for x in self._target]
        for draw, coef in zip(draws, coefs, strict=True):
            moved = {arm: a * a * self._sizes[arm] for arm, a in zip(draw.arms, draw.lengths, strict=True)}
            self._add(moved, coef * coef)
        self._learn(self._swept())

    def _add(self, moved: dict[int, float], square: float) -> None:
        """Another squared slope: its mean is the sum of `moved` times v."""
        everywhere = math.fsum(moved.values())
        expected = max(math.fsum(x * self.v[arm] for arm, x in moved.items()), _LEAST * everywhere)
        total, weight = self._slopes
        if total > 0.0:
            square = min(square, _CUT * expected * total / weight)
        total, weight = _STAYS * total + square, _STAYS * weight + everywhere
        self._slopes = [total, weight]
        if total == 0.0:
            # Nothing but slopes of 0 so far: there is no size to count in.
            return
        precision = 1.0 / (2.0 * expected * expected)
        for arm, x in moved.items():
            row = self._matrix[arm]
            for other, y in moved.items():
                row[other] += precision * x * y
            self._target[arm] += precision * x * square * weight / total

    def _swept(self) -> list[float]:
        """One Gauss-Seidel sweep from `v`, each arm to its mean given the others'.

        That of a normal cut off at 0 is taken to be `(mu + sqrt(mu^2 + 8 / pi sd^2)) / 2`, right at 0 and far
        from it, and never 0: an arm that only seems insensitive keeps what is likely. No function but the
        root is in it, which all machines round alike.
        """
        v, prior = list(self.v), 1.0 / self.spread**2
        # Where the prior's normal has to lie for its mean, once cut, to be 1.
        centre = 1.0 - 2.0 / math.pi * self.spread**2
        rest = [t - math.fsum(map(mul, row, v)) for t, row in zip(self._target, self._matrix, strict=True)]
        for arm, row in enumerate(self._matrix):
            precision = row[arm] + prior
            mu = (rest[arm] + row[arm] * v[arm] + prior * centre) / precision
            mean = (mu + math.sqrt(mu * mu + 8.0 / (math.pi * precision))) / 2.0
            moved, v[arm] = mean - v[arm], mean
            rest = [r - moved * x for r, x in zip(rest, row, strict=True)]
        return v

    def state_dict(self) -> dict[str, list[float]]:
        matrix = [x for row in self._matrix for x in row]
        return {
            "v": list(self.v),
            "matrix": matrix,
            "target": list(self._target),
            "slopes": list(self._slopes),
        }

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        arms = self.num_arms
        self._check(state, v=arms, matrix=arms * arms, target=arms, slopes=2)
        of = {key: list(map(float, values)) for key, values in state.items()}
        self._matrix = [of["matrix"][arms * i : arms * (i + 1)] for i in range(arms)]
        self._target, self._slopes = of["target"], of["slopes"]
        self._learn(of["v"])
