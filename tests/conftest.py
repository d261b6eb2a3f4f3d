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


# The files that take longest, in this order: of two processes that are given one file after the other
# (launch/test.sh), neither then ends long before the other.
LONGEST = (
    "test_same_bits.py",
    "test_killed.py",
    "test_estimate.py",
    "test_docs.py",
    "test_restarts.py",
    "test_launch.py",
    "test_plan_measured.py",
    "test_reference.py",
    "test_tasks.py",
    "test_errors.py",
    "test_rules.py",
    "test_trajectory.py",
    "test_train.py",
    "test_transformers.py",
    "test_snapshot.py",
    "test_agreement.py",
    "test_noise.py",
    "test_mask.py",
    "test_checkpoint.py",
    "test_scale.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU on this machine"))
