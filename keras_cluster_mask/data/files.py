"""File access through fsspec: local, `s3://`, `gs://`, `memory://`, `http://`.

Also the threads that wait for storage.
"""

import bisect
import collections
import contextlib
import errno
import functools
import io
import os
import queue
import re
import secrets
import threading
import time
from concurrent import futures

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem, make_path_posix
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import merge_offset_ranges

# The buffer size for sequential reads, in bytes.
READ_AHEAD = 2**20
# The pauses before a failed read is tried again, in seconds.
RETRY_AFTER = 0.3, 3.0
# The errors that a retry cannot resolve. A `ValueError` means an invalid name.
FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(EOFError, ValueError),
)
# Ranges at most this many bytes apart are read in one request.
MAX_GAP = 2**16
NO_RANGES = "the server does not support range requests: download the files"
# A request is an error after this time, in seconds, and the time for its bytes at this
# rate, in bytes per second.
MAX_WAIT, MIN_RATE = 35.0, 2**18


class Threads(futures.Executor):
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
        """Returns the `Future` of a call."""
        future = futures.Future()
        self._tasks.put((future, function, arguments))
        # There may be no thread left for it.
        if self._closed:
            raise futures.CancelledError
        return future

    def in_order(self, function, items, ahead):
        """Yields the result of a function for each item, in the order of the items.

        Args:
            function: Function of an item.
            items: Iterable.
            ahead: Integer. The number of calls that begin before their results are
                needed.
        """
        begun = collections.deque()
        for item in items:
            begun.append(self.submit(function, item))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    def shutdown(self, wait=True):
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
            if self._closed:
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            # Otherwise an idle thread keeps the last result.
            del task, future, arguments


def is_address(path):
    """Returns whether a path is a URL such as `"s3://bucket/a.tar"`.

    A chain of fsspec is one, too, such as `"simplecache::s3://bucket/a.tar"`. `"::"` in
    the name of a local file has no meaning.
    """
    scheme = r"([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://|data:[^,]*,"
    return re.match(scheme, os.fspath(path)) is not None


def file_system(path, argument="source"):
    """Returns the fsspec file system of a path, and the path within it.

    Args:
        path: String or path.
        argument: String. The name of the argument in error messages.

    Raises:
        ImportError: If a package for the URL is missing.
        ValueError: If the protocol is unknown.
    """
    path = os.path.expanduser(os.fspath(path))
    if not is_address(path):
        return fsspec.filesystem("file"), make_path_posix(path)
    try:
        return fsspec.core.url_to_fs(path)
    # The message of an `ImportError` contains the package name.
    except (ImportError, ValueError) as error:
        raise type(error)(
            f"`{argument}` must be a path or URL that fsspec can open: {error}. "
            f"Received: {argument}={path!r}"
        ) from error


def open_file(path):
    """Opens a binary file, with read-ahead for sequential reads."""
    if not is_address(path):
        return open(os.path.expanduser(path), "rb", READ_AHEAD)
    # Each request takes time.
    return io.BufferedReader(_RemoteFile(path), 4 * READ_AHEAD)


class _RemoteFile(AbstractBufferedFile):
    """A file at a URL, of which only the bytes that are read are requested."""

    def __init__(self, path):
        self._address = path
        system, name = file_system(path)
        size = retried(lambda: limited(system, system.size, name))
        super().__init__(system, name, cache_type="none", size=size)

    def _fetch_range(self, start, end):
        (content,) = read_ranges([(self._address, start, min(end, self.size))])
        if isinstance(content, Exception):
            # Clients of object stores raise other errors.
            raise OSError(errno.EIO, f"{self._address}: {content}") from content
        return content


@contextlib.contextmanager
def replacing(path):
    """Opens a file for atomic writing.

    Readers see the old file or the complete new one, even after a crash or a power cut.
    The content is written to a hidden file in the same folder, which is then renamed.

    Args:
        path: String or path.

    Yields:
        A binary file, open for writing.
    """
    path = os.path.expanduser(os.fspath(path))
    folder, slash, name = path.rpartition("/")
    part = f"{folder}{slash}.{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    system, part_name = file_system(part)
    if folder:
        system.makedirs(file_system(folder)[1], exist_ok=True)
    try:
        with system.open(part_name, "wb") as file:
            yield file
            if not is_address(path):
                file.flush()
                os.fsync(file.fileno())
        if is_address(path):
            system.mv(part_name, file_system(path)[1])
        else:
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            system.rm_file(part_name)
        raise


def remove(path):
    """Removes a file."""
    system, name = file_system(path)
    system.rm_file(name)


def beside(path, name):
    """Resolves a relative file name against the folder of another file."""
    if is_address(name) or os.path.isabs(name):
        return name
    folder, slash, _ = os.fspath(path).rpartition("/")
    return f"{folder}{slash}{name}"


def read_ranges(ranges):
    """Reads byte ranges of files, with nearby ranges in one request.

    Each request is tried three times.

    Args:
        ranges: List of `(path, start, stop)`, in bytes. `None` as stop reads the rest.

    Returns:
        List of the bytes of each range, or an error: an `EOFError` if the file ends
        before.

    Raises:
        TimeoutError: If the storage has not answered three times.
    """
    if not ranges:
        return []
    paths, starts, stops = map(list, zip(*ranges))
    merged = merge_offset_ranges(paths, starts, stops, max_gap=MAX_GAP)
    requests = [*zip(*merged)]
    replies = fetch(requests)
    for pause in RETRY_AFTER:
        failed = [each for each, reply in replies.items() if _may_pass(each, reply)]
        if not failed:
            break
        time.sleep(pause)
        replies |= fetch(failed)
    # Requests are sorted, and do not overlap.
    firsts = [request[:2] for request in requests]
    results = []
    for path, start, stop in ranges:
        request = requests[bisect.bisect_right(firsts, (path, start)) - 1]
        reply, first = replies[request], request[1]
        if isinstance(reply, TimeoutError):
            raise reply
        if not isinstance(reply, Exception):
            reply = reply[start - first : None if stop is None else stop - first]
            if stop is not None and len(reply) < stop - start:
                reply = EOFError(f"{path} ends before byte {stop}")
        results.append(reply)
    return results


def retried(request):
    """Calls a function that requests something, three times if it fails."""
    for pause in RETRY_AFTER:
        try:
            return request()
        except FINAL:
            raise
        except OSError:
            time.sleep(pause)
    return request()


def fetch(requests):
    """Requests ranges; returns a dictionary from each to its bytes or an error."""
    replies, systems = {}, collections.defaultdict(list)
    for request in requests:
        try:
            system, name = file_system(request[0])
            systems[system].append((name, request))
        except ValueError as error:
            replies[request] = error
    for system, several in systems.items():
        names, asked = map(list, zip(*several))
        _, starts, stops = map(list, zip(*asked))
        read = functools.partial(system.cat_ranges, on_error="return")
        size = sum(stop - start for _, start, stop in asked if stop)
        try:
            contents = limited(system, read, names, starts, stops, size=size)
        except TimeoutError as error:
            contents = [error] * len(asked)
        replies.update(zip(asked, contents))
    for request, reply in replies.items():
        _, start, stop = request
        if isinstance(reply, MemoryError):
            raise reply
        # Some web servers ignore ranges.
        if stop and not isinstance(reply, Exception) and len(reply) > stop - start:
            replies[request] = ValueError(NO_RANGES)
    return replies


def limited(system, function, names, *arguments, size=0):
    """Calls a method of a file system that reads, and limits the time that it takes.

    Args:
        system: The file system. Only the operating system limits reads of local files.
        function: Function.
        names: String, or list of strings. Its first argument.
        *arguments: Its other arguments.
        size: Integer. The number of bytes that are read.

    Raises:
        TimeoutError: If the storage does not answer in time.
    """
    if type(system) is LocalFileSystem:
        return function(names, *arguments)
    limit = MAX_WAIT + size / MIN_RATE
    try:
        if issubclass(type(system), AsyncFileSystem):
            # Also cancels the request.
            return function(names, *arguments, timeout=limit)
        with Threads(1) as threads:
            return threads.submit(function, names, *arguments).result(limit)
    except TimeoutError as error:
        name = system.unstrip_protocol(names if isinstance(names, str) else names[0])
        reason = f"{name} did not respond within {limit:.3g} seconds"
        raise TimeoutError(errno.ETIMEDOUT, reason) from error


def _may_pass(request, reply):
    """Returns whether a request failed with an error that may not come again."""
    path, start, stop = request
    if not isinstance(reply, Exception):
        # Remote storage may send fewer bytes than were requested.
        return bool(stop) and is_address(path) and len(reply) < stop - start
    numbers = errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP
    # The status 416 of a web server means a range beyond the end.
    is_final = isinstance(reply, FINAL) or getattr(reply, "status", None) == 416
    return not is_final and getattr(reply, "errno", None) not in numbers
