"""Threads that a program does not wait for when it ends."""

import queue
import threading
from concurrent import futures


class Threads:
    """Threads that call functions. A program ends without waiting for them.

    A copy in another process has its own threads.

    Args:
        count: int. The maximum number of threads.
    """

    def __init__(self, count):
        self.count = count
        self._tasks, self._threads = queue.SimpleQueue(), []
        self._lock, self._closed = threading.Lock(), False

    def __reduce__(self):
        return Threads, (self.count,)

    def submit(self, function, *arguments):
        """Returns the `Future` of a call."""
        future = futures.Future()
        with self._lock:
            if self._closed:
                raise futures.CancelledError
            self._tasks.put((future, function, arguments))
            if len(self._threads) < self.count:
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        return future

    def map(self, function, items):
        """Returns the results of calls, in order."""
        return [each.result() for each in [self.submit(function, x) for x in items]]

    def close(self):
        """Ends the threads after the calls in progress, and cancels the others."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)

    def _work(self):
        while task := self._tasks.get():
            future, function, arguments = task
            try:
                if self._closed:
                    raise futures.CancelledError
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            # Otherwise an idle thread keeps the last result.
            del task, future, arguments
