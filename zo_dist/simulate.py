"""A simulation of up to some 10,000 workers that exchange scalars alone, over a network that loses messages.

Simulated are the network and the workers' clocks: which message comes, and when. What is computed is real:
the losses at each worker's own copy of the weights, the bytes of messages and of the log, the step itself.

The protocol. A server keeps the log (trajectory.py). Steps have deadlines, a round apart. In a round a worker
pulls the records that it lacks and replays them, tests its directions on its own rows, and sends the sums of
losses (`pack_sums`). At the deadline the server makes a step of the sums that have come, as ranks make one of
those that they agree on; a direction that has not come weighs nothing, as rows without labels do. It appends
the record. There is a server, and no gossip, because bits depend on the order in which terms are added: one
log is one order. A replica is a function of how much of the log it has replayed, so workers that have
replayed as much share weights here: 10,000 take the memory of the few versions that are still in use.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_dist.coefficients import Clip, Raw, SignOnly
from zo_dist.noise import Noise
from zo_dist.optimizer import ZeroOrder
from zo_dist.probes import Batch, RowLoss, StepProbes, count_rows, rows_of_groups, stack_rows
from zo_dist.samplers import Dense, Uniform
from zo_dist.scale import Scale
from zo_dist.trajectory import StepRecord

# Step and worker, before a worker's sums.
_SENDER = struct.Struct("<QI")

# Workers whose rows travel in one forward: bounds its memory.
_TOGETHER = 1024

# Parts that ask for nothing but the log and a direction's own slope.
_PARTS = {"sampler": (Dense, Uniform), "coefficients": (Raw, SignOnly, Clip), "scale": (Scale,)}


@dataclass(frozen=True, kw_only=True)
class Network:
    """How simulated messages fare. Times are in rounds: from one deadline to the next.

    `lost`, in [0, 1): the chance that a worker's message never comes. `missed`, in [0, 1): the chance that a
    worker gets no records in a round, and works with the weights it has. `least`, `tail`, above 0: a message
    takes longer than x rounds with the chance `(least / x) ** tail` (Pareto): the smaller `tail`, the more
    stragglers; with an infinite one all take `least`. `lag`: a step is made so many rounds later, of losses
    at weights that are so many steps older, so that a message may take `1 + lag` rounds; one that takes
    longer is dropped. `churn`, in [0, 1): the chance that in a round a worker's place is taken by a new one,
    which has the starting weights and nothing of the log. All is drawn from seed, step and worker.
    Raises ValueError for a value out of range.
    """

    lost: float = 0.0
    missed: float = 0.0
    least: float = 0.5
    tail: float = math.inf
    lag: int = 0
    churn: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lost", "missed", "churn"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a chance, in [0, 1)")
        if self.lag < 0:
            raise ValueError(f"lag is {self.lag}; it must be at least 0")
        if not self.tail > 0.0:
            raise ValueError(f"tail is {self.tail}; it must be above 0 (.inf: no stragglers)")
        if not 0.0 < self.least < 1 + self.lag:
            raise ValueError(
                f"least is {self.least}; it must be above 0 and below {1 + self.lag} (1 + lag), or every "
                "message comes too late"
            )

    @property
    def counted(self) -> float:
        """The chance that a message which is sent counts."""
        return (1.0 - self.lost) * (1.0 - math.pow(self.least / (1 + self.lag), self.tail))

    def happens(self, what: str, step: int, workers: int) -> list[bool]:
        """Does `lost`, `missed` or `churn` happen to each worker in this step?"""
        chance = float(getattr(self, what))
        return [x < chance for x in self._uniforms(what, step, workers)] if chance else [False] * workers

    def delays(self, step: int, workers: int) -> list[float]:
        """How many rounds each worker's message of this step takes."""
        return [self.least * (1.0 - x) ** (-1.0 / self.tail) for x in self._uniforms("delay", step, workers)]

    def _uniforms(self, what: str, step: int, workers: int) -> list[float]:
        return Noise(seed=self.seed).uniforms(f"zo_dist.simulate.{what}", step, 0, workers)


@dataclass(frozen=True, slots=True)
class Round:
    """What one step of a simulation came to.

    `record`: what it wrote. `sent`, `counted`: messages of workers, and how many of them came in time.
    `pulls`: answers with records that were sent to workers, those that they missed among them. `bytes_up`,
    `bytes_down`: of the messages, and of the records in the answers. `age`: how many steps the weights that
    losses were computed at were behind, as a mean over messages that counted (nan of none). `slowest`: how
    many rounds it takes until the last message would be there.
    """

    record: StepRecord
    sent: int
    counted: int
    pulls: int
    bytes_up: int
    bytes_down: int
    age: float
    slowest: float


class Simulation:
    """Steps of `optimizer`, in which each of many simulated workers tests directions of its own.

    `optimizer`: a fresh one in a single process, with `perturb="module"`; its model is the server's replica.
    There are `directions / directions_per_row` workers, each with its group of directions. With the default
    `Network` a step is `optimizer.step_batch`, bit for bit. Raises ValueError for parts that ask for
    more than the log and each direction's own slope: workers that are behind, and a server that has not heard
    of all directions, could not have that.

    `versions`: how many records each worker has replayed; -1 for one that has yet to get the log. Cost: the
    forwards of a step, and a copy of the weights for each version that some worker is at.
    """

    def __init__(self, optimizer: ZeroOrder, network: Network) -> None:
        _require_fit(optimizer)
        self.network, self._optimizer = network, optimizer
        self.versions = [0] * (optimizer.directions // optimizer.directions_per_row)
        self._weights: dict[int, list[Tensor]] = {}
        # Bytes of the log up to each version.
        self._ends = [0]

    @torch.no_grad()
    def step_batch(self, batch: Batch, row_loss: RowLoss) -> Round:
        """One step, as `ZeroOrder.step_batch`; the rows are the workers', in their order.

        A step for which no message counts is skipped, as one whose losses are not finite.
        """
        optimizer, network, workers = self._optimizer, self.network, len(self.versions)
        step = optimizer.step_count
        _, rows, _ = count_rows(optimizer.engine, [batch], optimizer.directions, optimizer.directions_per_row)
        optimizer.prepare(batch, row_loss)
        pulls, bytes_down = self._pull(step)
        self._keep_weights(step)
        lost, delays = network.happens("lost", step, workers), network.delays(step, workers)
        senders = [worker for worker, version in enumerate(self.versions) if version >= 0]
        # The losses in any other message would be seen by nobody, so they are not computed.
        in_time = [w for w in senders if not lost[w] and delays[w] <= 1 + network.lag]
        shares = rows_of_groups(0, rows, rows, workers)

        def evaluate(probes: StepProbes) -> Tensor:
            try:
                sums = probes.stacked(self._pieces(batch, shares, in_time), row_loss)
            finally:
                self._load(step)
            of_workers = sums.view(workers, -1, *sums.shape[1:])
            messages = [pack_sums(step, worker, of_workers[worker]) for worker in in_time]
            return collect(messages, step, of_workers).view(sums.shape)

        if in_time:
            optimizer._step(evaluate)
        else:
            optimizer.replay(StepRecord(step, float(optimizer.param_groups[0]["lr"])))
        record = optimizer.record
        self._ends.append(self._ends[-1] + len(record.pack(len(optimizer.arms))))
        bytes_up = len(senders) * (_SENDER.size + self._bytes_of_sums)
        ages = [step - self.versions[worker] for worker in in_time]
        age = math.fsum(ages) / len(ages) if ages else math.nan
        slowest = max((delays[worker] for worker in senders), default=0.0)
        return Round(record, len(senders), len(in_time), pulls, bytes_up, bytes_down, age, slowest)

    @property
    def _bytes_of_sums(self) -> int:
        return 16 * self._optimizer.directions_per_row * len(self._optimizer.estimator.signs)

    def _pull(self, step: int) -> tuple[int, int]:
        """Every worker asks for the records that there are; returns the answers, and their bytes."""
        latest, workers = max(0, step - self.network.lag), len(self.versions)
        missed = self.network.happens("missed", step, workers)
        replaced = self.network.happens("churn", step, workers)
        pulls = sent = 0
        for worker, version in enumerate(self.versions):
            has = -1 if replaced[worker] else version
            if has < latest:
                pulls += 1
                sent += self._ends[latest] - self._ends[max(has, 0)]
            self.versions[worker] = has if missed[worker] else latest
        return pulls, sent

    def _keep_weights(self, step: int) -> None:
        """Keep a copy of the server's weights, and of older ones those that may be asked for."""
        spans = self._optimizer.engine.spans(self._optimizer.params)
        self._weights[step] = [span.flat.clone() for span in spans]
        in_use = [version for version in self.versions if version >= 0]
        oldest = min([*in_use, max(0, step - self.network.lag)])
        self._weights = {v: weights for v, weights in self._weights.items() if v >= oldest}

    def _load(self, version: int) -> None:
        optimizer = self._optimizer
        spans = optimizer.engine.spans(optimizer.params)
        for span, weights in zip(spans, self._weights[version], strict=True):
            span.flat.copy_(weights)
        optimizer.engine.publish()

    def _pieces(
        self, batch: Batch, shares: Sequence[tuple[int, int]], workers: Sequence[int]
    ) -> Iterator[tuple[Batch, list[tuple[int, int]]]]:
        """These workers' rows, those at one version together; a piece is given with its weights in place."""
        starts = list(itertools.accumulate((rows for _, rows in shares), initial=0))
        for version in sorted({self.versions[worker] for worker in workers}):
            self._load(version)
            members = [worker for worker in workers if self.versions[worker] == version]
            for first in range(0, len(members), _TOGETHER):
                some = members[first : first + _TOGETHER]
                rows = stack_rows(batch, [(starts[worker], starts[worker + 1]) for worker in some])
                yield rows, [shares[worker] for worker in some]


def pack_sums(step: int, worker: int, sums: Tensor) -> bytes:
    """A worker's message: step and worker in 12 bytes, then its float64 `[directions, sides, 2]`.

    Which directions these are, and their noise, follow from step and worker: the sums of losses and of
    weights at each side are all that the server does not know.
    """
    numbers = sums.flatten().tolist()
    return _SENDER.pack(step, worker) + struct.pack(f"<{len(numbers)}d", *numbers)


def collect(messages: Sequence[bytes], step: int, like: Tensor) -> Tensor:
    """The sums of all workers, `[workers, directions, sides, 2]` as `like`: 0 of those that did not come.

    The order of messages, and how often one comes, changes nothing. Those of another step are left out.
    """
    sums = torch.zeros_like(like)
    for message in messages:
        of_step, worker = _SENDER.unpack_from(message)
        if of_step == step:
            numbers = struct.unpack_from(f"<{like[0].numel()}d", message, _SENDER.size)
            sums[worker] = sums.new_tensor(numbers).view_as(sums[worker])
    return sums


def _require_fit(optimizer: ZeroOrder) -> None:
    for name, fit in _PARTS.items():
        part = optimizer.parts[name]
        if type(part) not in fit:
            raise ValueError(
                f"{name} is {type(part).__name__}, which needs what a worker that is behind, or a server "
                "that has not heard of all directions, does not have; use "
                + " or ".join(kind.__name__ for kind in fit)
            )
    refused = {
        "anchor": (optimizer.anchor.every > 0, "leave it out"),
        "curvature": (optimizer.curvature.used, "leave it out"),
        "perturbation_momentum": (optimizer.perturbation_momentum.used, "leave it out"),
        "jacobian": (optimizer.jacobian.used, "leave it out"),
        "projection": (optimizer.projection.every > 0, "leave it out: its search needs the server's weights"),
        "conservative": (optimizer.trials is not None, "set it to false: workers do not know what to try"),
        "perturb": (optimizer.perturb != "module", "use module: workers at other weights share a step"),
        "engine": (optimizer.engine.num_ranks > 1, "use one process: it plays all workers"),
        "step_count": (optimizer.step_count > 0, "take a new optimizer: workers begin without a record"),
    }
    for name, (wrong, remedy) in refused.items():
        if wrong:
            raise ValueError(f"{name} does not fit a simulation of workers: {remedy}")
