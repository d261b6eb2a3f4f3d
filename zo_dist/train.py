"""What the commands do: train, evaluate, replay. `run_training` is the order of a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

import zo_dist
from zo_dist.batches import StepBatches
from zo_dist.checkpoint import save_model
from zo_dist.config import Config
from zo_dist.data import RunData, load_data
from zo_dist.engines import Engine, on_each_node_first, select
from zo_dist.evaluate import Score, evaluate
from zo_dist.models import load_model, load_tokenizer, longest_input
from zo_dist.optimizer import ZeroOrder
from zo_dist.probes import RowLoss
from zo_dist.replay import identity, replay
from zo_dist.report import plot_run
from zo_dist.runlog import RunLog
from zo_dist.schedule import make_scheduler
from zo_dist.tasks import EncodedRow, choice_loss, get_task, option_nll_loss
from zo_dist.trajectory import StepRecord, TrajectoryWriter

T = TypeVar("T")

log = logging.getLogger(__name__)

ROW_LOSSES: dict[str, RowLoss] = {"choice": choice_loss, "option_nll": option_nll_loss}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded and sharded model, its tokenizer, and the rows of a run."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    data: RunData


def prepare(config: Config, ranks: Engine) -> Prepared:
    """Fetch what the config names, once per node, and build it. Every rank must call it.

    ValueError on every rank if a rank's config differs, or anything cannot be fetched or read.
    """
    ranks.require_equal("the config", config.flat())
    tokenizer, hf_config = fetched(lambda: load_tokenizer(config.model))
    longest = longest_input(hf_config)
    data = fetched(lambda: load_data(config.data, tokenizer, longest))
    model = load_model(config, hf_config, ranks.device, ranks.rank, ranks.num_ranks)
    return Prepared(model, tokenizer, data)


def fetched(job: Callable[[], T]) -> T:
    """What `job` makes, once per node first; ValueError if it cannot be downloaded, here or elsewhere."""
    try:
        return on_each_node_first(job)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def build_optimizer(config: Config, model: nn.Module) -> ZeroOrder:
    """The optimizer that the config's `optimizer` section describes. Every rank must call it."""
    settings = config.optimizer
    return ZeroOrder(
        model,
        lr=settings.lr,
        eps=settings.eps,
        sampler=settings.sampler.build(),
        estimator=settings.build_estimator(),
        rule=settings.build_rule(),
        directions=settings.directions,
        perturb=settings.perturb,
        noise=settings.noise,
        rounding=settings.rounding,
        seed=settings.seed,
        max_skipped=settings.max_skipped,
        self_check=settings.self_check,
        compile=settings.compile,
    )


def build_batches(config: Config, data: RunData, engine: Engine) -> StepBatches:
    """This rank's training batches, as the config's `data` and `train` sections describe them."""
    return StepBatches(
        data.train,
        rows_per_step=config.train.rows,
        micro_rows=config.train.micro_rows,
        length_pool=config.data.length_pool,
        seed=config.data.seed,
        rank=engine.rank,
        num_ranks=engine.num_ranks,
        pad_id=data.pad_id,
        fast=data.fast,
        device=engine.device,
    )


def run_training(config: Config, ranks: Engine) -> dict[str, Any]:
    """A whole run; returns its result, the same on every rank. Every rank must call it.

    Writes to `train.output`: config.yaml, metrics.jsonl, tensorboard/, best/, last/, trajectory.zo, run.png,
    result.json. `seconds` in the result is the wall clock from the first step to the last, with the
    evaluations and saves between them; without loading, compiling and the start-up check, and without
    the test before and after.
    """
    prepared = prepare(config, ranks)
    optimizer = build_optimizer(config, prepared.model)
    engine, data, output = optimizer.engine, prepared.data, Path(config.train.output)
    with engine.jointly():
        if engine.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    with (
        RunLog(
            output, rank=engine.rank, steps=config.train.steps, tensorboard=config.train.tensorboard
        ) as run_log,
        begin_trajectory(config, optimizer, output) as trajectory,
    ):
        run_log.write(
            "run",
            engine=engine.name,
            ranks=engine.num_ranks,
            rows_truncated=data.truncated,
            arms=[arm.name for arm in optimizer.arms],
            trained_parameters=sum(p.numel for p in optimizer.params),
        )
        before = score(config, engine, data, data.test)
        run_log.write("eval", 0, split="test", seconds=0.0, accuracy=before.accuracy, loss=before.loss)
        log.info("before training: test accuracy %.4f, loss %.4f", before.accuracy, before.loss)
        seconds = Loop(config, optimizer, prepared, run_log, trajectory, output).run()
        steps = optimizer.step_count
        if config.train.save_last:
            save_model(engine, output / "last", prepared.tokenizer)
        after = score(config, engine, data, data.test)
        run_log.write("eval", steps, split="test", seconds=seconds, accuracy=after.accuracy, loss=after.loss)
        log.info("after training: test accuracy %.4f, loss %.4f", after.accuracy, after.loss)
    result: dict[str, Any] = {"accuracy_before": before.accuracy, "accuracy_after": after.accuracy}
    result.update(loss_before=before.loss, loss_after=after.loss, steps=steps, seconds=round(seconds, 2))
    result.update(engine=engine.name, ranks=engine.num_ranks)
    with engine.jointly():
        if engine.rank == 0:
            (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
            log.info("plot: %s", plot_run(output))
    return result


@contextmanager
def begin_trajectory(
    config: Config, optimizer: ZeroOrder, output: Path
) -> Iterator[Callable[[StepRecord], None]]:
    """What appends a step to the log of the run. Every rank must call it, and learns if it failed."""
    engine = optimizer.engine
    header = {**identity(optimizer), "config": dataclasses.asdict(config), "zo_dist": zo_dist.__version__}
    with ExitStack() as stack:
        with engine.jointly():
            if engine.rank == 0:
                writer = TrajectoryWriter(
                    output / "trajectory.zo", header, sync_every=config.train.sync_every
                )
                stack.enter_context(writer)

        def append(record: StepRecord) -> None:
            with engine.jointly():
                if engine.rank == 0:
                    writer.append(record)

        yield append


def run_evaluation(config: Config, ranks: Engine) -> dict[str, Any]:
    """Accuracy and loss of `model.source` on the test split. Every rank must call it."""
    prepared = prepare(config, ranks)
    engine, data = select(prepared.model), prepared.data
    result = score(config, engine, data, data.test)
    return {"accuracy": result.accuracy, "loss": result.loss, "rows": len(data.test)} | {
        "engine": engine.name,
        "ranks": engine.num_ranks,
    }


def run_replay(config: Config, log: Path, out: Path, steps: int | None, ranks: Engine) -> dict[str, Any]:
    """Replay on the model that the config names and save the result to the folder `out`.

    Every rank must call it. Returns what it did, the same on every rank but for the clock.
    """
    ranks.require_equal("the config", config.flat())
    tokenizer, hf_config = fetched(lambda: load_tokenizer(config.model))
    model = load_model(config, hf_config, ranks.device, ranks.rank, ranks.num_ranks)
    # The same bits, sooner.
    fast = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, compile=True))
    optimizer = build_optimizer(fast, model)
    start = time.perf_counter()
    done = replay(optimizer, log, steps)
    seconds = time.perf_counter() - start
    save_model(optimizer.engine, out, tokenizer)
    result: dict[str, Any] = {"steps": done, "seconds": round(seconds, 2), "model": str(out)}
    result["steps_per_second"] = round(done / seconds, 2)
    return result | {"engine": optimizer.engine.name, "ranks": optimizer.engine.num_ranks}


def score(config: Config, engine: Engine, data: RunData, rows: list[EncodedRow]) -> Score:
    return evaluate(engine, rows, micro_rows=config.train.eval_micro_rows, pad_id=data.pad_id, fast=data.fast)


class Loop:
    """The steps of a run, with the evaluations between them."""

    def __init__(
        self,
        config: Config,
        optimizer: ZeroOrder,
        prepared: Prepared,
        run_log: RunLog,
        append: Callable[[StepRecord], None],
        output: Path,
    ) -> None:
        self._config, self._optimizer, self._prepared = config, optimizer, prepared
        self._log, self._append, self._output = run_log, append, output
        self._best = math.inf
        self._batches = build_batches(config, prepared.data, optimizer.engine)

    def run(self) -> float:
        """All steps, or as many as `max_seconds` has room for; returns the seconds they took."""
        settings, optimizer = self._config.train, self._optimizer
        row_loss = ROW_LOSSES[get_task(self._config.data.task).loss]
        scheduler = make_scheduler(optimizer, settings)
        accuracy = ""
        optimizer.prepare(self._batches[0][0], row_loss)
        self._start = time.perf_counter()
        for step in range(1, settings.steps + 1):
            lr = optimizer.param_groups[0]["lr"]
            loss = optimizer.step_batch(self._batches[step - 1], row_loss)
            self._append(optimizer.record)
            scheduler.step()
            # The last step by the clock of rank 0: ranks must agree on which that is.
            last = step == settings.steps or self._out_of_time()
            if step % settings.log_every == 0 or last:
                self._write_step(step, loss, lr)
            if settings.eval_every and (step % settings.eval_every == 0 or last):
                accuracy = f"{self._validate(step).accuracy:.4f}"
            self._log.advance(loss=f"{loss:.4f}", validation=accuracy)
            if last:
                break
        return self._seconds()

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _out_of_time(self) -> bool:
        limit = self._config.train.max_seconds
        if limit is None:
            return False
        return bool(self._optimizer.engine.exchange([self._seconds()])[0, 0] >= limit)

    def _write_step(self, step: int, loss: float, lr: float) -> None:
        optimizer = self._optimizer
        drawn = [0] * len(optimizer.arms)
        for arm in itertools.chain(*optimizer.record.arms):
            drawn[arm] += 1
        slopes = [abs(slope) for slope in optimizer.record.slopes]
        self._log.write(
            "step",
            step,
            loss=loss,
            lr=lr,
            lr_factor=optimizer.sampler.lr_factor,
            slope=sum(slopes) / len(slopes) if slopes else math.nan,
            drawn=drawn,
            seconds=self._seconds(),
            skipped=optimizer.skipped,
        )

    def _validate(self, step: int) -> Score:
        data, engine = self._prepared.data, self._optimizer.engine
        result = score(self._config, engine, data, data.validation[: self._config.train.eval_rows])
        self._log.write(
            "eval",
            step,
            split="validation",
            seconds=self._seconds(),
            accuracy=result.accuracy,
            loss=result.loss,
        )
        if self._config.train.save_best and result.loss < self._best:
            self._best = result.loss
            save_model(engine, self._output / "best", self._prepared.tokenizer)
        return result
