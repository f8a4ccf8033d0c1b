import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from workers import side_by_side

CORES = os.sched_getaffinity(0)


@pytest.mark.parametrize("workers", {1, min(2, len(CORES))})
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(side_by_side(abs, [-3, 2, -1], workers)) == [3, 2, 1]


def test_workers_share_the_cores_and_take_none_from_one_another():
    if len(CORES) < 2:
        pytest.skip("one core")
    found = list(side_by_side(os.sched_getaffinity, [0] * 6, 2))
    assert all(cores < CORES for cores in found)
    shares = {frozenset(cores) for cores in found}
    assert sum(map(len, shares)) <= len(CORES)
    # This process keeps all of them.
    assert os.sched_getaffinity(0) == CORES


def test_more_workers_than_cores_are_refused():
    with pytest.raises(ValueError, match=r"`--workers`.*Received: 1000"):
        list(side_by_side(abs, [1], 1000))
