"""The loop of a run: steps, the log of each, and the evaluations between them."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zo_dist.batches import StepBatches
from zo_dist.checkpoint import save_model
from zo_dist.config import Config
from zo_dist.data import RunData
from zo_dist.engines import Engine
from zo_dist.evaluate import Score, evaluate
from zo_dist.memory import peaks
from zo_dist.objective import Objective
from zo_dist.optimizer import ZeroOrder
from zo_dist.probes import RowLoss
from zo_dist.resume import SNAPSHOTS, Append, Earlier, Interrupted, StopRequests
from zo_dist.runlog import RunLog
from zo_dist.schedule import make_scheduler
from zo_dist.snapshot import PendingSnapshot
from zo_dist.tasks import (
    COMPOSITES,
    TEXT_METRICS,
    EncodedRow,
    Task,
    TextScore,
    accuracy_score,
    choice_loss,
    option_nll_loss,
)

ROW_LOSSES: dict[str, RowLoss] = {"choice": choice_loss, "option_nll": option_nll_loss}


def require_objective(objective: str, task: Task) -> None:
    """ValueError unless the task has what is to be lowered."""
    if objective not in ("loss", *task.metrics):
        legal = ", ".join(("loss", *task.metrics))
        raise ValueError(f"train.objective is {objective}; for the task {task.name!r} it may be {legal}")


def build_row_loss(config: Config, data: RunData) -> RowLoss:
    """The loss of each row that a step lowers, as `train.objective` says."""
    of_task, objective = ROW_LOSSES[data.task.loss], config.train.objective
    if objective == "loss":
        return COMPOSITES.get(data.task.loss, of_task) if config.tells_outputs else of_task
    if data.generate is None:
        return Objective(accuracy_score, check=of_task)
    return Objective(TextScore(data.generate, TEXT_METRICS[objective]))


def build_batches(config: Config, data: RunData, engine: Engine, rows: int | None = None) -> StepBatches:
    """This rank's training batches, as the config's `data` and `train` sections describe them.

    `rows`: per step, over all ranks, instead of `train.rows`.
    """
    return StepBatches(
        data.train,
        rows_per_step=rows or config.train.rows,
        micro_rows=config.train.micro_rows,
        length_pool=config.data.length_pool,
        seed=config.data.seed,
        rank=engine.group,
        num_ranks=engine.num_groups,
        pad_id=data.pad_id,
        fast=data.fast,
        device=engine.device,
        prompts=config.train.objective in TEXT_METRICS,
    )


def score(config: Config, engine: Engine, data: RunData, rows: list[EncodedRow]) -> Score:
    return evaluate(
        engine,
        rows,
        micro_rows=config.train.eval_micro_rows,
        pad_id=data.pad_id,
        fast=data.fast,
        metrics=data.task.metrics,
        generate=data.generate,
    )


def score_of(event: dict[str, Any], task: Task) -> Score:
    """What an `eval` in metrics.jsonl says."""
    loss = math.nan if event["loss"] is None else event["loss"]
    return Score({name: event[name] for name in task.metrics}, loss)


class Loop:
    """The steps of a run, with the evaluations between them."""

    def __init__(
        self,
        config: Config,
        optimizer: ZeroOrder,
        data: RunData,
        tokenizer: PreTrainedTokenizerBase,
        run_log: RunLog,
        append: Append,
        stop: StopRequests,
        earlier: Earlier | None,
    ) -> None:
        self._config, self._optimizer, self._data, self._tokenizer = config, optimizer, data, tokenizer
        self._log, self._append, self._stop = run_log, append, stop
        evals = earlier.evals("validation") if earlier else []
        # The score of other rows is no measure for these.
        rows = len(data.validation[: config.train.eval_rows])
        scores = [score_of(e, data.task) for e in evals if e["loss"] is not None and e["rows"] == rows]
        self._best = min((s.objective(config.train.objective) for s in scores), default=math.inf)
        self._row_loss = build_row_loss(config, data)
        self._evaluated = {e["step"] for e in evals}
        self._seconds_before = earlier.seconds if earlier else 0.0
        self._batches = build_batches(config, data, optimizer.engine)
        self._anchor_batches = build_batches(config, data, optimizer.engine, config.train.anchor_rows)
        self._snapshot: PendingSnapshot | None = None

    def run(self) -> float:
        """The steps that are left, or as many as `max_seconds` has room for; returns the seconds of all."""
        settings, optimizer = self._config.train, self._optimizer
        done = optimizer.step_count
        optimizer.prepare(self._batches[done][0], self._row_loss)
        self._start = time.perf_counter()
        optimizer.clock.read()
        over = done >= settings.steps or self._is_over(self._seconds_before)
        try:
            # An earlier process may have been stopped between a step and its evaluation.
            if done and self._evaluates(done, over) and done not in self._evaluated:
                self._validate(done)
            self._take_steps(done + 1, done if over else settings.steps)
            self._finish_snapshot()
        except Interrupted:
            self._finish_snapshot()
            raise
        finally:
            # Whatever ends the run, nothing writes to its folder any more.
            if self._snapshot:
                self._snapshot.wait()
        return self._seconds()

    def _take_steps(self, first: int, last: int) -> None:
        settings, optimizer = self._config.train, self._optimizer
        engine = optimizer.engine
        scheduler = make_scheduler(optimizer, settings, first - 1)
        validation = ""
        for step in range(first, last + 1):
            with optimizer.clock.on("data"):
                rows = self._rows_of(step - 1)
            loss = optimizer.step_batch(rows, self._row_loss)
            scheduler.step()
            ends, requested, written, memory = self._agree(step)
            with engine.jointly():
                self._append(optimizer.record)
                if step % settings.log_every == 0 or ends or requested:
                    self._write_step(step, loss, memory)
            self._stop.end(step, requested)
            if written:
                self._finish_snapshot()
            if self._evaluates(step, ends):
                validation = str(self._validate(step))
            if engine.has_copies and settings.verify_every and step % settings.verify_every == 0:
                engine.fingerprints(optimizer.params)
            if settings.snapshot_every and step % settings.snapshot_every == 0:
                self._finish_snapshot()
                folder = Path(settings.output) / SNAPSHOTS
                with optimizer.clock.on("save"):
                    self._snapshot = PendingSnapshot(optimizer, folder, settings.keep_snapshots)
                if not self._snapshot.copies:
                    self._finish_snapshot()
            self._log.advance(loss=f"{loss:.4f}", validation=validation)
            if ends:
                break

    def _rows_of(self, number: int) -> list[dict[str, Any]]:
        """What this rank runs in step `number`, from 0. Anchor steps go through the rows by themselves."""
        anchor = self._optimizer.anchor
        return (self._anchor_batches if anchor.due(number) else self._batches)[number]

    def _finish_snapshot(self) -> None:
        snapshot, self._snapshot = self._snapshot, None
        if snapshot:
            with self._optimizer.clock.on("save"):
                snapshot.finish()

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start

    def _evaluates(self, step: int, last: bool) -> bool:
        every = self._config.train.eval_every
        return bool(every) and (last or step % every == 0)

    def _agree(self, step: int) -> tuple[bool, int, bool, Tensor]:
        """Does training end with this step, which signal was sent, and is the snapshot's every file written?

        The same on every rank. Also the memory of each: `[ranks, 2]`, as `peaks`.
        """
        engine = self._optimizer.engine
        written = self._snapshot is not None and self._snapshot.written
        mine = [self._seconds(), float(self._stop.seen), float(written), *peaks(engine.device)]
        with self._optimizer.clock.on("agree"):
            everyone = engine.exchange(mine)
        # By the clock of rank 0: ranks must agree.
        ends = step == self._config.train.steps or self._is_over(float(everyone[0, 0]))
        return ends, int(everyone[:, 1].max()), bool(everyone[:, 2].all()), everyone[:, 3:]

    def _is_over(self, seconds: float) -> bool:
        limit = self._config.train.max_seconds
        return limit is not None and seconds >= limit

    def _write_step(self, step: int, loss: float, memory: Tensor) -> None:
        optimizer = self._optimizer
        drawn = [0] * len(optimizer.arms)
        for arm in itertools.chain(*optimizer.record.arms):
            drawn[arm] += 1
        slopes = [abs(slope) for slope in optimizer.record.slopes]
        self._log.write(
            "step",
            step,
            loss=loss,
            lr=optimizer.record.lr,
            lr_factor=optimizer.sampler.lr_factor,
            slope=sum(slopes) / len(slopes) if slopes else math.nan,
            drawn=drawn,
            seconds=self._seconds(),
            skipped=optimizer.skipped,
            spent=optimizer.clock.read(),
            host_peak=memory[:, 0].tolist(),
            accelerator_peak=memory[:, 1].tolist(),
        )

    def _validate(self, step: int) -> Score:
        data, engine = self._data, self._optimizer.engine
        rows = data.validation[: self._config.train.eval_rows]
        with self._optimizer.clock.on("evaluate"):
            result = score(self._config, engine, data, rows)
        # First the weights: a process that is killed or stopped here evaluates again.
        objective = result.objective(self._config.train.objective)
        if self._config.train.save_best and objective < self._best:
            self._stop.heed(step)
            self._best = objective
            with self._optimizer.clock.on("save"):
                save_model(engine, Path(self._config.train.output) / "best", self._tokenizer)
        with engine.jointly():
            self._log.write_score("validation", result, len(rows), step, self._seconds())
        return result
