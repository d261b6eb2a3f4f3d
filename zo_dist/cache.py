"""Where things that are made once are kept: downloaded models and data, compiled code."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def default_cache() -> Path:
    """The cache folder: the environment variable ZO_DIST_CACHE, else ~/.cache/zo_dist."""
    return Path(os.environ.get("ZO_DIST_CACHE") or "~/.cache/zo_dist").expanduser()


def made_once(final: Path, make: Callable[[Path, Path], object]) -> Path:
    """The folder `final`, made if it is not there.

    `make(scratch, ready)` fills the empty folder `ready`; what else it needs goes into `scratch`, and is
    lost. Published by one rename, so that any number of processes may ask at once.
    """
    if final.is_dir():
        return final
    # A name that no other process, on this or another node of a shared file system, will choose.
    scratch = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
    (scratch / "ready").mkdir(parents=True)
    try:
        make(scratch, scratch / "ready")
        try:
            os.replace(scratch / "ready", final)
        except OSError:
            if not final.is_dir():  # else another process was quicker, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
