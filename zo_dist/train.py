"""What the commands do: train, evaluate, replay, export. `run_training` is the order of a run."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from zo_dist.checkpoint import require_replaceable, save_model
from zo_dist.config import Config, EngineConfig
from zo_dist.data import RunData, load_data
from zo_dist.engines import Engine, first_of_node, on_each_node_first, select
from zo_dist.files import write_whole
from zo_dist.learn_scale import Learning, learn_scale, require_one_process
from zo_dist.loop import ROW_LOSSES, Loop, build_batches, require_objective, score, score_of
from zo_dist.models import check_saved, load_model, load_tokenizer, longest_input
from zo_dist.optimizer import ZeroOrder
from zo_dist.params import trainable_params
from zo_dist.replay import replay
from zo_dist.report.pictures import draw_run
from zo_dist.resume import StopRequests, begin, find_earlier, go_on, last_snapshot, sole_use
from zo_dist.runlog import RunLog
from zo_dist.scale import save_nets
from zo_dist.tasks import get_task
from zo_dist.trajectory import TrajectoryReader

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded and sharded model, its tokenizer, and the rows of a run."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    data: RunData


def prepare(config: Config, ranks: Engine) -> Prepared:
    """Fetch what the config names, once per node, and build it. Every rank must call it.

    ValueError on every rank if a rank's config differs, anything cannot be fetched or read, or a model that
    zo_dist saved has not the bytes that it had: each node reads its files once for that.
    """
    ranks.require_equal("the config", config.flat())
    with ranks.jointly():
        require_objective(config.train.objective, get_task(config.data.task))
    tokenizer, hf_config = fetched(lambda: load_tokenizer(config.model))
    longest = longest_input(hf_config)
    data = fetched(lambda: load_data(config.data, tokenizer, longest))
    if config.engine.kind == "pipeline" and data.generate is not None:
        raise ValueError(
            f"the task {data.task.name!r} generates texts, and engine.kind is pipeline, which makes one "
            "forward of each batch: use fsdp2 or deepspeed"
        )
    with ranks.jointly():
        if first_of_node():
            check_saved(config.model)
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
        coefficients=settings.coefficients.build(),
        rule=settings.rule.build(settings.weight_decay),
        scale=settings.scale.build(),
        directions=settings.directions,
        directions_per_row=settings.directions_per_row,
        perturb=settings.perturb,
        noise=settings.noise,
        structure=None if settings.structure is None else settings.structure.build(),
        mask=settings.mask,
        curvature=settings.curvature,
        perturbation_momentum=settings.perturbation_momentum,
        jacobian=settings.jacobian,
        anchor=settings.anchor,
        arms=settings.arms,
        projection=settings.projection,
        conservative=settings.conservative,
        rounding=settings.rounding,
        seed=settings.seed,
        max_skipped=settings.max_skipped,
        self_check=settings.self_check,
        compile=settings.compile,
    )


def run_training(config: Config, ranks: Engine) -> dict[str, Any]:
    """A whole run, or what is left of it; returns its result, the same on every rank.

    Every rank must call it. Writes to `train.output`: config.yaml, metrics.jsonl, trajectory.zo,
    tensorboard/, best/, last/, run.png, result.json. If an earlier process left its log there, its steps
    are replayed and the run goes on after them. `seconds` in the result is the wall clock from the first
    step to the last, with the evaluations and saves between them; without loading, compiling and the
    start-up check, and without the test before and after. Raises Interrupted after SIGTERM or
    SIGINT, before the next step, save or evaluation.
    """
    prepared = prepare(config, ranks)
    with sole_use(Path(config.train.output), ranks), StopRequests(config, ranks) as stop:
        return _run(config, ranks, prepared, stop)


def _run(config: Config, ranks: Engine, prepared: Prepared, stop: StopRequests) -> dict[str, Any]:
    earlier = find_earlier(config, prepared.data.train, ranks)
    optimizer = build_optimizer(config, prepared.model)
    engine, data, output = optimizer.engine, prepared.data, Path(config.train.output)
    done = earlier.steps if earlier else 0
    with ExitStack() as stack:
        opened = go_on(earlier, optimizer, config) if earlier else begin(config, optimizer, data)
        append = stack.enter_context(opened)
        with engine.jointly():
            run_log = RunLog(
                output,
                rank=engine.rank,
                steps=config.train.steps,
                tensorboard=config.train.tensorboard,
                done=done,
                events=earlier.events if earlier else (),
            )
            stack.enter_context(run_log)
            run_log.write_start(
                done,
                engine=engine.name,
                ranks=engine.num_ranks,
                torn_bytes=earlier.reader.torn if earlier else 0,
                lost_steps=earlier.lost_steps if earlier else 0,
                rows_truncated=data.truncated,
                arms=[arm.name for arm in optimizer.arms],
                arm_sizes=[arm.numel for arm in optimizer.arms],
                trained_parameters=sum(p.numel for p in optimizer.params),
            )
        stop.heed(done)
        if earlier:
            (first,) = (event for event in earlier.evals("test") if event["step"] == 0)
            before = score_of(first, data.task)
        else:
            before = score(config, engine, data, data.test)
            with engine.jointly():
                run_log.write_score("test", before, len(data.test), 0, 0.0)
            stop.heed(0)
        log.info("before training, test: %s", before)
        seconds = Loop(config, optimizer, data, prepared.tokenizer, run_log, append, stop, earlier).run()
        steps = optimizer.step_count
        if config.train.save_last:
            stop.heed(steps)
            save_model(engine, output / "last", prepared.tokenizer)
        stop.heed(steps)
        after = score(config, engine, data, data.test)
        with engine.jointly():
            run_log.write_score("test", after, len(data.test), steps, seconds)
            run_log.write_stop("finished")
            run_log.close()
        log.info("after training, test: %s", after)
    result: dict[str, Any] = {}
    for name in before.metrics:
        result.update({f"{name}_before": before.metrics[name], f"{name}_after": after.metrics[name]})
    result.update(loss_before=before.loss, loss_after=after.loss, steps=steps, seconds=round(seconds, 2))
    result.update(engine=engine.name, ranks=engine.num_ranks)
    with engine.jointly():
        if engine.rank == 0:
            write_whole(output / "result.json", f"{json.dumps(result)}\n".encode())
            log.info("picture: %s", draw_run(output))
    return result


def run_evaluation(config: Config, ranks: Engine) -> dict[str, Any]:
    """The metrics and loss of `model.source` on the test split. Every rank must call it."""
    prepared = prepare(config, ranks)
    engine, data = select(prepared.model), prepared.data
    result = score(config, engine, data, data.test)
    return {**result.metrics, "loss": result.loss, "rows": len(data.test)} | {
        "engine": engine.name,
        "ranks": engine.num_ranks,
    }


def run_replay(
    config: Config, log: Path, out: Path, steps: int | None, ranks: Engine, *, from_snapshot: bool = False
) -> dict[str, Any]:
    """Replay on the model that the config names and save the result to the folder `out`.

    `from_snapshot`: only the steps after the newest snapshot beside the log that is not too new. Every rank
    must call it. Returns what it did, the same on every rank but for the clock.
    """
    out = require_replaceable(out)
    if out.resolve() == Path(config.model.source).expanduser().resolve():
        raise ValueError(f"{out} is the model to begin with, which would be replaced: name another folder")
    ranks.require_equal("the config", config.flat())
    snapshot: Path | None = None
    if from_snapshot:
        with ranks.jointly():
            logged = sum(1 for _ in TrajectoryReader(log))
            snapshot = last_snapshot(log.parent, logged if steps is None else steps)
        ranks.require_equal("the run's folder", {"snapshot": snapshot})
    tokenizer, hf_config = fetched(lambda: load_tokenizer(config.model))
    model = load_model(config, hf_config, ranks.device, ranks.rank, ranks.num_ranks)
    # The same bits, sooner.
    fast = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, compile=True))
    optimizer = build_optimizer(fast, model)
    start = time.perf_counter()
    done = replay(optimizer, log, steps, snapshot)
    seconds = time.perf_counter() - start
    save_model(optimizer.engine, out, tokenizer)
    result: dict[str, Any] = {"steps": done, "seconds": round(seconds, 2), "model": str(out)}
    if snapshot is None:
        result["steps_per_second"] = round(done / seconds, 2)
    else:
        result["snapshot"] = str(snapshot)
    return result | {"engine": optimizer.engine.name, "ranks": optimizer.engine.num_ranks}


def run_learning(config: Config, learning: Learning, out: Path, ranks: Engine) -> dict[str, Any]:
    """Learn a scale on the config's model and training rows, in float32, and write it to `out`."""
    require_one_process(ranks)
    model = dataclasses.replace(config.model, dtype="float32")
    whole = dataclasses.replace(config.train, micro_rows=None, objective="loss")
    config = dataclasses.replace(config, model=model, engine=EngineConfig(), train=whole)
    prepared = prepare(config, ranks)
    engine = select(prepared.model)
    params = trainable_params(engine.module, engine.shape_of)
    batches = build_batches(config, prepared.data, engine)
    start = time.perf_counter()
    nets = learn_scale(
        engine,
        params,
        lambda step: batches[step][0],
        len(prepared.data.train) // config.train.rows,
        ROW_LOSSES[prepared.data.task.loss],
        learning,
        config.optimizer.eps,
        config.optimizer.seed,
    )
    told = {"model": config.model.source, "data": config.data.source, **dataclasses.asdict(learning)}
    save_nets(out, nets, params, learning.tokens, told)
    return {"scale": str(out), "blocks": len(params), "seconds": round(time.perf_counter() - start, 2)}
