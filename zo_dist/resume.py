"""How a run goes on from what an earlier process left in its folder: the log, and the metrics up to it."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO

import zo_dist
from zo_dist.checkpoint import CHECKSUMS, check_model
from zo_dist.config import Config, flatten
from zo_dist.data import RunData
from zo_dist.engines import Engine
from zo_dist.files import naming, write_whole
from zo_dist.optimizer import ZeroOrder
from zo_dist.replay import identity, replay
from zo_dist.runlog import METRICS, read_metrics
from zo_dist.snapshot import check_file, read_manifest, remove_snapshot, remove_unfinished, snapshots_in
from zo_dist.tasks import EncodedRow
from zo_dist.trajectory import StepRecord, TrajectoryReader, TrajectoryWriter

log = logging.getLogger(__name__)

LOG, SNAPSHOTS, _LOCK = "trajectory.zo", "snapshots", ".lock"
MODELS, REPORT = ("best", "last"), "report"

Append = Callable[[StepRecord], None]

# Settings that a run may go on with others of: they change no step, or only those to come.
_MAY_CHANGE = (
    *("engine.", "model.source", "model.trust_remote_code", "optimizer.compile", "optimizer.self_check"),
    *("optimizer.max_skipped", "optimizer.perturb", "optimizer.scale.path", "train.steps"),
    *("train.max_seconds", "train.output", "train.existing", "train.micro_rows"),
    *("train.eval_", "train.save_", "train.log_every"),
    *("train.tensorboard", "train.sync_every", "train.snapshot_every", "train.keep_snapshots"),
    "train.verify_every",
)


class Interrupted(RuntimeError):
    """A run that was told to stop, and did so after a whole step. `signal`: by which signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier process did of this run.

    Its log, read to the end; how many steps are in it, their metrics, and the last snapshot among them.
    `lost_steps`: later ones that the metrics know and the log does not, as after a machine failed.
    """

    reader: TrajectoryReader
    steps: int
    events: list[dict[str, Any]]
    snapshot: Path | None
    lost_steps: int

    @property
    def seconds(self) -> float:
        """Training time until the last step that the metrics know."""
        return max((e["seconds"] for e in self.events if e["event"] == "step"), default=0.0)

    def evals(self, split: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "eval" and e["split"] == split]


@contextmanager
def sole_use(output: Path, ranks: Engine) -> Iterator[None]:
    """Make the run's folder; inside, no other run can use it. Every rank must enter.

    ValueError on every rank if another run does. The lock is rank 0's and ends with its process, however
    that ends; where the file system has no locks, a warning says so.
    """
    with ExitStack() as stack:
        with ranks.jointly():
            if ranks.rank == 0:
                output.mkdir(parents=True, exist_ok=True)
                # It stays: a lock on a file that another process deletes is no lock.
                _lock(stack.enter_context((output / _LOCK).open("a+b")), output)
        yield


def _lock(file: BinaryIO, output: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace") or "of a process that does not say which"
        raise ValueError(
            f"another run, {holder}, is using train.output={output}: wait until it ends, or set train.output "
            "to another folder"
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): let no other run use it", output, error.strerror)
    else:
        with naming(output / _LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()


def find_earlier(config: Config, rows: Sequence[EncodedRow], ranks: Engine) -> Earlier | None:
    """The steps that the folder `train.output` holds of this run; None where there are none.

    Every rank must call it and see the folder. ValueError on every rank where the folder holds another
    run, or a log that is damaged.
    """
    earlier: Earlier | None = None
    # A launcher that starts a run again after a failure means the run that it started. Each node counts its
    # own failures alone.
    restarts = float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    restarted = bool(ranks.exchange([restarts]).any())
    with ranks.jointly():
        path = Path(config.train.output) / LOG
        if (config.train.existing == "resume" or restarted) and path.exists():
            reader = TrajectoryReader(path)
            steps = sum(1 for _ in reader)
            if steps:
                _require_same_run(config, rows, reader)
                events = read_metrics(path.parent)
                # No record of a step is written before its place in the log.
                known = [e for e in events if e.get("step", 0) <= steps]
                # The test after training, of a process that thought it was at the end.
                known = [e for e in known if e["event"] != "eval" or e["step"] == 0 or e["split"] != "test"]
                if not any(e["event"] == "eval" and e["step"] == 0 for e in known):
                    raise ValueError(f"{path.parent / METRICS} lacks the start of the run; {_REMEDY}")
                lost = max((e.get("step", 0) for e in events), default=0) - steps
                snapshot = last_snapshot(path.parent, steps)
                earlier = Earlier(reader, steps, known, snapshot, max(0, lost))
    seen = (earlier.steps, earlier.snapshot) if earlier else (0, None)
    ranks.require_equal("what train.output holds", {"steps and snapshot": seen})
    return earlier


def last_snapshot(output: Path, steps: int) -> Path | None:
    """The newest snapshot of a run's folder after at most so many steps."""
    # One of a step that is not in the log was made before a machine failed; there is nothing to tie it to.
    known = [path for path in snapshots_in(output / SNAPSHOTS) if read_manifest(path)["step"] <= steps]
    return known[-1] if known else None


_REMEDY = "set train.output to another folder, or train.existing=replace to begin again in this one"


def _require_same_run(config: Config, rows: Sequence[EncodedRow], reader: TrajectoryReader) -> None:
    # As JSON gives it back.
    was, wanted = (
        flatten(reader.header["config"]),
        flatten(json.loads(json.dumps(dataclasses.asdict(config)))),
    )
    keys = [key for key in {**was, **wanted} if not key.startswith(_MAY_CHANGE)]
    differing = [key for key in keys if was.get(key) != wanted.get(key)]
    if differing:
        changes = ", ".join(f"{key} is {wanted.get(key)!r}, was {was.get(key)!r}" for key in differing)
        raise ValueError(f"{reader.path.parent} holds a run of other settings: {changes}; {_REMEDY}")
    if reader.header.get("data") != digest_of_rows(rows):
        raise ValueError(
            f"{reader.path.parent} holds a run on other training rows than data.source gives now; {_REMEDY}"
        )


def digest_of_rows(rows: Sequence[EncodedRow]) -> str:
    """What tells one list of training rows from another."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode())
    return total.hexdigest()


@contextmanager
def begin(config: Config, optimizer: ZeroOrder, data: RunData) -> Iterator[Append]:
    """A new log in the run's folder, and what appends to it, on rank 0. Every rank must enter."""
    header = {**identity(optimizer), "config": dataclasses.asdict(config)}
    header.update(data=digest_of_rows(data.train), zo_dist=zo_dist.__version__)

    def create() -> TrajectoryWriter:
        output = Path(config.train.output)
        if (output / LOG).exists():
            # Of a run that is replaced: nothing of it is to be taken for the new one's.
            for folder in (SNAPSHOTS, *MODELS, "tensorboard", REPORT):
                shutil.rmtree(output / folder, ignore_errors=True)
            for file in ("result.json", "run.png"):
                (output / file).unlink(missing_ok=True)
        _write_config(config)
        return TrajectoryWriter(output / LOG, header, sync_every=config.train.sync_every)

    with _appending(optimizer.engine, create) as append:
        yield append


@contextmanager
def go_on(earlier: Earlier, optimizer: ZeroOrder, config: Config) -> Iterator[Append]:
    """Weights and state as after the steps of the log, and what appends on rank 0. Every rank must enter."""
    path = earlier.reader.path
    log.info("%s holds %d steps; the run goes on after them", path, earlier.steps)
    start = time.perf_counter()
    replay(optimizer, path, earlier.steps, earlier.snapshot)
    log.info("replayed from %s in %.1f s", earlier.snapshot or "the start", time.perf_counter() - start)

    def reopen() -> TrajectoryWriter:
        remove_unfinished(path.with_name(SNAPSHOTS))
        # Of steps that the log lacks, as after a machine failed: others may follow in their place.
        for snapshot in snapshots_in(path.with_name(SNAPSHOTS)):
            if read_manifest(snapshot)["step"] > earlier.steps:
                remove_snapshot(snapshot)
        _write_config(config)
        return TrajectoryWriter.resume(earlier.reader, sync_every=config.train.sync_every)

    with _appending(optimizer.engine, reopen) as append:
        yield append


def _write_config(config: Config) -> None:
    """The config.yaml of the run's folder, with which the run goes on."""
    going_on = dataclasses.replace(config, train=dataclasses.replace(config.train, existing="resume"))
    write_whole(Path(config.train.output) / "config.yaml", going_on.to_yaml().encode())


@contextmanager
def _appending(engine: Engine, open_log: Callable[[], TrajectoryWriter]) -> Iterator[Append]:
    """What appends a step to the log, on rank 0; on the others it does nothing."""
    with ExitStack() as stack:
        writer: TrajectoryWriter | None = None
        with engine.jointly():
            if engine.rank == 0:
                writer = stack.enter_context(open_log())
        yield writer.append if writer else lambda record: None
        with engine.jointly():
            if writer:
                writer.close()


def check_run(output: Path) -> dict[str, Any]:
    """What a run's folder holds; ValueError, naming the file, if any of it is damaged.

    Reads the log, the metrics, and every byte of the snapshots and the saved models. The folder of a saved
    model alone is read too.
    """
    if (output / CHECKSUMS).exists():
        return {"files": check_model(output)}
    reader = TrajectoryReader(output / LOG)
    steps = sum(1 for _ in reader)
    events = read_metrics(output)
    snapshots = snapshots_in(output / SNAPSHOTS)
    for snapshot in snapshots:
        for name, expected in read_manifest(snapshot)["files"].items():
            check_file(snapshot / name, expected)
    models = [name for name in MODELS if (output / name).exists()]
    for name in models:
        check_model(output / name)
    found: dict[str, Any] = {"steps": steps, "cut_short": reader.torn, "events": len(events)}
    return found | {"snapshots": [path.name for path in snapshots], "models": models}


class StopRequests:
    """SIGTERM and SIGINT: inside a `with` the first of each is noted, and the run ends where it next asks.

    A second one does what it does without this.
    """

    def __init__(self, config: Config, ranks: Engine) -> None:
        self._ranks, self.seen = ranks, 0
        self._how = " with train.existing=resume" if config.train.existing != "resume" else ""

    def __enter__(self) -> StopRequests:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def heed(self, step: int) -> None:
        """End the run here, after `step`, if any rank was sent a signal. A collective."""
        self.end(step, int(self._ranks.exchange([float(self.seen)]).max()))

    def end(self, step: int, number: int) -> None:
        """Raise Interrupted if `number`, the same on every rank, is that of a signal and not 0."""
        if number:
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name} after step {step}; the same command{self._how} goes on after it", number
            )
