"""What happened in a run, from its folder alone: config, log and metrics; no model, no weights."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zo_dist.anchor import Anchored
from zo_dist.config import Config
from zo_dist.noise import Noise
from zo_dist.projection import Projected
from zo_dist.report.chart import Line, Style, thinned
from zo_dist.resume import LOG
from zo_dist.runlog import METRICS, read_metrics
from zo_dist.samplers import Bandit
from zo_dist.settings import build
from zo_dist.trajectory import StepRecord, TrajectoryError, TrajectoryReader


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a run (rank 0's), from its start to its end.

    `began`: the steps that were done before; `steps`: and after. `torn_bytes`, `lost_steps`: what it found
    of the one before it and could not use. `ended`: how; empty if nothing says so: it was killed, or it runs.
    """

    began: int
    steps: int
    time: str | None
    engine: str
    ranks: int
    torn_bytes: int
    lost_steps: int
    ended: str


class History:
    """A run's folder, read whole.

    `records`: of every step, from the log. `torn_bytes`: of a last record that is cut short. Raises
    ValueError for a folder without a log, a damaged one, and a log that `zo-dist train` did not write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        reader = TrajectoryReader(self.folder / LOG)
        settings = reader.header.get("config")
        if not isinstance(settings, dict):
            raise ValueError(f"{reader.path} was not written by zo-dist train: it holds no config")
        self.name = str(self.folder)
        self.config = build(Config, settings)
        self.arms: list[str] = reader.header["arms"]
        self.records = list(reader)
        self.torn_bytes = reader.torn
        self.events = read_metrics(self.folder)
        if not self.of("run"):
            raise ValueError(f"{self.folder / METRICS} lacks the start of the run")

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def evals(self, split: str) -> list[dict[str, Any]]:
        return [e for e in self.of("eval") if e["split"] == split]

    @property
    def skipped(self) -> list[int]:
        """The steps that wrote nothing, as a loss was not finite; the first step is 1."""
        return [record.step + 1 for record in self.records if not record.slopes]

    @cached_property
    def _clock(self) -> tuple[list[float], list[float]]:
        timed = [e for e in self.of("step") if e["seconds"] is not None]
        return [0.0, *(float(e["step"]) for e in timed)], [0.0, *(float(e["seconds"]) for e in timed)]

    def seconds_at(self, step: float) -> float:
        """Training time at a step; between two that the metrics have, on the line between them."""
        steps, seconds = self._clock
        right = min(bisect.bisect_left(steps, step), len(steps) - 1)
        left = max(right - 1, 0)
        if steps[right] <= step or right == left:
            return seconds[right]
        share = (step - steps[left]) / (steps[right] - steps[left])
        return seconds[left] + share * (seconds[right] - seconds[left])

    @cached_property
    def processes(self) -> list[Process]:
        starts = [i for i, e in enumerate(self.events) if e["event"] == "run"]
        processes = []
        for number, i in enumerate(starts):
            last = number + 1 == len(starts)
            stop = len(self.events) if last else starts[number + 1]
            start, mine = self.events[i], self.events[i:stop]
            done = len(self.records) if last else self.events[stop]["done"]
            processes.append(
                Process(
                    start["done"],
                    done,
                    start.get("time"),
                    start["engine"],
                    start["ranks"],
                    start.get("torn_bytes", 0),
                    start.get("lost_steps", 0),
                    _end_of(mine),
                )
            )
        return processes

    @cached_property
    def probabilities(self) -> list[list[float]]:
        """Of each step, the arms' probabilities that it drew by; empty for samplers that learn none.

        The sampler is built as it was and shown each step's slopes in turn. Raises TrajectoryError where
        it does not draw the arms that the log has. Cost: 1.6 ms per direction.
        """
        sampler = self.config.optimizer.sampler.build()
        if not isinstance(sampler, Bandit):
            return []
        sizes = self.of("run")[0].get("arm_sizes")
        if sizes is None:
            raise ValueError(f"{self.folder / METRICS} has no arm_sizes: an earlier zo_dist wrote it")
        noise = Noise(seed=self.config.optimizer.seed)
        sampler.bind(sizes, noise)
        anchor = Anchored(self.config.optimizer.anchor)
        anchor.bind(sizes, noise, self.config.optimizer.directions)
        projection, seen = Projected(self.config.optimizer.projection), []
        for record in _shown(self.records):
            seen.append(list(sampler.probabilities))
            if projection.due(record.step):
                if record.slopes:
                    projection.count(record.step)
                continue
            drawn_by = anchor.sampler if anchor.due(record.step) else sampler
            draws = [drawn_by.draw(record.step, d) for d in range(len(record.slopes))]
            if tuple(draw.arms for draw in draws) != record.arms:
                raise TrajectoryError(
                    f"{self.folder / LOG}: step {record.step} drew other arms than its sampler draws here"
                )
            if not record.slopes:
                continue
            if drawn_by is sampler:
                sampler.observe(draws, record.slopes)
            else:
                anchor.drop(record, {}, ())
        return seen


def _shown(records: list[StepRecord]) -> Iterator[StepRecord]:
    return iter(tqdm(records, desc="replaying the sampler", unit="step", delay=2.0, leave=False))


def _end_of(events: list[dict[str, Any]]) -> str:
    stops = [e for e in events if e["event"] == "stop"]
    if not stops:
        return ""
    error, reason = stops[-1]["error"], stops[-1]["reason"]
    return reason if error in (None, "Interrupted") else f"{error}: {reason}"


def line(
    run: History, number: int, name: str, x: Sequence[float], y: Sequence[float], style: Style = "line"
) -> Line:
    """A line over the steps of a run, with the training time of each point. A run's only one has no name."""
    few, of_few = thinned(x), thinned(y)
    times = [run.seconds_at(step) for step in few]
    return Line(
        name=f"{run.name}: {name}" if name else run.name,
        x=few,
        y=of_few,
        seconds=times,
        run=number,
        style=style,
    )
