import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from workers import side_by_side

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
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


def test_workers_end_when_the_program_is_killed(tmp_path):
    if len(CORES) < 2:
        pytest.skip("one core")
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from workers import side_by_side\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(side_by_side(work, sys.argv[1:], 2))\n"
    )
    paths = [tmp_path / "first", tmp_path / "second"]
    running = subprocess.Popen([sys.executable, program, *paths])
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    running.kill()
    running.wait()
    workers = [Path("/proc") / path.read_text() for path in paths]
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(process):
    # One that has ended may stay listed until somebody asks how.
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_more_workers_than_cores_are_refused():
    with pytest.raises(ValueError, match=r"`--workers`.*Received: 1000"):
        list(side_by_side(abs, [1], 1000))
