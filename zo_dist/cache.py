"""Where things that are made once are kept: downloaded models and data, compiled code."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """The cache folder: the environment variable ZO_DIST_CACHE, else ~/.cache/zo_dist."""
    return Path(os.environ.get("ZO_DIST_CACHE") or "~/.cache/zo_dist").expanduser()
