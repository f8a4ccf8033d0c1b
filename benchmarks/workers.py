"""Runs of a benchmark side by side, each process on cores of its own."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor


def side_by_side(function, tasks, workers):
    """Yields `function(task)` for each task, in order, `workers` of them at a time.

    Small models leave most of a machine idle when one run is spread over all cores.

    Args:
        function: A function that can be pickled.
        tasks: Iterable of its arguments.
        workers: Integer. 1 runs everything in this process.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Forked processes would share the threads and locks of a running backend.
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= workers <= len(cores):
        raise ValueError(
            f"`--workers` must be from 1 to the number of cores, {len(cores)}. "
            f"Received: {workers}"
        )
    shares = context.Queue()
    for worker in range(workers):
        shares.put(cores[worker::workers])
    with ProcessPoolExecutor(workers, context, _pin, (shares,)) as pool:
        yield from pool.map(function, tasks)


def _end_with_parent():
    # The workers of a killed process would otherwise continue with their tasks.
    multiprocessing.parent_process().join()
    os._exit(1)


def _pin(shares):
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cores = shares.get()
    # A spawned process has imported its main module by now, and with it threads that
    # a limit of this one thread alone would miss.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(len(cores))
