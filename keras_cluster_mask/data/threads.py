"""Threads that do not keep a program from ending."""

import contextvars
import queue
import threading
from concurrent import futures


class Threads:
    """Threads that call functions. A program that ends does not wait for long.

    Args:
        count: Integer. The number of threads.
    """

    def __init__(self, count):
        self.count, self._closed = count, False
        self._tasks = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(count)
        ]
        for each in self._threads:
            each.start()

    def submit(self, function, *arguments):
        """Returns the `Future` of a call, in the context of the thread that submits."""
        future, run = futures.Future(), contextvars.copy_context().run
        self._tasks.put((future, run, (function, *arguments)))
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
        # A program that ends while a thread returns from C++ is aborted.
        for each in {*self._threads} - {threading.current_thread()}:
            each.join(1.0)
            if each.is_alive():
                # Storage does not answer, which all may wait for.
                break

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
