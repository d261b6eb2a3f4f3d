"""The trained weights and the state of a run at one step, so that a resume replays the log from there only.

A folder of one safetensors file per rank, with the spans that rank holds by canonical name and offset,
and a manifest with a checksum of each file and of itself. Any number of ranks on any engine reads what any
other wrote. Frozen weights and buffers are the base model's and are not in it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zo_dist.files import fault_of, read_checked, sync_and_check, write_checked
from zo_dist.optimizer import ZeroOrder
from zo_dist.params import Param, Runs, Span, runs_of

_MANIFEST = "manifest.json"


class SnapshotError(ValueError):
    """A snapshot that is damaged or incomplete; the message names the file and what to do."""


def save_snapshot(optimizer: ZeroOrder, folder: str | Path, keep: int | None = None) -> Path:
    """Write `folder/step-N`, N being the steps taken; returns it. Every rank must call it and see the folder.

    Each piece of a weight is written by the first rank that holds it. The snapshot appears, complete, by a
    rename; `keep`: so many are left, the newest. Raises on every rank if a write fails, which leaves
    those that were there. Cost: the trained weights copied, written once, and read once for the checksums.
    """
    return PendingSnapshot(optimizer, folder, keep).finish()


class PendingSnapshot:
    """What `save_snapshot` does, in two parts: between them a thread writes while the weights may change.

    Every rank must make it, and later call `finish`; one at a time. Until its file is `written`, a rank
    holds a copy in CPU memory of what it writes: its trained weights, and what is kept beside them. Where
    that is in CPU memory already, and its copy would take more than half of what is free there, on any rank,
    no rank `copies`, and the files are written before the object is made.
    """

    def __init__(self, optimizer: ZeroOrder, folder: str | Path, keep: int | None = None) -> None:
        engine = self._engine = optimizer.engine
        self._folder, self._keep = Path(folder), keep
        self._final = self._folder / f"step-{optimizer.step_count:08}"
        self._partial = self._folder / f".{self._final.name}.partial"
        digest, holders = weights_digest(optimizer, optimizer.params), engine.holders(optimizer.params)
        with engine.jointly():
            if engine.rank == 0:
                remove_unfinished(self._folder)
                self._partial.mkdir(parents=True)
        self._manifest = {
            "step": optimizer.step_count,
            "weights": digest,
            "record": _tie(optimizer),
            "scalars": optimizer.scalars,
        }
        self._file: tuple[int, int] = (0, 0)
        self._error: OSError | None = None
        with engine.jointly():
            first = {
                span.name: min(rank for rank, offset, _ in holders[span.name] if offset == span.offset)
                for span in engine.spans(optimizer.params)
            }
            tensors = {
                _key(kind, piece): piece.lasting().detach()
                for kind, piece in _pieces(optimizer)
                if first[piece.name] == engine.rank
            }
        self.copies = bool(engine.exchange([float(_may_copy(list(tensors.values())))]).all())
        with engine.jointly():
            if self.copies:
                tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
            self._thread = threading.Thread(target=self._write, args=(tensors,), name="snapshot")
            self._thread.start()
            if not self.copies:
                self.wait()

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self._partial / _file_of(self._engine.rank)
        try:
            save_file(tensors, path)
            self._file = sync_and_check(path)
        except Exception as error:
            # Of safetensors they are no OSErrors and name no file.
            self._error = OSError(f"{path} cannot be written: {error}")

    @property
    def written(self) -> bool:
        """Is the file of this rank on the disk, or cannot be?"""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is `written`. No collective."""
        self._thread.join()

    def finish(self) -> Path:
        """Wait for every rank's file and let the snapshot appear; returns it. Raises as `save_snapshot`."""
        self.wait()
        engine = self._engine
        with engine.jointly():
            if self._error is not None:
                raise self._error
        files = engine.exchange([float(x) for x in self._file]).to(torch.int64).tolist()
        with engine.jointly():
            if engine.rank == 0:
                named = {_file_of(rank): file for rank, file in enumerate(files)}
                write_checked(self._partial / _MANIFEST, {**self._manifest, "files": named})
                remove_snapshot(self._final)
                self._partial.replace(self._final)
                for old in snapshots_in(self._folder)[: -self._keep] if self._keep else []:
                    remove_snapshot(old)
        return self._final


def load_snapshot(optimizer: ZeroOrder, path: str | Path) -> None:
    """Bring weights and all state to those of the snapshot at `path`.

    Every rank must call it and see the folder; each reads the pieces that it holds. Raises ValueError on
    every rank (SnapshotError on the one that finds it), before any weight is written, if a byte of the
    snapshot is not what was written or a piece is missing; after it, if the files can no longer be read or
    the weights are not those saved. Memory: no more than a piece.
    """
    engine, path = optimizer.engine, Path(path)
    with engine.jointly():
        manifest = read_manifest(path)
        # Each file is read once for its checksum, by one of the ranks.
        for i, (name, expected) in enumerate(manifest["files"].items()):
            if i % engine.num_ranks == engine.rank:
                check_file(path / name, expected)
    with engine.jointly():
        optimizer.require_parts(manifest["scalars"])
        index = _index(path, manifest)
        found = [(piece, _parts(path, index, kind, piece)) for kind, piece in _pieces(optimizer)]
    with engine.jointly():
        for span, parts in found:
            for (file, key), some in itertools.groupby(sorted(parts, key=_source), key=_source):
                # One piece at a time: all of them are as much as the weights.
                with safe_open(path / file, "pt") as opened:
                    saved = opened.get_slice(key)
                    for here, _, _, there in some:
                        span.flat[here].copy_(saved[there])
    engine.publish()
    optimizer.scalars = manifest["scalars"]
    optimizer.tie = manifest["step"], manifest["record"]
    if weights_digest(optimizer, optimizer.params) != manifest["weights"]:
        raise SnapshotError(f"the weights read from {path} are not those that were saved; {_remedy(path)}")


def _tie(optimizer: ZeroOrder) -> int | None:
    """The checksum of the last step's record, by which a log knows a snapshot of its own."""
    step, loaded = optimizer.tie
    if step == optimizer.step_count:
        return loaded
    if optimizer.record.step + 1 != optimizer.step_count:
        # Of a state that `load_state_dict` brought: no log has it.
        return None
    return int(google_crc32c.value(optimizer.record.pack(len(optimizer.arms))))


def weights_digest(optimizer: ZeroOrder, params: Sequence[Param]) -> str:
    """What tells these weights from any others, on any engine. A collective; one pass over them."""
    prints = sorted(optimizer.engine.fingerprints(params).items())
    return hashlib.sha256(repr(prints).encode()).hexdigest()


def remove_snapshot(path: Path) -> None:
    """Delete a snapshot, if it is there, so that at no moment half of it seems to be one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.removed")
        path.replace(hidden)
        shutil.rmtree(hidden)


def remove_unfinished(folder: Path) -> None:
    """Delete what an earlier process was killed over: a snapshot half written, or half removed."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)


def snapshots_in(folder: Path) -> list[Path]:
    """The complete snapshots of a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_MANIFEST}"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the snapshot at `path`. SnapshotError if it is damaged."""
    try:
        return read_checked(path / _MANIFEST)
    except OSError as error:
        raise SnapshotError(f"{path} is no snapshot: {error.strerror}") from error
    except ValueError as error:
        raise SnapshotError(f"{error}; {_remedy(path)}") from error


def check_file(path: Path, expected: list[int]) -> None:
    """SnapshotError if a file of a snapshot is missing or has other bytes than the manifest says."""
    fault = fault_of(path, expected)
    if fault:
        raise SnapshotError(f"{path} {fault}; {_remedy(path.parent)}")


def _may_copy(tensors: Sequence[torch.Tensor]) -> bool:
    """Must they be copied, or is there plenty of room for it?"""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return True
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = int(psutil.virtual_memory().available)
    return sum(tensor.nbytes for tensor in tensors) * ranks <= free // 2


def _remedy(path: Path) -> str:
    return f"delete {path}: a run goes on from the snapshot before it, or from its base model, by its log"


def _file_of(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def _key(kind: str, span: Span) -> str:
    """Of a piece that is several runs, their width and stride go with the offset."""
    return f"{kind}/{'+'.join(map(str, (span.offset, *(span.runs or ()))))}/{span.name}"


def _pieces(optimizer: ZeroOrder) -> list[tuple[str, Span]]:
    """What this rank holds: its weights, and what is kept beside them, by what it is."""
    spans = optimizer.engine.spans(optimizer.params)
    places = {span.name: (span.offset, span.runs) for span in spans}
    pieces = [("weight", span) for span in spans]
    for kind, of in optimizer.beside.items():
        # A rule may keep what has another shape than the weight.
        of_kind = optimizer.rule.places if kind in optimizer.rule.kept else places
        pieces += [(kind, Span(name, tensor, *of_kind[name])) for name, tensor in of.items()]
    return pieces


class _Saved(NamedTuple):
    """A piece in a file, under a key."""

    offset: int
    length: int
    runs: Runs | None
    file: str
    key: str


Index = dict[tuple[str, str], list[_Saved]]


def _index(path: Path, manifest: dict[str, Any]) -> Index:
    """By kind and name of a weight, its pieces."""
    index: Index = {}
    for file in manifest["files"]:
        with safe_open(path / file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                kind, place, name = key.split("/", 2)
                (length,) = opened.get_slice(key).get_shape()
                offset, *runs = map(int, place.split("+"))
                saved = _Saved(offset, length, Runs(*runs) if runs else None, file, key)
                index.setdefault((kind, name), []).append(saved)
    return index


def _parts(path: Path, index: Index, kind: str, span: Span) -> list[tuple[slice, str, str, slice]]:
    """Where the elements of a span are: which, file, key, and which of that. SnapshotError if not all are."""
    saved = sorted(
        (number, number + there.stop - there.start, piece.file, piece.key, there.start)
        for piece in index.get((kind, span.name), [])
        for number, there in runs_of(piece.offset, piece.length, piece.runs)
    )
    parts, first = [], 0
    for number, here in runs_of(span.offset, span.numel, span.runs):
        filled, length = 0, here.stop - here.start
        # Runs follow each other; what lies before this one is not looked at again.
        while first < len(saved) and saved[first][1] <= number:
            first += 1
        # Pieces of what has a number for each row of a weight overlap, where ranks share a row of it.
        for i in range(first, len(saved)):
            begin, end, file, key, at = saved[i]
            start, stop = number + filled, min(end, number + length)
            if begin > start or filled == length:
                break
            if start < stop:
                place = slice(here.start + filled, here.start + stop - number)
                parts.append((place, file, key, slice(at + start - begin, at + stop - begin)))
                filled = stop - number
        if filled != length:
            raise SnapshotError(
                f"{path} has {filled} of {length} elements of {kind} {span.name} from {number} on; it "
                "is of other parameters or another rounding mode"
            )
    return parts


def _source(part: tuple[slice, str, str, slice]) -> tuple[str, str]:
    return part[1], part[2]
