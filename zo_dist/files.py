"""Files that are whole or say that they are not: appended to whole, and checked by a checksum."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


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
