"""Local files, and files at addresses such as `s3://`."""

import contextlib
import glob
import os
import pathlib
import re

# The buffer, in bytes, for reading from a disk or a network.
READ_AHEAD = 2**20
# The packages that fsspec needs for each protocol.
PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}


def is_address(path):
    """Whether a path is an address such as `"s3://bucket/a.tar"`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def open_file(path, mode="rb", buffering=None):
    """Opens a local file or, through fsspec or TensorFlow, a file at an address.

    Args:
        path: str or path.
        mode: `"rb"` or `"wb"`.
        buffering: int. The buffer of a local file, in bytes. Defaults to `None`: one
            for reading from start to end.

    Returns:
        A binary file.
    """
    if not is_address(path):
        return pathlib.Path(path).open(mode, buffering=buffering or READ_AHEAD)
    system, path = _file_system(os.fspath(path))
    return system.open(path, mode)


class RandomAccess:
    """Reads any part of a file, in several threads and after a fork.

    A local file stays open until the object is deleted.

    Args:
        path: str.
    """

    def __init__(self, path):
        self._path = path
        self._descriptor = None
        # Windows has no `pread`.
        if not is_address(path) and hasattr(os, "pread"):
            self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start, size):
        """Reads `size` bytes from `start` on, at an address by one request."""
        if self._descriptor is not None:
            return os.pread(self._descriptor, size, start)
        if is_address(self._path):
            system, path = _file_system(self._path)
            return system.read_range(path, start, size)
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def stamp(path):
    """The size of a file and its date, as a str that differs if the file changes."""
    if not is_address(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    system, path = _file_system(path)
    return system.stamp(path)


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
    part = f"{folder}{slash}.{name}.part"
    make_folder(folder or slash)
    try:
        with open_file(part, "wb") as file:
            yield file
            if not is_address(path):
                file.flush()
                os.fsync(file.fileno())
        _move(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise


def make_folder(path):
    """Creates a folder and its parents if they do not exist."""
    if not is_address(path):
        os.makedirs(path or ".", exist_ok=True)
        return
    system, path = _file_system(path)
    system.make_folder(path)


def remove(path):
    """Removes a file."""
    if not is_address(path):
        return os.remove(path)
    system, path = _file_system(path)
    return system.remove(path)


def _move(old, new):
    if not is_address(old):
        return os.replace(old, new)
    system, old = _file_system(old)
    return system.move(old, _file_system(new)[1])


def exists(path):
    """Whether a file or folder of this name exists."""
    if not is_address(path):
        return os.path.exists(path)
    system, path = _file_system(path)
    return system.exists(path)


def is_folder(path):
    """Whether a folder of this name exists."""
    if not is_address(path):
        return os.path.isdir(path)
    system, path = _file_system(path)
    return system.isdir(path)


def matching(pattern):
    """The files that match a pattern with `*`, `?` or `[...]`, sorted."""
    if not is_address(pattern):
        return sorted(glob.glob(pattern))
    system, path = _file_system(pattern)
    return sorted(system.matching(path))


def all_in(folder):
    """All files in a folder and its subfolders, as sorted relative paths."""
    if is_address(folder):
        system, folder = _file_system(folder)
        found = system.all_in(folder)
    else:
        found = (
            os.path.join(place, name)
            for place, _, names in os.walk(folder)
            for name in names
        )
    within = len(folder.rstrip("/")) + 1
    return sorted(path[within:] for path in found)


def beside(path, name):
    """A file name relative to the folder of another file, unless it is absolute."""
    if is_address(name) or os.path.isabs(name):
        return name
    folder = os.fspath(path).rpartition("/")[0] if is_address(path) else None
    if folder is not None:
        return f"{folder}/{name}"
    return os.path.join(os.path.dirname(path), name)


class MissingPackage(ImportError):
    """No installed package opens files at an address."""


class _Fsspec:
    """Files at an address, through fsspec."""

    def __init__(self, system, protocol):
        self.system, self.protocol = system, protocol

    def open(self, path, mode):
        return self.system.open(path, mode)

    def exists(self, path):
        return self.system.exists(path)

    def isdir(self, path):
        return self.system.isdir(path)

    def read_range(self, path, start, size):
        return self.system.cat_file(path, start=start, end=start + size)

    def stamp(self, path):
        info = self.system.info(path)
        names = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated")
        names += ("last_modified", "created")
        return f"{info['size']} {next((info[n] for n in names if info.get(n)), '')}"

    def matching(self, path):
        return [self.system.unstrip_protocol(found) for found in self.system.glob(path)]

    def all_in(self, path):
        return self.system.find(path)

    def make_folder(self, path):
        self.system.makedirs(path, exist_ok=True)

    def remove(self, path):
        self.system.rm_file(path)

    def move(self, old, new):
        self.system.mv(old, new)


class _TensorFlow:
    """Files at an address, through `tf.io.gfile`."""

    def __init__(self, gfile):
        self.gfile = gfile

    def open(self, path, mode):
        return self.gfile.GFile(path, mode)

    def exists(self, path):
        return self.gfile.exists(path)

    def isdir(self, path):
        return self.gfile.isdir(path)

    def read_range(self, path, start, size):
        with self.open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def stamp(self, path):
        status = self.gfile.stat(path)
        return f"{status.length} {status.mtime_nsec}"

    def matching(self, path):
        return self.gfile.glob(path)

    def all_in(self, path):
        return [
            f"{place.rstrip('/')}/{name}"
            for place, _, names in self.gfile.walk(path)
            for name in names
        ]

    def make_folder(self, path):
        self.gfile.makedirs(path)

    def remove(self, path):
        self.gfile.remove(path)

    def move(self, old, new):
        self.gfile.rename(old, new, overwrite=True)


def _file_system(address):
    """The file system of an address, and the path in it."""
    protocol = address.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
        return _Fsspec(system, protocol), path
    # fsspec raises ValueError for an unknown protocol.
    except (ImportError, ValueError) as error:
        reason = error
    try:
        import tensorflow as tf

        schemes = tf.io.gfile.get_registered_schemes()
        if protocol in schemes:
            return _TensorFlow(tf.io.gfile), address
    except ImportError:
        pass
    package = f"`pip install fsspec {PACKAGES.get(protocol, '')}".rstrip() + "`"
    raise MissingPackage(
        f"No installed package opens files at {protocol}:// ({reason}): "
        f"{package}. Received: {address}"
    ) from reason
