import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from workers import side_by_side

CORES = os.sched_getaffinity(0)


@pytest.mark.parametrize("workers", {1, min(2, len(CORES))})
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(side_by_side(abs, [-3, 2, -1], workers)) == [3, 2, 1]


def where_it_runs(_):
    time.sleep(1.0)  # So that no worker takes all tasks before the other has started.
    return os.getpid(), os.sched_getaffinity(0)


def test_workers_run_on_cores_of_their_own():
    if len(CORES) < 2:
        pytest.skip("one core")
    cores_of = dict(side_by_side(where_it_runs, range(6), 2))
    assert len(cores_of) == 2
    one, other = cores_of.values()
    assert one | other == CORES
    assert not one & other
    # This process keeps all of them.
    assert os.sched_getaffinity(0) == CORES


def test_more_workers_than_cores_are_refused():
    with pytest.raises(ValueError, match=r"`--workers`.*Received: 1000"):
        list(side_by_side(abs, [1], 1000))
