"""Fixtures for the whole suite: the pools of rank processes, one of each size per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from workers import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(n)`: the `n` rank processes of this session."""
    pools: dict[int, Pool] = {}

    def of(num_ranks: int) -> Pool:
        return pools.setdefault(num_ranks, Pool(num_ranks))

    yield of
    for each in pools.values():
        each.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU on this machine"))
