"""From the log of a run back to its weights: no data, no forwards, any engine and number of ranks."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import google_crc32c

from zo_dist import noise
from zo_dist.optimizer import ZeroOrder
from zo_dist.params import frozen_params
from zo_dist.snapshot import load_snapshot, read_manifest, weights_digest
from zo_dist.trajectory import TrajectoryError, TrajectoryReader


def identity(optimizer: ZeroOrder) -> dict[str, Any]:
    """What a log belongs to: the settings that shape a write, the parameters, and all weights as they are.

    For JSON. A collective: every rank must call it. Cost: one pass over the weights.
    """
    engine = optimizer.engine
    parameters = [(p.name, tuple(p.shape), str(p.param.dtype)) for p in optimizer.params]
    return {
        "parameters": hashlib.sha256(repr(parameters).encode()).hexdigest(),
        "arms": [arm.name for arm in optimizer.arms],
        "seed": optimizer.noise.seed,
        "noise": f"{optimizer.noise.kind}, version {noise.VERSION}",
        "rounding": optimizer.rounding.mode,
        **{name: [type(part).__name__, part.options] for name, part in optimizer.parts.items()},
        "weights": weights_digest(optimizer, optimizer.params),
        "frozen": weights_digest(optimizer, frozen_params(engine.module, engine.shape_of)),
    }


def replay(
    optimizer: ZeroOrder, log: str | Path, steps: int | None = None, snapshot: str | Path | None = None
) -> int:
    """Bring a fresh optimizer, with the starting weights, to where the log ends; returns the steps.

    Every rank must call it, and reads the log. `steps`: only so many. `snapshot`: one of this run, which
    stands for the steps before it. Raises TrajectoryError on every rank, before any weight is written,
    if the log is damaged, too short, or of another run: other settings, parameters or starting weights.
    Cost: the write of each step, one pass over the weights before, and one reading of the log more, to
    know that it is whole.
    """
    optimizer.warm_up()
    mine = identity(optimizer)
    with optimizer.engine.jointly():
        reader = TrajectoryReader(log)
        _require_same(mine, reader)
        # A snapshot is tied to the log by what its last step wrote.
        manifest = {"step": 0, "record": None} if snapshot is None else read_manifest(Path(snapshot))
        last, tie = 0, None
        for record in itertools.islice(reader, steps):
            last += 1
            if last == manifest["step"]:
                tie = google_crc32c.value(record.pack(len(optimizer.arms)))
        if steps is not None and last < steps:
            raise TrajectoryError(f"{log} has {last} steps; {steps} were asked for")
        if tie != manifest["record"]:
            raise TrajectoryError(f"{snapshot} is not of the first {last} steps of {log}; delete it")
        if optimizer.step_count:
            raise TrajectoryError(
                f"the optimizer has taken {optimizer.step_count} steps; replay needs a new one"
            )
    if snapshot is not None:
        load_snapshot(optimizer, snapshot)
    for record in itertools.islice(reader, optimizer.step_count, last):
        optimizer.replay(record)
    return last


def _require_same(mine: dict[str, Any], reader: TrajectoryReader) -> None:
    header = reader.header
    remedy = {
        "frozen": "the frozen weights are not those that the run had: name its base model",
        "weights": "the weights are not those that the run started from: name its base model",
        "parameters": "the trained parameters have other names, shapes or dtypes",
        "arms": "the model has other layers, or the setting arms is another",
    }
    for key, value in mine.items():
        if header.get(key) != value:
            told = remedy.get(key) or f"{key} is {value!r} here, but was {header.get(key)!r}"
            raise TrajectoryError(f"{reader.path} cannot be replayed on this: {told}")
