"""Files that are whole or say that they are not: appended to whole, and checked by a checksum."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c

_READ = 1 << 24  # bytes at a time, of a file that is checked


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError names `path`, as one of a write by itself does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def append_whole(file: FileIO, data: bytes) -> None:
    """Append to a file. OSError, naming it, if the disk does not take all of it: then it takes nothing."""
    path, start = Path(os.fsdecode(file.name)), os.fstat(file.fileno()).st_size
    with naming(path):
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
        except OSError:
            file.truncate(start)
            raise


def sync_and_check(path: Path) -> tuple[int, int]:
    """Force a file to the disk; returns its size and CRC-32C. Cost: reads it once."""
    with naming(path), path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, _checksum(path)


def fault_of(path: Path, expected: Sequence[int]) -> str:
    """What is wrong with a file of which `sync_and_check` said `expected`; empty if nothing is."""
    if not path.is_file():
        return "is missing"
    size, checksum = expected
    whole = path.stat().st_size == size and _checksum(path) == checksum
    return "" if whole else "is damaged: it has other bytes than were saved"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears, complete and on the disk, by a rename. OSError leaves what was there."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write JSON after a line with its checksum, and force it to the disk."""
    text = json.dumps(content).encode()
    write_whole(path, b"%08x\n" % google_crc32c.value(text) + text)


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote. OSError if it cannot be read, ValueError if it is damaged."""
    checksum, _, text = path.read_bytes().partition(b"\n")
    if checksum != b"%08x" % google_crc32c.value(text):
        raise ValueError(f"{path} is damaged")
    content: dict[str, Any] = json.loads(text)
    return content


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            total = google_crc32c.extend(total, data)
    return total
