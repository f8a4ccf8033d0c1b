"""File access through fsspec: local, `s3://`, `gs://`, `memory://`, `http://`.

Also the threads that wait for storage.
"""

import bisect
import collections
import contextlib
import contextvars
import errno
import functools
import io
import math
import os
import queue
import re
import secrets
import threading
import time
import types
import warnings
from concurrent import futures

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem, make_path_posix
from fsspec.spec import AbstractBufferedFile
from fsspec.utils import merge_offset_ranges

# The buffer size for sequential reads, in bytes.
READ_AHEAD = 2**20
# The pauses before a failed read is retried, in seconds.
RETRY_AFTER = 0.1, 1.0, 5.0
# The errors that a retry cannot resolve. A `ValueError` means an invalid name.
FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(EOFError, ValueError),
)
# Ranges at most this many bytes apart are read in one request.
MAX_GAP = 2**16
NO_RANGES = "the server does not send parts of files: download them"
# A request is an error after this time, in seconds, and the time for its bytes at this
# rate, in bytes per second.
MAX_WAIT, MIN_RATE = 50.0, 2**18
# Requests of a step are repeated for this time after the first that is not answered, in
# seconds. Later ones, such as for substitutes, get the second time.
PATIENCE, MIN_WAIT = 180.0, 0.5


# The time `until` which requests of the current step are repeated. Threads share it.
_patience = contextvars.ContextVar("patience")


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
        """Returns the `Future` of a call, in the context of the thread that submits."""
        future, run = futures.Future(), contextvars.copy_context().run
        self._tasks.put((future, run, (function, *arguments)))
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


@contextlib.contextmanager
def one_step(patience=None):
    """Lets the reads within it share one time to wait, by default of a step around.

    The time is infinite until a request is not answered.
    """
    patience = patience or _patience.get(None)
    token = _patience.set(patience or types.SimpleNamespace(until=math.inf))
    try:
        yield
    finally:
        _patience.reset(token)


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
    # The message of an `ImportError` names the package.
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
        # pyarrow reads in its own threads.
        self._patience = _patience.get(None)
        system, name = file_system(path)
        size = retried(lambda: limited(system, system.size, name))
        super().__init__(system, name, cache_type="none", size=size)

    def _fetch_range(self, start, end):
        with one_step(self._patience):
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


@one_step()
def read_ranges(ranges):
    """Reads byte ranges of files, with nearby ranges in one request.

    Failed reads are retried a few times, and so are short replies of remote storage.

    Args:
        ranges: List of `(path, start, stop)`, in bytes. `None` as stop reads the rest.

    Returns:
        List of the bytes of each range, or an error: an `EOFError` if the file ends
        before.
    """
    if not ranges:
        return []
    paths, starts, stops = map(list, zip(*ranges))
    merged = merge_offset_ranges(paths, starts, stops, max_gap=MAX_GAP)
    requests = [*zip(*merged)]
    replies = fetch(requests)
    for pause in RETRY_AFTER:
        failed = [
            each
            for each, reply in replies.items()
            if _may_pass(reply) or _is_cut(each, reply)
        ]
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
        if not isinstance(reply, Exception):
            reply = reply[start - first : None if stop is None else stop - first]
            if stop is not None and len(reply) < stop - start:
                reply = EOFError(f"{path} ends before byte {stop}")
        results.append(reply)
    return results


def retried(read, path=""):
    """Calls a function, and retries it a few times if it raises an `OSError`.

    If it reads a file at a URL, `path`, it is called once: each request is retried.
    """
    if is_address(path):
        return read()
    with one_step():
        for pause in RETRY_AFTER:
            try:
                return read()
            except OSError as error:
                if not _may_pass(error):
                    raise
            time.sleep(pause)
        return read()


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


@one_step()
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
    patience, began = _patience.get(), time.monotonic()
    limit = min(MAX_WAIT + size / MIN_RATE, max(patience.until - began, MIN_WAIT))
    try:
        if issubclass(type(system), AsyncFileSystem):
            # Also cancels the request.
            return function(names, *arguments, timeout=limit)
        with Threads(1) as threads:
            return threads.submit(function, names, *arguments).result(limit)
    except TimeoutError as error:
        reason = f"the storage has not answered within {limit:.3g} seconds"
        if patience.until == math.inf:
            patience.until = began + PATIENCE
            name = names if isinstance(names, str) else names[0]
            warnings.warn(
                f"Waiting for {system.unstrip_protocol(name)}: {reason}. It is "
                f"asked again until {PATIENCE:.0f} seconds have passed.",
                stacklevel=1,
            )
        raise TimeoutError(errno.ETIMEDOUT, reason) from error


def _is_cut(request, reply):
    """Returns whether remote storage sent fewer bytes than were requested."""
    path, start, stop = request
    is_known = stop is not None and not isinstance(reply, Exception)
    return is_known and len(reply) < stop - start and is_address(path)


def _may_pass(result):
    """Returns whether a result is an error that a retry may resolve."""
    numbers = errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP
    # The status 416 of a web server means a range beyond the end.
    is_final = isinstance(result, FINAL) or getattr(result, "status", None) == 416
    is_final = is_final or getattr(result, "errno", None) in numbers
    if isinstance(result, TimeoutError):
        is_final = time.monotonic() > _patience.get().until
    return isinstance(result, Exception) and not is_final
