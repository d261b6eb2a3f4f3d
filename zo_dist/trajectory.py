"""The log of a run: enough to rebuild its weights from the starting ones, without data or forwards.

One record per step, some 20 to 40 bytes per direction (docs/trajectory.md has the format): the learning
rate, and for each direction its slope, its coefficient, and the arms it drew with their weights. Records are
only ever appended, and every byte is under a checksum. A last record that was cut short, as a process
that was killed leaves it, is dropped; anything else that does not fit is an error.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import google_crc32c
import torch

from zo_dist.files import append_whole, naming, write_whole
from zo_dist.samplers import Draw

MAGIC, VERSION = b"zo_dist\n", 6

_U32, _STEP, _LOSSES = struct.Struct("<I"), struct.Struct("<QdHB"), struct.Struct("<dd")
_DIRECTION, _CURVATURE = struct.Struct("<dfB"), struct.Struct("<ff")
# Of the byte that says how a direction's weights are written: how many are listed, and as float32.
_MOST_LISTED, _WIDE = 127, 128
# A length is believed only with its checksum: one that points past the end of the file would else
# pass for a record that was cut short.
_PREFIX = struct.Struct("<II")

log = logging.getLogger(__name__)


class TrajectoryError(ValueError):
    """A log that is damaged, or that does not belong to what it is used with."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step wrote: `weight += rule(sum over directions of scale * z)`.

    For each direction: `slopes` (loss per parameter unit), `coefs`, what counts of them in the update, in
    float32, `arms` that it drew, and for each of these its `weights` in the update, as a float16 can hold
    them (or, if they leave its range, a float32). `losses`: the mean loss of either side of the
    slope. `curvatures`: of each direction its curvature and the weight of its rows, in float32; empty unless
    H is learnt from them (`Curvature`). `gradient`, `changes`: of the loss by the outputs of a `Composite`,
    and of each direction what each of them changed by along it, per length, times its share of the rows; in
    float32, empty unless a `Jacobian` keeps them. All are empty if the step was skipped.
    """

    step: int
    lr: float
    slopes: tuple[float, ...] = ()
    arms: tuple[tuple[int, ...], ...] = ()
    coefs: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    losses: tuple[float, ...] = ()
    curvatures: tuple[tuple[float, float], ...] = ()
    gradient: tuple[float, ...] = ()
    changes: tuple[tuple[float, ...], ...] = ()

    @staticmethod
    def of(
        step: int,
        lr: float,
        draws: Sequence[Draw],
        slopes: Sequence[float],
        coefs: Sequence[float],
        losses: Sequence[float],
        curvatures: Sequence[tuple[float, float]] = (),
        gradient: Sequence[float] = (),
        changes: Sequence[Sequence[float]] = (),
    ) -> StepRecord:
        """The record of a step; `coefs` are the slopes times each direction's share of the rows."""
        arms, weights = tuple(draw.arms for draw in draws), tuple(_short(draw.weights) for draw in draws)
        bends = ((c, w) for c, w in torch.tensor(curvatures, dtype=torch.float32).tolist())
        told = _float32(gradient), tuple(_float32(of_direction) for of_direction in changes)
        return StepRecord(
            step, lr, tuple(slopes), arms, _float32(coefs), weights, tuple(losses), tuple(bends), *told
        )

    @property
    def scales(self) -> tuple[tuple[float, ...], ...]:
        """For each direction and arm that it drew, coefficient times weight, rounded to float32."""
        pairs = zip(self.coefs, self.weights, strict=True)
        return tuple(_float32([coef * weight for weight in weights]) for coef, weights in pairs)

    @property
    def finite(self) -> bool:
        """Is every number fit to be written to weights?"""
        told = self.slopes, *self.scales, *self.curvatures, self.gradient, *self.changes
        return all(map(math.isfinite, itertools.chain(*told)))

    @property
    def terms(self) -> dict[int, list[tuple[int, float]]]:
        """For each arm that was drawn, `(direction, scale)` in the order of directions."""
        terms: dict[int, list[tuple[int, float]]] = {}
        for direction, (arms, scales) in enumerate(zip(self.arms, self.scales, strict=True)):
            for arm, scale in zip(arms, scales, strict=True):
                terms.setdefault(arm, []).append((direction, scale))
        return terms

    @property
    def state(self) -> dict[str, Any]:
        """What its terms are made of, for JSON; `of_state` has them again."""
        nested = {"arms": self.arms, "weights": self.weights}
        nested |= {"changes": self.changes} if self.changes else {}
        kept = {key: [list(of) for of in of_directions] for key, of_directions in nested.items()}
        return {"step": self.step, "coefs": list(self.coefs), **kept}

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> StepRecord:
        """A record of these terms alone."""
        arms, weights, changes = (
            tuple(tuple(of) for of in state.get(key, ())) for key in ("arms", "weights", "changes")
        )
        coefs = tuple(state["coefs"])
        return StepRecord(state["step"], 0.0, arms=arms, coefs=coefs, weights=weights, changes=changes)

    def pack(self, num_arms: int) -> bytes:
        """The record as bytes; `num_arms` is that of the run."""
        parts = [_STEP.pack(self.step, self.lr, len(self.slopes), len(self.gradient))]
        parts += [_LOSSES.pack(*self.losses)] if self.slopes else []
        of_directions = zip(self.slopes, self.coefs, self.arms, self.weights, strict=True)
        for slope, coef, arms, weights in of_directions:
            mask = sum(1 << arm for arm in arms).to_bytes(-(-num_arms // 8), "little")
            form, body = _pack_weights(weights)
            parts += [_DIRECTION.pack(slope, coef, form), mask, body]
        parts += [_CURVATURE.pack(*pair) for pair in self.curvatures]
        outputs = list(itertools.chain(self.gradient, *self.changes))
        return b"".join([*parts, struct.pack(f"<{len(outputs)}f", *outputs)])

    @staticmethod
    def unpack(data: bytes, num_arms: int) -> StepRecord:
        """What `pack` packed. struct.error, ValueError or IndexError if it is none."""
        step, lr, count, num_outputs = _STEP.unpack_from(data)
        at, width = _STEP.size, -(-num_arms // 8)
        slopes, coefs, drawn, weighed = [], [], [], []
        losses = _LOSSES.unpack_from(data, at) if count else ()
        at += _LOSSES.size if count else 0
        for _ in range(count):
            slope, coef, form = _DIRECTION.unpack_from(data, at)
            at += _DIRECTION.size
            mask = int.from_bytes(data[at : at + width], "little")
            arms = tuple(arm for arm in range(num_arms) if mask >> arm & 1)
            weights, at = _unpack_weights(data, at + width, form, len(arms))
            slopes.append(slope)
            coefs.append(coef)
            drawn.append(arms)
            weighed.append(weights)
        # All else says how long it is, so that what is between is curvatures or nothing.
        end = len(data) - 4 * num_outputs * (1 + count)
        if end < at:
            raise ValueError(f"{at - end} bytes too few")
        curvatures = tuple(_CURVATURE.iter_unpack(data[at:end]))
        if len(curvatures) not in (0, count):
            raise ValueError(f"{end - at} bytes too many")
        outputs = (
            [tuple(of) for of in struct.iter_unpack(f"<{num_outputs}f", data[end:])] if num_outputs else []
        )
        of_directions = tuple(slopes), tuple(drawn), tuple(coefs), tuple(weighed)
        told = outputs[0] if outputs else (), tuple(outputs[1:])
        return StepRecord(step, lr, *of_directions, losses, curvatures, *told)


class TrajectoryReader:
    """Streams a log: `header`, then one `StepRecord` after another by iteration.

    Raises TrajectoryError, with the offset in bytes, where the file is damaged, and where a step is
    missing. `steps`, `end`: how many were read, and up to where the file was found whole. `torn`: bytes of a
    last record that was cut short, known when iteration has come to the end (`finished`). Memory: one record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.steps, self.torn, self.finished = 0, 0, False
        with self._opened() as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise TrajectoryError(f"{self.path} is not the trajectory of a run: it begins otherwise")
            self.end = len(MAGIC)
            data = self._next(file)
            if data is None:
                raise TrajectoryError(f"{self.path} is cut short in its header")
        self.header: dict[str, Any] = json.loads(data)
        if self.header.get("version") != VERSION:
            raise TrajectoryError(
                f"{self.path} has version {self.header.get('version')} of the format; this zo_dist reads "
                f"version {VERSION}"
            )
        self._start = self.end

    def __iter__(self) -> Iterator[StepRecord]:
        self.steps, self.end, self.torn, self.finished = 0, self._start, 0, False
        num_arms = len(self.header["arms"])
        with self._opened() as file:
            file.seek(self.end)
            while True:
                at = self.end
                data = self._next(file)
                if data is None:
                    break
                try:
                    record = StepRecord.unpack(data, num_arms)
                except (struct.error, ValueError, IndexError) as error:
                    raise self._damaged(at, str(error)) from error
                if record.step != self.steps:
                    raise self._damaged(at, f"step {record.step} follows where step {self.steps} should")
                self.steps += 1
                yield record
        self.finished = True
        if self.torn:
            log.warning(
                "%s: the last record was cut short; its %d bytes at offset %d are left out",
                *(self.path, self.torn, self.end),
            )

    def _next(self, file: BinaryIO) -> bytes | None:
        """The next checked piece; None at the end of the file, or of what is whole."""
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            self.torn = len(prefix)
            return None
        length, checksum = _PREFIX.unpack(prefix)
        if google_crc32c.value(prefix[:4]) != checksum:
            raise self._damaged(self.end, "the length of the record does not fit its checksum")
        body = file.read(length + _U32.size)
        if len(body) < length + _U32.size:
            self.torn = len(prefix) + len(body)
            return None
        data = body[:length]
        if google_crc32c.value(data) != _U32.unpack(body[length:])[0]:
            raise self._damaged(self.end, "the record does not fit its checksum")
        self.end += len(prefix) + len(body)
        return data

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise TrajectoryError(f"the trajectory {self.path} cannot be read: {error.strerror}") from error

    def _damaged(self, offset: int, reason: str) -> TrajectoryError:
        return TrajectoryError(
            f"{self.path} is damaged at offset {offset}: {reason}. The steps before that are whole; take "
            "the file from a copy"
        )


class TrajectoryWriter:
    """Appends to a log; on rank 0 alone. Close it, or use it in a `with`.

    A new file replaces `path` by a rename once its header is on disk. `sync_every`: after so many
    records the file system is made to write them to the disk (`fsync`), which protects from a failing
    machine; a killed process loses nothing that `append` returned from. 0 leaves that to the system.
    Raises OSError where the disk does not take what is written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, sync_every: int = 1) -> None:
        path = Path(path)
        write_whole(path, MAGIC + _framed(json.dumps({"version": VERSION, **header}).encode()))
        self._continue(path, len(header["arms"]), 0, sync_every)

    @classmethod
    def resume(cls, reader: TrajectoryReader, *, sync_every: int = 1) -> TrajectoryWriter:
        """Append to a log that was read to its end; a record that was cut short there is taken away.

        ValueError if the reader has not come to the end: what it has not read would be lost.
        """
        if not reader.finished:
            raise ValueError(f"{reader.path} has to be read to its end before it is continued")
        os.truncate(reader.path, reader.end)
        writer = cls.__new__(cls)
        writer._continue(reader.path, len(reader.header["arms"]), reader.steps, sync_every)
        return writer

    def _continue(self, path: Path, num_arms: int, steps: int, sync_every: int) -> None:
        self.path, self._num_arms, self._steps = path, num_arms, steps
        self._sync_every, self._unsynced = sync_every, 0
        # Unbuffered: a record is one write, and is with the system when `append` returns.
        self._file = FileIO(path, "ab")

    def append(self, record: StepRecord) -> None:
        """Add one step. If that fails in the middle, what was written of it is taken back.

        ValueError if it is not the step after the last one in the log.
        """
        if record.step != self._steps:
            raise ValueError(f"{self.path} has {self._steps} steps; step {record.step} cannot follow them")
        append_whole(self._file, _framed(record.pack(self._num_arms)))
        self._steps += 1
        self._unsynced += 1
        if self._sync_every and self._unsynced >= self._sync_every:
            with naming(self.path):
                os.fsync(self._file.fileno())
            self._unsynced = 0

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _float32(numbers: Sequence[float]) -> tuple[float, ...]:
    return tuple(torch.tensor(numbers, dtype=torch.float32).tolist())


def _short(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights with the 11 bits of a float16; with those of a float32 if one leaves its range."""
    exact = torch.tensor(weights, dtype=torch.float32)
    least, most = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max
    fits = bool(((exact >= least) & (exact <= most)).all())
    return tuple((exact.to(torch.float16) if fits else exact).tolist())


def _pack_weights(weights: Sequence[float]) -> tuple[int, bytes]:
    """How they are written, and the bytes: `_unpack_weights` reads them."""
    exact = torch.tensor(weights, dtype=torch.float32)
    wide = not torch.equal(exact.to(torch.float16).to(torch.float32), exact)
    packed = [struct.pack("<f" if wide else "<e", weight) for weight in weights]
    # Samplers that do not weigh arms give all the same, and one that clips weights gives many it.
    distinct = list(dict.fromkeys(packed))
    whole, body = b"".join(packed), b"".join(distinct) + _pack_indices([distinct.index(w) for w in packed])
    if len(distinct) > _MOST_LISTED or len(body) >= len(whole):
        distinct, body = [], whole
    return len(distinct) | (_WIDE if wide else 0), body


def _unpack_weights(data: bytes, at: int, form: int, count: int) -> tuple[tuple[float, ...], int]:
    """The weights of so many arms, which begin at `at`, and where they end."""
    listed, kind = form & _MOST_LISTED, "f" if form & _WIDE else "e"
    stored = struct.unpack_from(f"<{listed or count}{kind}", data, at)
    at += struct.calcsize(f"<{len(stored)}{kind}")
    if not listed:
        return stored, at
    bits = _index_bits(listed)
    size = -(-count * bits // 8)
    indices = int.from_bytes(data[at : at + size], "little")
    return tuple(stored[indices >> i * bits & (1 << bits) - 1] for i in range(count)), at + size


def _index_bits(num_listed: int) -> int:
    return (num_listed - 1).bit_length()


def _pack_indices(indices: list[int]) -> bytes:
    """Each in as few bits as the largest of them needs, the first in the lowest."""
    bits = _index_bits(max(indices, default=0) + 1)
    packed = sum(index << i * bits for i, index in enumerate(indices))
    return packed.to_bytes(-(-len(indices) * bits // 8), "little")


def _framed(data: bytes) -> bytes:
    length = _U32.pack(len(data))
    return length + _U32.pack(google_crc32c.value(length)) + data + _U32.pack(google_crc32c.value(data))
