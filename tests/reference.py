"""Each method the slow, obvious way: one process, plain torch, whole copies of the model.

Written from the papers, not from the package; of the package it uses the noise function alone (z, the
the samplers' uniforms, the bits of stochastic rounding), which tests/test_noise.py checks by itself
against the scalar generator below.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import table
import torch
from torch import Tensor, nn

import zo_dist
from zo_dist.noise import Noise

# (model, batch) -> one loss per row, or (sums, weights) per row
RowLoss = Callable[[nn.Module, dict[str, Tensor]], Any]


class Reference:
    """One optimizer; `step` takes the rows of all ranks at once.

    `arms`: the parameter names of each arm. `method`: `mezo`, `lezo`, `adalezo` or `fitted_adalezo`, with
    its `options` (sparsity; ratio, tau, gamma, alpha, clip, weigh_both; draws, memory, spread). `rule`,
    `shape`: what becomes of an estimate and of slopes, by the names of `move` and `shaped`. `share`: how many
    of each matrix's weights, the smallest when this is made, are trained. With the estimator
    `three_sided` it is HiZOO, with `smoothing`, and has no anchor; a law with a momentum is ZO-AdaMU where it
    may be, else it has none. `anchor`: every how many steps one is
    dropped, with how many directions, and the ratio of learning rates. `projection`: of all parameters.
    `conservative`: each direction's part of the write is tried first. `window`: PseuZO, of the outputs of a
    `Composite` or else of the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        arms: Sequence[Sequence[str]],
        method: str,
        lr: float,
        eps: float,
        directions: int = 1,
        per_row: int = 1,
        law: str = "rademacher",
        seed: int = 0,
        rounding: str = "stochastic",
        weight_decay: float = 0.0,
        estimator: str = "two_sided",
        rule: str = "sgd",
        shape: str = "raw",
        options: Mapping[str, float] | None = None,
        share: float = 1.0,
        smoothing: float = table.SMOOTHING,
        anchor: tuple[int, int, float] | None = None,
        projection: zo_dist.Projection | None = None,
        conservative: bool = False,
        window: zo_dist.JacobianWindow | None = None,
    ) -> None:
        self.model, self.copy, self.arms = model, copy.deepcopy(model), [list(a) for a in arms]
        self._weights, self._shifted = (
            {name: p.detach() for name, p in of.named_parameters()} for of in (self.model, self.copy)
        )
        named = table.NOISES[law]
        self.noise, self.signs = Noise(named["noise"], seed), Noise("rademacher", seed)
        self.structure: Any = named.get("structure")
        self.low_rank: Any = self.structure if isinstance(self.structure, zo_dist.LowRank) else None
        self.method, self.lr, self.eps, self.directions, self.per_row = method, lr, eps, directions, per_row
        self.rounding, self.weight_decay, self.estimator = rounding, weight_decay, estimator
        self.conservative, self.all_kept = conservative, list[float]()
        anchor = None if estimator == "three_sided" else anchor
        self.window = None if estimator == "three_sided" else window
        # Of each step so far: its number, its draws, and by direction the changes of outputs.
        self.steps_before: list[tuple[int, list[dict[int, tuple[float, float]]], list[list[float]]]] = []
        # Of each probe in the step at hand, in order: its rows' sums of outputs and of the loss's gradient.
        self.told: list[tuple[list[float], list[float], int]] = []
        apart = estimator != "two_sided" or anchor or conservative or self.window
        self.momentum: Any = None if apart else named.get("perturbation_momentum")
        self.carried = {name: torch.zeros(p.shape) for name, p in self.weights().items()}  # ZO-AdaMU's c
        self.rule, self.all_slopes = rule, list[list[float]]()
        self.moments: dict[str, Moments] = {n: Moments(p.shape) for n, p in model.named_parameters()}
        self.options = {"sparsity": 0.75, "ratio": 0.2, "tau": 0.6, "gamma": 0.1, "alpha": 0.1, "clip": 4.0}
        self.options.update({"weigh_both": False, "draws": 1, "memory": 1000.0, "spread": 1.0})
        self.options.update(options or {})
        self.scores = [0.0] * len(arms)  # AdaLeZO's q
        self.fitted, self.fits = np.ones(len(arms)), 0
        shapes = {name: w.shape.numel() for name, w in self.weights().items()}
        self.sizes = np.array([float(sum(shapes[name] for name in arm)) for arm in arms])
        self.sizes /= self.sizes.mean()
        # Of each direction so far: its step among those learnt from, how much of each arm it moved, the
        # square of its slope once cut, its precision.
        self.seen: list[tuple[int, np.ndarray, float, float]] = []
        self.lost = {name: torch.zeros_like(p) for name, p in self.weights().items()}
        self.smoothing = smoothing
        self.curvature = {name: torch.ones(p.shape) for name, p in self.weights().items()}  # HiZOO's H
        self.step_number = 0
        self.anchor, self.shape = anchor, "raw" if anchor or self.window else shape
        # Of the last anchor step: its number, the weights before its write, its coefficients.
        self.dropped: tuple[int, dict[str, Tensor], list[float]] | None = None
        self.projection = projection
        self.start = {name: weight.clone() for name, weight in self.weights().items()}
        # DiZO's radii in the search at hand, steps of it, and the steps since the last.
        self.radii: dict[str, float] = {}
        self.searched, self.since = 0, 0
        self.highest = dict.fromkeys(self.weights(), math.inf)
        for name, weight in self.weights().items():
            if weight.ndim > 1 and share < 1.0:
                ordered = sorted(abs(w) for w in weight.flatten().tolist())
                self.highest[name] = ordered[max(1, round(share * len(ordered))) - 1]

    def weights(self) -> dict[str, Tensor]:
        return self._weights

    # Samplers

    def probabilities(self) -> list[float]:
        if self.method == "fitted_adalezo":
            best, gamma = self.sizes * np.sqrt(self.fitted), self.options["gamma"]
            return ((1 - gamma) * best / best.sum() + gamma * self.sizes / self.sizes.sum()).tolist()
        top = max(self.scores)
        scaled = [q / top if top > 1e-6 else q for q in self.scores]
        exps = [math.exp(s / self.options["tau"]) for s in scaled]
        gamma = self.options["gamma"]
        return [(1 - gamma) * e / sum(exps) + gamma / len(exps) for e in exps]

    def draw(self, direction: int) -> dict[int, tuple[float, float]]:
        """Each drawn arm, and what its noise is multiplied by in the update and in the probe."""
        count = len(self.arms)
        uniform = lambda n: self.noise.uniforms("zo_dist.sampler", self.step_number, direction, n)  # noqa: E731
        if self.method == "mezo":
            return dict.fromkeys(range(count), (1.0, 1.0))
        if self.method == "lezo":
            kept = max(1, round((1 - self.options["sparsity"]) * count))
            order = sorted(zip(uniform(count), range(count), strict=True))
            return dict.fromkeys(sorted(arm for _, arm in order[:kept]), (1.0, 1.0))
        fits, p = self.method == "fitted_adalezo", self.probabilities()
        draws = int(self.options["draws"]) if fits else max(1, int(self.options["ratio"] * count))
        edges = list(itertools.accumulate(p))[:-1]
        drawn = sorted(sum(u >= edge for edge in edges) for u in uniform(draws))
        clip = math.inf if fits else self.options["clip"]
        weights = {arm: drawn.count(arm) * min(1 / (draws * p[arm]), clip) for arm in drawn}
        if fits or self.options["weigh_both"]:
            return {arm: (math.sqrt(a), math.sqrt(a)) for arm, a in weights.items()}
        return {arm: (a, 1.0) for arm, a in weights.items()}

    def fit(self, draws: Sequence[Mapping[int, tuple[float, float]]], slopes: Sequence[float]) -> None:
        """FittedAdaLeZO: the posterior means, from all that was seen."""
        for drawn, slope in zip(draws, slopes, strict=True):
            members = np.array([drawn[arm][1] ** 2 if arm in drawn else 0.0 for arm in range(len(self.arms))])
            members *= self.sizes
            expected = max(float(members @ self.fitted), members.sum() / 4)
            square = slope**2
            if self.seen:
                square = min(square, 9 * expected * self.running_size(len(self.seen)))
            self.seen.append((self.fits, members, square, 1 / (2 * expected**2)))
        spread = self.options["spread"]
        matrix = np.eye(len(self.arms)) / spread**2
        target = np.ones(len(self.arms)) * (1 - 2 / np.pi * spread**2) / spread**2
        for i, (step, members, square, precision) in enumerate(self.seen):
            weight = precision * (1 - 1 / self.options["memory"]) ** (self.fits - step)
            matrix += weight * np.outer(members, members)
            target += weight * members * square / self.running_size(i + 1)
        for arm in range(len(self.arms)):
            others = matrix[arm] @ self.fitted - matrix[arm, arm] * self.fitted[arm]
            mean, variance = (target[arm] - others) / matrix[arm, arm], 1 / matrix[arm, arm]
            self.fitted[arm] = (mean + np.sqrt(mean**2 + 8 / np.pi * variance)) / 2
        self.fits += 1

    def running_size(self, count: int) -> float:
        """The mean square over what was moved in the first `count` directions, later ones weighing more."""
        weights = [0.98 ** (count - 1 - i) for i in range(count)]
        squares = sum(w * square for w, (_, _, square, _) in zip(weights, self.seen, strict=False))
        return squares / sum(
            w * members.sum() for w, (_, members, _, _) in zip(weights, self.seen, strict=False)
        )

    # The step

    def z(self, name: str, direction: int) -> Tensor:
        shape = self.weights()[name].shape
        if isinstance(self.structure, zo_dist.Orthogonal):
            return self.plain(name) * self.walsh(name, direction)
        if self.structure is None or len(shape) < 2:
            return self.summed(name, self.step_number, [(direction, 1.0)], *shape)
        if self.low_rank is None:
            return self.base(name) * self.flips(name, direction)
        left, right = self.left(name, [(direction, 1.0)]), self.right(name, self.step_number)
        return thin_product(left, right).float().view(shape)

    def direction(self, name: str, direction: int) -> Tensor:
        """What a probe shifts by."""
        if self.momentum is None:
            return self.z(name, direction) / square_root(self.curvature[name])
        x, y = self.mixed(name, direction)
        _, b1, _ = self.shares()
        return x * b1 + y * (1 - b1)

    # ZO-AdaMU: part of a direction is around the one before

    def shares(self) -> list[float]:
        momentum = self.momentum
        done = (self.step_number - momentum.begin) / (momentum.end - momentum.begin)
        new = twelve_bits((1 + math.cos(math.pi * min(max(done, 0), 1))) / 2)
        return [least + (1 - least) * new for least in (momentum.uncertainty, momentum.beta1, momentum.beta2)]

    def mixed(self, name: str, direction: int) -> tuple[Tensor, Tensor]:
        a, _, _ = self.shares()
        around = self.summed(
            f"{name}\0around", self.step_number, [(direction, 1.0)], *self.carried[name].shape
        )
        return self.z(name, direction) * math.sqrt(a), around * math.sqrt(1 - a) + self.carried[name]

    def carry(self, name: str, terms: Sequence[tuple[int, float]]) -> Tensor:
        """The estimate, each direction over the root of its squares; and c for the next."""
        estimate, carried = torch.zeros(self.carried[name].shape), torch.zeros(self.carried[name].shape)
        _, _, b2 = self.shares()
        told = [(direction, scale) for direction, scale in terms if scale]
        for direction, scale in told:
            (x, y), u = self.mixed(name, direction), self.direction(name, direction)
            estimate += u / square_root(x * x * b2 + y * y * (1 - b2) + 1e-8) * torch.tensor(scale)
            carried += u if scale > 0 else -u
        if told:
            self.carried[name].copy_(carried / len(told))
        return estimate

    # Orthogonal: z = the z of direction 0 where the digits that a direction and a number share are even

    def plain(self, name: str) -> Tensor:
        return self.summed(name, self.step_number, [(0, 1.0)], *self.weights()[name].shape)

    def walsh(self, name: str, direction: int) -> Tensor:
        first, weights = 0, self.weights()
        for other in itertools.takewhile(lambda n: n != name, weights):
            first += weights[other].numel()
        odd = [(direction & (first + i)).bit_count() % 2 for i in range(weights[name].numel())]
        return 1.0 - 2.0 * torch.tensor(odd).view(weights[name].shape)

    # Flipout: z = base * outer(signs of rows, signs of columns), 32 directions' signs to a draw

    def base(self, name: str) -> Tensor:
        shape = self.weights()[name].shape
        return self.noise.values(f"{name}\0base", self.step_number, 0, 0, shape.numel()).view(shape)

    def flips(self, name: str, direction: int) -> Tensor:
        shape, (draw, place) = self.weights()[name].shape, divmod(direction, 32)
        rows, columns = (
            self.signs.values(f"{name}\0{side}", self.step_number, draw, 0, 32 * n).view(n, 32)[:, place]
            for side, n in (("rows", shape[0]), ("columns", shape[1:].numel()))
        )
        return torch.outer(rows, columns).view(shape)

    # Noise of low rank: z = left @ right, each drawn under a name of its own

    def summed(self, name: str, step: int, terms: Sequence[tuple[int, float]], *shape: int) -> Tensor:
        total = torch.zeros(shape)
        for direction, scale in terms:
            z = self.noise.values(name, step, direction, 0, math.prod(shape))
            total += z.view(shape) * torch.tensor(scale)
        return total

    def refresh(self, step: int) -> int:
        return 0 if self.low_rank.fixed else step // self.low_rank.steps

    def normals(self, name: str, step: int, length: int) -> tuple[Tensor, Tensor]:
        """Gaussians of SubZero, and what makes them orthonormal."""
        normals = self.summed(name, self.refresh(step), [(0, 1.0)], length, min(self.low_rank.rank, length))
        return normals, orthonormaliser(thin_product(normals.T, normals))

    def right(self, name: str, step: int) -> Tensor:
        columns, rank = self.weights()[name][0].numel(), self.low_rank.rank
        if not self.low_rank.orthonormal:
            return self.summed(f"{name}\0right", self.refresh(step), [(0, 1.0)], columns, rank).T
        normals, root = self.normals(f"{name}\0right", step, columns)
        return thin_product(root.T * math.sqrt(columns), normals.T).float()

    def left(self, name: str, terms: Sequence[tuple[int, float]]) -> Tensor:
        """The sum of scale * left."""
        step, weight, rank = self.step_number, self.weights()[name], self.low_rank.rank
        rows = len(weight)
        if self.low_rank.orthonormal:
            normals, root = self.normals(f"{name}\0left", step, rows)
            width, inner = normals.shape[1], min(rank, weight[0].numel())
            core = self.summed(f"{name}\0core", step, terms, width, inner)
            return thin_product(normals, thin_product(root * math.sqrt(rows / (width * inner)), core)).float()
        if self.low_rank.fixed:
            return self.weighed(name, self.summed(f"{name}\0weights", step, terms, rank))
        return self.summed(f"{name}\0left", step, terms, rows, rank) * rank**-0.5

    def weighed(self, name: str, weights: Tensor) -> Tensor:
        """TeZO's left side."""
        rows, rank = len(self.weights()[name]), self.low_rank.rank
        return self.summed(f"{name}\0left", 0, [(0, 1.0)], rows, rank) * weights * rank**-0.5

    def estimate(self, name: str, terms: Sequence[tuple[int, float]]) -> Tensor:
        """The sum of scale * z."""
        weight = self.weights()[name]
        if not terms:
            return torch.zeros(weight.shape)
        if isinstance(self.structure, zo_dist.Orthogonal):
            signs = [self.walsh(name, d).double() * torch.tensor(coef) for d, coef in terms]
            return self.plain(name) * torch.stack(signs).sum(0).float()
        if self.structure is None or weight.ndim < 2:
            return self.summed(name, self.step_number, terms, *weight.shape)
        if self.low_rank is None:
            signs = [self.flips(name, d).double() * torch.tensor(coef) for d, coef in terms]
            return self.base(name) * torch.stack(signs).sum(0).float()
        left, right = self.left(name, terms), self.right(name, self.step_number)
        return thin_product(left, right).float().view(weight.shape)

    def with_earlier(self, name: str, estimate: Tensor, earlier: Sequence[tuple[int, int, float]]) -> Tensor:
        """With what is added of another step, of one structure at once, and else one by one."""
        now, everywhere = self.step_number, isinstance(self.structure, zo_dist.Orthogonal)
        of_structure = everywhere or (self.structure is not None and estimate.ndim > 1)
        of_steps = [list(of) for _, of in itertools.groupby(earlier, key=lambda term: term[0])]
        for terms in of_steps if of_structure else [[term] for term in earlier]:
            self.step_number = terms[0][0]
            estimate = estimate + self.estimate(name, [(d, coef) for _, d, coef in terms])
            self.step_number = now
        return estimate

    def move(
        self,
        name: str,
        terms: Sequence[tuple[int, float]],
        earlier: Sequence[tuple[int, int, float]],
    ) -> Tensor:
        """What the rule makes of it."""
        weight, moments = self.weights()[name], self.moments[name]
        if self.momentum:
            return moments.move(self.rule, self.carry(name, terms))
        of_a_side = self.low_rank is not None and weight.ndim > 1
        fixed = of_a_side and self.low_rank.fixed
        factored = (self.rule == "lozo_m" and of_a_side) or (self.rule == "tezo_adam" and fixed)
        if not factored or self.anchor or self.window or self.estimator == "three_sided":
            estimate = self.with_earlier(name, self.estimate(name, terms), earlier)
            return moments.move(self.rule, estimate / square_root(self.curvature[name]))
        right = self.right(name, self.step_number)
        if fixed:
            new = self.summed(f"{name}\0weights", self.step_number, terms, self.low_rank.rank)
            moments.of_weights = moments.of_weights or Moments(new.shape)
            if self.rule == "lozo_m":
                left = self.weighed(name, moments.of_weights.move(self.rule, new))
                return thin_product(left, right).float().view(weight.shape)
            first, second = moments.of_weights.both(self.rule, new)
            first = thin_product(self.weighed(name, first), right).float()
            left = self.weighed(name, square_root(second))
            pairs = zip(left.T.double().numpy(), right.double().numpy(), strict=True)
            second = torch.from_numpy(sum(np.outer(a * a, b * b) for a, b in pairs)).float()
            return quotient(first, second).view(weight.shape)
        left = self.left(name, terms)
        if moments.side is not None:
            if self.refresh(moments.step) != self.refresh(self.step_number):
                before = self.right(name, moments.step)
                across = thin_product(before, right.T) / right.shape[1]
                moments.side = thin_product(moments.side, across).float()
            left = moments.side * 0.9 + left
        moments.side, moments.step = left, self.step_number
        return thin_product(left, right).float().view(weight.shape)

    def loss_at(
        self,
        weights: Mapping[str, Tensor],
        direction: int,
        drawn: Mapping[int, tuple[float, float]],
        sign: float,
        rows: Any,
        loss: RowLoss,
    ) -> Any:
        """Summed loss and weight of rows, on a copy of the model at `weights` + sign * eps * length * z."""
        lengths = {name: length for arm, (_, length) in drawn.items() for name in self.arms[arm]}
        for name, weight in weights.items():
            moved = weight.float()
            if name in lengths and sign:
                z = self.direction(name, direction)
                z = torch.where(weight.abs() <= self.highest[name], z, 0.0)
                moved = moved + z * torch.tensor(sign * self.eps * lengths[name])
            self._shifted[name].copy_(moved)
        out = (
            self.tell(loss, rows)
            if self.window and isinstance(loss, zo_dist.Composite)
            else loss(self.copy, rows)
        )
        sums, weights = out if isinstance(out, tuple) else (out, torch.ones_like(out))
        return math.fsum(sums.double().tolist()), math.fsum(weights.double().tolist())

    # PseuZO: directions of earlier steps, by what outputs did along them and what the loss makes of outputs

    def tell(self, loss: zo_dist.Composite, rows: Any) -> Tensor:
        outputs = loss.outputs(self.copy, rows)
        with torch.enable_grad():
            losses = loss.loss(outputs.requires_grad_(), rows)
            losses.sum().backward()
        assert outputs.grad is not None
        sums = [[math.fsum(column) for column in of.double().T.tolist()] for of in (outputs, outputs.grad)]
        self.told.append((sums[0], sums[1], len(losses)))
        return losses.detach()

    def changes(
        self, coefs: Sequence[float], shares: Sequence[float]
    ) -> tuple[list[float], list[list[float]]]:
        """The gradient by outputs, and by direction how much they changed; of losses where none were told."""
        told, self.told = self.told, []
        if not told:
            return [1.0], [[coef] for coef in coefs]
        highs, lows = told[::2], told[1::2]
        middle = lows if self.estimator == "one_sided" else told
        total = sum(rows for _, _, rows in middle)
        gradient = [
            math.fsum(of) / total for of in zip(*(gradient for _, gradient, _ in middle), strict=True)
        ]
        distance = self.eps if self.estimator == "one_sided" else 2.0 * self.eps
        changed = [
            [(a / rows - b / rows) / distance * (share / sum(shares)) for a, b in zip(high, low, strict=True)]
            for (high, _, rows), (low, _, _), share in zip(highs, lows, shares, strict=True)
        ]
        return [float32(g) for g in gradient], [[float32(c) for c in of] for of in changed]

    def again(self, gradient: Sequence[float]) -> list[tuple[int, dict[int, list[tuple[int, float]]]]]:
        """Of each step in the window, the newest first, by arm what is written of each of its directions."""
        window: Any = self.window
        cycle, place = divmod(self.step_number, window.cycle)
        epoch = place // window.epoch
        decay = window.decay / (1 + 10 * epoch) if epoch <= 10 else 0.0
        mine = [kept for kept in self.steps_before[::-1] if kept[0] // window.cycle == cycle]
        found = []
        for age, (step, draws, changes) in enumerate(mine[: window.window - 1], 1):
            terms: dict[int, list[tuple[int, float]]] = {}
            for direction, drawn in enumerate(draws):
                slope = math.prod([decay] * age) * math.fsum(
                    g * c for g, c in zip(gradient, changes[direction], strict=True)
                )
                for arm, (a, _) in drawn.items():
                    terms.setdefault(arm, []).append((direction, float32(slope * float16(a))))
            found.append((step, terms))
        return found

    def slopes_at(
        self,
        weights: Mapping[str, Tensor],
        draws: Sequence[Mapping[int, tuple[float, float]]],
        batch: dict[str, Tensor],
        loss: RowLoss,
    ) -> tuple[list[float], list[float], list[float], float]:
        """At some weights, each direction's slope, what its rows weigh and its curvature; the mean loss."""
        slopes, shares, curved, seen = [], [], list[float](), [0.0, 0.0]
        for direction, drawn in enumerate(draws):
            rows = self.rows_of(direction, len(draws), batch)
            high = self.loss_at(weights, direction, drawn, 1.0, rows, loss)
            one_sided = self.estimator == "one_sided"
            low = self.loss_at(weights, direction, drawn, 0.0 if one_sided else -1.0, rows, loss)
            distance = self.eps if one_sided else 2.0 * self.eps
            slopes.append((high[0] / high[1] - low[0] / low[1]) / distance)
            sides = [high, low]
            if self.estimator == "three_sided":
                clean = self.loss_at(weights, direction, drawn, 0.0, rows, loss)
                bend = abs(high[0] / high[1] + low[0] / low[1] - 2.0 * clean[0] / clean[1])
                curved.append(bend / (2.0 * self.eps * self.eps))
                sides.append(clean)
            shares.append(sum(side[1] for side in sides))
            seen = [seen[i] + sum(side[i] for side in sides) for i in (0, 1)]
        return slopes, shares, curved, seen[0] / seen[1]

    def toward(self, radii: Mapping[str, float]) -> dict[str, Tensor]:
        """DiZO: the weights, in float32, at these distances from the start."""
        points = {}
        for name, weight in self.weights().items():
            delta, length = weight.float() - self.start[name].float(), self.distance(name)
            points[name] = weight.float() + delta * (radii[name] / length - 1.0 if length else 0.0)
        return points

    def distance(self, name: str) -> float:
        return float((self.weights()[name].float() - self.start[name].float()).double().norm())

    def search(self, search: zo_dist.Projection, batch: dict[str, Tensor], loss: RowLoss) -> float:
        """A step of DiZO's, in radii, as the paper and its code have it."""
        lengths = {name: self.distance(name) for name in self.weights()}
        if not self.searched:
            self.radii = dict(lengths)
        shifts = {}
        for name, length in lengths.items():
            (u,) = self.noise.uniforms(f"{name}\0projection", self.step_number, 0, 1)
            z = round(statistics.NormalDist().inv_cdf(u + 2.0**-54) * 4096) / 4096
            most = search.clip * length / search.eps
            shifts[name] = min(max(z, -most), most)
        sides = []
        for sign in (1.0, -1.0):
            radii = {name: self.radii[name] + sign * search.eps * z for name, z in shifts.items()}
            sides.append(self.loss_at(self.toward(radii), 0, {}, 0.0, batch, loss))
        (high, weighs), (low, _) = sides
        slope = (high / weighs - low / weighs) / (2.0 * search.eps)
        for name, z in shifts.items():
            length, radius = lengths[name], self.radii[name] - search.lr * lengths[name] * slope * z
            self.radii[name] = min(max(radius, (1 - search.clip) * length), (1 + search.clip) * length)
        self.searched += 1
        if self.searched == search.iterations:
            for name, point in self.toward(self.radii).items():
                lost = self.lost[name].float() if self.rounding == "kahan" else 0.0
                self.put(name, point + lost)
            self.searched = self.since = 0
        self.step_number += 1
        return (high + low) / (2.0 * weighs)

    def rows_of(self, direction: int, directions: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        total, groups = len(next(iter(batch.values()))), directions // self.per_row
        mine = [r for r in range(total) if r * groups // total == direction // self.per_row]
        return {key: value[mine] for key, value in batch.items()}

    def tried(
        self,
        coefs: Sequence[float],
        draws: Sequence[Mapping[int, tuple[float, float]]],
        batch: dict[str, Tensor],
        loss: RowLoss,
    ) -> list[float]:
        """ZO-SGD-Cons: of what each direction writes, of nothing and of the opposite, the best."""
        eps, self.eps, kept = self.eps, self.lr, list[float]()
        for direction, (coef, drawn) in enumerate(zip(coefs, draws, strict=True)):
            rows = self.rows_of(direction, len(draws), batch)
            writes = {arm: (a, float32(coef * float16(a))) for arm, (a, _) in drawn.items()}
            means = {}
            for times in (1.0, -1.0, 0.0):
                seen = self.loss_at(self.weights(), direction, writes, -times, rows, loss)
                means[times] = seen[0] / seen[1]
            kept.append(min((1.0, 0.0, -1.0), key=means.__getitem__))
        self.eps = eps
        self.all_kept += kept
        return [coef * times for coef, times in zip(coefs, kept, strict=True)]

    @torch.no_grad()
    def step(self, batch: dict[str, Tensor], loss: RowLoss) -> float:
        if self.projection and self.since >= self.projection.every:
            return self.search(self.projection, batch, loss)
        self.since += 1
        every, anchor_directions, lr_ratio = self.anchor or (0, 0, 1.0)
        at_anchor = every and (self.dropped is None or self.step_number - self.dropped[0] >= every)
        if at_anchor:
            draws = [dict.fromkeys(range(len(self.arms)), (1.0, 1.0)) for _ in range(anchor_directions)]
        else:
            draws = [self.draw(direction) for direction in range(self.directions)]
        slopes, shares, curved, mean = self.slopes_at(self.weights(), draws, batch, loss)
        self.all_slopes.append(slopes)
        used = shaped(self.shape, self.all_slopes)
        if self.dropped and not at_anchor:
            there = self.slopes_at(self.dropped[1], draws, batch, loss)[0]
            used = [slope - other for slope, other in zip(used, there, strict=True)]
        coefs = [float32(slope * share / sum(shares)) for slope, share in zip(used, shares, strict=True)]
        if self.conservative:
            coefs = self.tried(coefs, draws, batch, loss)
        if at_anchor:
            before = {name: weight.clone() for name, weight in self.weights().items()}
            self.dropped = self.step_number, before, coefs
        lr, self.lr = self.lr, self.lr * lr_ratio if at_anchor else self.lr
        gradient, changes = self.changes(coefs, shares)
        again = self.again(gradient) if self.window else []
        self.steps_before.append((self.step_number, draws, changes))
        for arm, names in enumerate(self.arms):
            if any(arm in drawn for drawn in [*draws, *(terms for _, terms in again)]):
                earlier = [(step, d, scale) for step, terms in again for d, scale in terms.get(arm, ())]
                if self.dropped and not at_anchor:
                    moved = math.fsum(math.prod(w[arm]) for w in draws if arm in w)
                    part = twelve_bits(moved / len(draws))
                    earlier = [(self.dropped[0], d, part * coef) for d, coef in enumerate(self.dropped[2])]
                # As the log has them.
                terms = [(d, coefs[d] * float16(w[arm][0])) for d, w in enumerate(draws) if arm in w]
                bends = [(d, curved[d], shares[d]) for d, _ in terms] if curved else []
                for name in names:
                    self.write(name, terms, earlier, bends)
        self.lr = lr
        for drawn, slope in zip(draws, slopes, strict=True):
            for arm in () if at_anchor else drawn:
                alpha = self.options["alpha"]
                self.scores[arm] = (1 - alpha) * self.scores[arm] + alpha * abs(slope)
        if self.method == "fitted_adalezo" and not at_anchor:
            self.fit(draws, slopes)
        self.step_number += 1
        return mean

    def write(
        self,
        name: str,
        terms: Sequence[tuple[int, float]],
        earlier: Sequence[tuple[int, int, float]] = (),
        bends: Sequence[tuple[int, float, float]] = (),
    ) -> None:
        weight, moments = self.weights()[name], self.moments[name]
        trained, before = weight.abs() <= self.highest[name], weight.clone()
        kept = {key: tensor.clone() for key, tensor in moments.tensors().items()}
        others = {"lost": self.lost, "curvature": self.curvature, "carried": self.carried}
        kept |= {key: of[name].clone() for key, of in others.items()}
        if bends:
            # The log has curvatures in float32.
            bends = [(d, *torch.tensor([c, share]).tolist()) for d, c, share in bends]
            grown = torch.full(weight.shape, -self.smoothing)
            for direction, c, share in bends:
                mine = c * share / sum(s for _, _, s in bends)
                grown += self.z(name, direction).square() * torch.tensor(self.smoothing * mine)
            self.curvature[name] += self.curvature[name] * grown
            self.curvature[name].clamp_(2.0**-64, 2.0**64)
        move = self.move(name, terms, earlier)
        exact = weight.float()
        if self.rounding == "kahan" and weight.dtype != torch.float32:
            exact = exact + self.lost[name].float()
        if weight.ndim > 1 and self.weight_decay:
            exact = exact * (1.0 - self.lr * self.weight_decay)
        self.put(name, exact - move * self.lr)
        weight[~trained] = before[~trained]
        for key, tensor in {**moments.tensors(), **{key: of[name] for key, of in others.items()}}.items():
            tensor[~trained] = kept[key][~trained]

    def put(self, name: str, exact: Tensor) -> None:
        """Round `exact`, in float32, into a weight."""
        weight = self.weights()[name]
        if weight.dtype == torch.float32 or self.rounding == "nearest":
            weight.copy_(exact)
        elif self.rounding == "kahan":
            weight.copy_(exact)
            self.lost[name].copy_(exact - weight.float())
        else:
            self.noise.round(weight.view(-1), exact.view(-1), name, self.step_number, 0)


class Moments:
    """What the rules remember of one weight."""

    def __init__(self, shape: torch.Size) -> None:
        self.first, self.second, self.highest = (torch.zeros(shape) for _ in range(3))
        self.writes = 0
        # Of LOZO-M: the momentum's left side, and the step of the right one that it goes with.
        self.side: Tensor | None = None
        self.step = 0
        # Of noise whose sides are fixed: of the numbers that weigh their products.
        self.of_weights: Moments | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"first": self.first, "second": self.second, "highest": self.highest}

    def move(self, rule: str, estimate: Tensor) -> Tensor:
        """What takes the estimate's place; options are those of `table.RULES`."""
        if rule == "sgd":
            return estimate
        if rule == "sign":
            return estimate.sign()
        if rule in ("momentum", "lozo_m"):
            self.first = self.first * 0.9 + estimate
            return self.first
        return quotient(*self.both(rule, estimate))

    def both(self, rule: str, estimate: Tensor) -> tuple[Tensor, Tensor]:
        """Adam's, bias corrected."""
        self.writes += 1
        self.first = self.first * 0.8 + estimate * (1.0 - 0.8)
        first = self.first / (1.0 - 0.8**self.writes)
        seen = first if rule == "adam_of_momentum" else estimate
        self.second = self.second * 0.95 + seen * seen * (1.0 - 0.95)
        self.highest = torch.maximum(self.highest, self.second)
        second = self.highest if rule == "amsgrad" else self.second
        return first, second / (1.0 - 0.95**self.writes)


def quotient(first: Tensor, second: Tensor) -> Tensor:
    return first / (square_root(second) + 1e-6)


def square_root(x: Tensor) -> Tensor:
    """One that numpy and IEEE 754 agree on, whatever torch makes of it."""
    return torch.from_numpy(np.sqrt(x.numpy()))


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """float64: of numbers cut to so few bits, by row and by column, that no order of the sums shows."""
    bits = (53 - math.ceil(math.log2(left.shape[1]))) // 2
    columns = cut_rows(left.double().numpy(), bits).T
    rows = cut_rows(right.double().numpy().T, bits).T
    return torch.from_numpy(sum(np.outer(c, r) for c, r in zip(columns, rows, strict=True)))


def cut_rows(numbers: Any, bits: int) -> Any:
    """To multiples of 2**-bits of the power of two above a row's largest."""
    exponents = np.frexp(abs(numbers).max(1, keepdims=True))[1] - bits
    return np.ldexp(np.rint(np.ldexp(numbers, -exponents)), exponents)


def orthonormaliser(gram: Tensor) -> Tensor:
    """The inverse of R in gram = R^T R, by Cholesky and back-substitution, number by number."""
    g, n = gram.tolist(), len(gram)
    r = [[0.0] * n for _ in range(n)]
    x = [[0.0] * n for _ in range(n)]
    for i, j in itertools.combinations_with_replacement(range(n), 2):
        rest = g[i][j]
        for k in range(i):
            rest -= r[k][i] * r[k][j]
        r[i][j] = math.sqrt(rest) if i == j else rest / r[i][i]
    for i, j in itertools.combinations_with_replacement(range(n), 2):
        rest = float(i == j)
        for k in range(j):
            rest -= x[i][k] * r[k][j]
        x[i][j] = rest / r[j][j]
    return torch.tensor(x, dtype=torch.float64)


def shaped(shape: str, all_slopes: Sequence[Sequence[float]]) -> list[float]:
    """The last step's slopes as coefficients; options are those of `table.COEFFICIENTS`."""
    slopes = np.array(all_slopes[-1])
    if shape == "raw" or (shape in ("fzoo", "z_scores") and len(slopes) == 1):
        return slopes.tolist()
    if shape == "sign":
        return np.sign(slopes).tolist()
    if shape == "clip":
        return np.clip(slopes, -0.5, 0.5).tolist()
    if shape == "rms":
        mean = 0.0
        for earlier in all_slopes:
            mean = 0.9 * mean + (1.0 - 0.9) * (math.fsum(s * s for s in earlier) / len(earlier))
        return (slopes / (math.sqrt(mean / (1.0 - 0.9 ** len(all_slopes))) + 1e-8)).tolist()
    deviation, mean = statistics.pstdev(slopes.tolist()), statistics.fmean(slopes.tolist())
    return ((slopes - mean if shape == "z_scores" else slopes) / deviation).tolist()


def twelve_bits(x: float) -> float:
    mantissa, exponent = np.frexp(x)
    return float(np.ldexp(np.rint(mantissa * 4096.0), exponent - 12))


def float32(x: float) -> float:
    return float(np.float32(x))


def float16(x: float) -> float:
    return float(np.float16(np.float32(x)))


def round_to(x: float, bits: int, dtype: torch.dtype) -> float:
    """`x` to a 16-bit grid in exact arithmetic, away from zero with 16 random bits (or the last 13).

    Below fp16's normal numbers the grid is that of fixed point, and rounding goes up, not away.
    """
    if x == 0.0:
        return x
    exponent = math.frexp(x)[1] - 1
    if dtype == torch.bfloat16:
        gap, chance = 2.0 ** (max(exponent, -126) - 7), bits / 2**16
    elif exponent >= -14:
        gap, chance = 2.0 ** (exponent - 10), (bits & 0x1FFF) / 2**13
    else:
        return math.copysign(math.floor(x * 2.0**24 + bits / 2**16) * 2.0**-24, x)
    return math.copysign(math.floor(abs(x) / gap + chance) * gap, x)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 (Salmon et al., SC'11) in Python integers."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(x)


def words_of_block(
    seed: int, name: str, step: int, stream: int, direction: int, block: int
) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
    return philox4x32((block & 0xFFFFFFFF, block >> 32, step, stream << 24 | direction), key)


def rademacher(seed: int, name: str, step: int, direction: int, element: int) -> float:
    """z at one element: stream 0, bit `element % 128` of block `element // 128`."""
    block, bit = divmod(element, 128)
    words = words_of_block(seed, name, step, 0, direction, block)
    return -1.0 if words[bit // 32] >> (bit % 32) & 1 else 1.0


def rounding_bits(seed: int, name: str, step: int, offset: int, numel: int) -> list[int]:
    """16 bits for each element: stream 1; 8 blocks make 16 words of 64 bits for each 1024 elements.

    First come the words of the blocks' first halves, then those of the second. Row k of 32 takes the
    product of each word with the k-th power of a constant; an element pair takes 16 bits of each half.
    """
    bits = []
    for element in range(offset, offset + numel):
        tile, place = divmod(element, 1024)
        (row, word), upper = divmod(place // 2, 16), place % 2
        block = _rounding_block(seed, name, step, tile * 8 + word % 8)
        low, high = block[2:] if word >= 8 else block[:2]
        product = (low | high << 32) * pow(0xD1342543DE82EF95, row + 1, 1 << 64) % (1 << 64)
        bits.append((product >> 48 if upper else product >> 16) & 0xFFFF)
    return bits


@cache
def _rounding_block(seed: int, name: str, step: int, block: int) -> tuple[int, ...]:
    return words_of_block(seed, name, step, 1, 0, block)


def weight_tolerance(
    steps: int, lr: float, eps: float, loss: float, zmax: float = 1.0, gain: float = 1.0
) -> float:
    """How far apart weights may be after `steps` steps if each loss is off by some fp32 roundings.

    A loss of size `loss` that comes out of a few dozen float32 operations in sequence, dot products
    of at most 64 terms among them, is off by at most about 64 units in the last place (2**-23): rows
    are stacked or not, so the order of sums in a product of matrices may differ. The slope
    (L+ - L-) / (2 eps) is then off by that over eps, a weight by lr * zmax of it in each step.
    `gain`: by how much more a sampler that learns from slopes can magnify that. The factor 2 is for
    the losses seen from weights that differ already: lr * curvature * steps stays well below 1.
    """
    return 2.0 * steps * lr * zmax * gain * 64 * 2.0**-23 * loss / eps
