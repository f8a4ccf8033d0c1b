"""Files anywhere, through fsspec: local, `s3://`, `gs://`, `memory://`, `http://`."""

import contextlib
import contextvars
import errno
import multiprocessing
import os
import queue
import re
import secrets
import threading
import time
import weakref

import fsspec

# The buffer of a file that is read from start to end, in bytes.
READ_AHEAD = 2**20
# A range that cannot be read is read again after so many seconds.
RETRY_AFTER = 0.1, 1.0, 5.0
# Reading takes no longer than this, in seconds.
TIME_LIMIT = 60.0
# Neighbours with at most so many bytes between them are read together.
MAX_GAP = 2**16
MAX_REQUEST = 2**26
# What ends reading in this thread, and all that exist.
_stop = contextvars.ContextVar("stop", default=None)
_stops = weakref.WeakSet()


def is_address(path):
    """Whether a path is an address such as `"s3://bucket/a.tar"`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def file_system(path, argument="source"):
    """The fsspec file system of a path, and the path within it.

    Args:
        path: str or path.
        argument: str. What errors call the path.

    Raises:
        ImportError: If a package for the address is missing.
        ValueError: If the protocol is unknown.
    """
    path = os.path.expanduser(os.fspath(path))
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        # fsspec names the package.
        raise ImportError(f"{error}. Received: {argument} {path}") from error
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be at an address that fsspec knows: {error}. "
            f"Received: {path}"
        ) from error


def open_file(path, mode="rb"):
    """Opens a binary file. Reading from start to end reads ahead.

    Args:
        path: str or path.
        mode: `"rb"` or `"wb"`.
    """
    if not is_address(path):
        return open(os.path.expanduser(path), mode, READ_AHEAD)
    system, name = file_system(path)
    return system.open(name, mode)


@contextlib.contextmanager
def replacing(path):
    """Opens a file that appears under its name when it is complete.

    Readers see the old file or the new one, never a part, also after a crash or a power
    cut. The content is written to a hidden file in the same folder and then renamed.

    Args:
        path: str or path.

    Yields:
        A binary file, open for writing.
    """
    path = os.fspath(path)
    folder, slash, name = path.rpartition("/")
    part = f"{folder}{slash}.{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    system, part_name = file_system(part)
    if folder:
        system.makedirs(file_system(folder)[1], exist_ok=True)
    try:
        with open_file(part, "wb") as file:
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


def exists(path):
    """Whether a file or folder of this name exists."""
    system, name = file_system(path)
    return system.exists(name)


def remove(path):
    """Removes a file."""
    system, name = file_system(path)
    system.rm_file(name)


def beside(path, name):
    """A file name relative to the folder of another file, unless it is absolute."""
    if is_address(name) or os.path.isabs(name):
        return name
    folder, slash, _ = os.fspath(path).rpartition("/")
    return f"{folder}{slash}{name}"


def read_ranges(ranges):
    """Reads parts of files, neighbours together and others at the same time.

    What cannot be read is read again a few times, and has a time limit.

    Args:
        ranges: list of `(path, start, stop)`, in bytes; `None` as stop for the rest.

    Returns:
        list of bytes, or of the OSError for what cannot be read.
    """
    if not ranges:
        return []
    results = [None] * len(ranges)
    missing = range(len(ranges))
    for _ in _attempts():
        requests = _merged(ranges, missing)
        replies = fetch([request for request, _ in requests])
        for ((_, start, _), places), reply in zip(requests, replies):
            for place in places:
                results[place] = _part_of(reply, start, *ranges[place])
        missing = [i for i in missing if may_pass(results[i])]
        if not missing:
            break
    return results


def retried(read):
    """What a function returns that may raise an OSError, after a few attempts."""
    for _ in _attempts():
        try:
            return read()
        except OSError as error:
            last = error
            if not may_pass(error):
                break
    raise last


def _attempts():
    """Yields as often as reading is tried, with pauses between."""
    yield
    for pause in RETRY_AFTER:
        if (_stop.get() or threading.Event()).wait(pause):
            raise Cancelled
        yield


def _merged(ranges, places):
    """Requests for ranges, each with the places of the ranges that it brings."""
    requests = []
    for place in sorted(places, key=lambda place: (ranges[place][0], ranges[place][1])):
        path, start, stop = ranges[place]
        if requests and stop is not None:
            (other, first, last), members = requests[-1]
            if other == path and last is not None and start <= last + MAX_GAP:
                stop = max(last, stop)
                if stop - first <= MAX_REQUEST:
                    requests[-1] = (path, first, stop), [*members, place]
                    continue
        requests.append(((path, start, stop), [place]))
    return requests


def _part_of(reply, first, path, start, stop):
    if isinstance(reply, Exception) or stop is None:
        return reply
    content = reply[start - first : stop - first]
    if len(content) < stop - start:
        return OSError(f"{path} ends before byte {stop}")
    return content


def _read_all(requests):
    """Reads requests of any file systems; an error stands for what cannot be read."""
    replies = [None] * len(requests)
    remote = {}
    for number, (path, start, stop) in enumerate(requests):
        if is_address(path):
            system, name = file_system(path)
            remote.setdefault(system, []).append((number, name, start, stop))
            continue
        try:
            with open(path, "rb") as file:
                file.seek(start)
                replies[number] = file.read(-1 if stop is None else stop - start)
        except (OSError, ValueError) as error:
            replies[number] = _as_os_error(error)
    for system, several in remote.items():
        numbers, names, starts, stops = zip(*several)
        try:
            contents = system.cat_ranges(
                list(names), list(starts), list(stops), on_error="return"
            )
        except Exception as error:
            contents = [error] * len(names)
        for number, content in zip(numbers, contents):
            replies[number] = (
                _as_os_error(content) if isinstance(content, Exception) else content
            )
    return replies


def _as_os_error(error):
    if isinstance(error, OSError):
        return error
    if isinstance(error, MemoryError):
        raise error
    # No file can have such a name. The clients of object stores raise their own errors.
    number = errno.EINVAL if isinstance(error, ValueError) else errno.EIO
    return OSError(number, str(error))


def may_pass(result):
    """Whether a result is an error that may not occur again."""
    final = FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError
    numbers = errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP
    return (
        isinstance(result, OSError)
        and not isinstance(result, final)
        and result.errno not in numbers
    )


class Cancelled(RuntimeError):
    """Reading was given up because no one waits for it."""


@contextlib.contextmanager
def stopped_by(stop):
    """Ends reading in this thread when an event is set.

    Args:
        stop: `threading.Event`.
    """
    _stops.add(stop)
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def cancel():
    """Ends all reading that a `stopped_by` surrounds, and the processes that read."""
    for stop in list(_stops):
        stop.set()
    for child in multiprocessing.active_children():
        # What grain has started.
        if child.name.startswith("grain-"):
            child.kill()


def fetch(requests):
    """What storage replies to requests for ranges in time, as bytes or errors.

    No one waits longer for the thread that asks. A reply may be longer than its range.
    """
    replies = queue.SimpleQueue()

    def call():
        try:
            replies.put(_read_all(requests))
        except BaseException as error:
            replies.put(error)

    threading.Thread(target=call, daemon=True, name="read ranges").start()
    end, stop = time.monotonic() + TIME_LIMIT, _stop.get()
    while stop is None or not stop.is_set():
        try:
            found = replies.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() > end:
                late = TimeoutError(f"reading took more than {TIME_LIMIT:.0f} seconds")
                return [late] * len(requests)
            continue
        if isinstance(found, BaseException):
            raise found
        return found
    raise Cancelled
