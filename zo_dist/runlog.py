"""What a run leaves behind while it goes: metrics.jsonl, TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from zo_dist.evaluate import Score
from zo_dist.files import append_whole, naming, write_whole

METRICS = "metrics.jsonl"


class RunLog:
    """Writes on rank 0; on the others it does nothing. Close it, or use it in a `with`.

    `metrics.jsonl` has one JSON object per line, each with an `event`: `run` once per process (when it began,
    after which step, what it found), `step`, `eval`, and `stop`, which a process that was killed lacks.
    docs/report.md has the keys. A number that is not finite is null. `done`, `events`: the steps that an
    earlier process took, and what it wrote of them; kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        steps: int,
        tensorboard: bool,
        done: int = 0,
        events: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._file: FileIO | None = None
        self._board: Any = None
        # A bar that is not looked at, in a log file, is redrawn seldom.
        seldom = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=steps, initial=done, disable=rank != 0, mininterval=seldom, unit="step", desc="training"
        )
        if rank != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / METRICS, "".join(json.dumps(event) + "\n" for event in events).encode())
        # Unbuffered: what could not be written is not tried again, unasked, when the file is closed.
        self._file = FileIO(folder / METRICS, "ab")
        if tensorboard:
            # Slow to import, and optional.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, event: str, step: int | None = None, **values: Any) -> None:
        """Append one record; numbers go to TensorBoard too, under `event/key`. OSError on a full disk."""
        if self._file is None:
            return
        record = {"event": event, "step": step} if step is not None else {"event": event}
        record.update({key: _finite(value) for key, value in values.items()})
        append_whole(self._file, (json.dumps(record) + "\n").encode())
        if event == "eval":
            # Few, and a run cannot go on without the first.
            with naming(Path(os.fsdecode(self._file.name))):
                os.fsync(self._file.fileno())
        if self._board is not None and step is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{key}", value, step)

    def write_start(self, done: int, **values: Any) -> None:
        """Append a `run`: a process goes on after step `done`."""
        self.write("run", time=_now(), done=done, **values)

    def write_stop(self, reason: str, error: str | None = None) -> None:
        """Append a `stop`: why the process ends, and the class of the exception that ends it."""
        self.write("stop", time=_now(), error=error, reason=reason)

    def write_score(self, split: str, score: Score, rows: int, step: int, seconds: float) -> None:
        """Append an `eval`: the metrics and loss of the first `rows` rows of a split."""
        values = {**score.metrics, "loss": score.loss}
        self.write("eval", step, split=split, rows=rows, seconds=seconds, **values)

    def advance(self, **shown: str) -> None:
        """Move the progress bar by one step and show these beside it."""
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Also a second time. OSError if TensorBoard has records left that the disk does not take."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        board, self._board = self._board, None
        if board is not None:
            board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What ended the run is to be told, and not what becomes of this.
        if kind is not None:
            with suppress(OSError):
                self.write_stop(str(value), kind.__name__)
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's folder; a last line that was cut short is left out.

    Raises ValueError, naming the line, for any other that is not what `RunLog` writes.
    """
    path = folder / METRICS
    # What follows the last line break was not finished.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is damaged: {error}") from error
    return events


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
