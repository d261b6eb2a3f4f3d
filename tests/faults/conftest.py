"""The run that disturbed ones are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbed import SETTINGS, train
from tiny_run import write_config
from workers import Pool


@pytest.fixture(scope="session")
def whole(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run by two ranks that nothing disturbs, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(folder, **SETTINGS)
    pool(2).run(train, path, ["train.steps=1", f"train.output={folder / 'first'}"])  # what comes only once
    start = time.perf_counter()
    pool(2).run(train, path, [])
    return folder, time.perf_counter() - start
