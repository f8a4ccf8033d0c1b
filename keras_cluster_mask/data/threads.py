"""Threads that a program does not wait for when it ends."""

import queue
import threading
from concurrent import futures


class Threads:
    """Threads that call functions. A program ends without waiting for them.

    Args:
        count: int. The number of threads.
    """

    def __init__(self, count):
        self.count, self._closed = count, False
        self._tasks = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function, *arguments):
        """Returns the `Future` of a call."""
        future = futures.Future()
        self._tasks.put((future, function, arguments))
        # There may be no thread left for it.
        if self._closed:
            raise futures.CancelledError
        return future

    def map(self, function, items):
        """Returns the results of calls, in order."""
        return [each.result() for each in [self.submit(function, x) for x in items]]

    def close(self):
        """Ends the threads after the calls in progress, and cancels the others."""
        self._closed = True
        for _ in range(self.count):
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
