"""Files by their names, on this machine and elsewhere."""

import contextlib
import glob
import os
import pathlib
import re

# Python asks the disk, or the network, for so many bytes at a time.
READ_AHEAD = 2**20
# What fsspec needs for a protocol.
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


def open_file(path, mode="rb"):
    """Opens a file on this machine or, by fsspec or TensorFlow, at an address.

    Args:
        path: str or path.
        mode: `"rb"` or `"wb"`.

    Returns:
        A binary file.
    """
    if not is_address(path):
        return pathlib.Path(path).open(mode, buffering=READ_AHEAD)
    system, path = _elsewhere(os.fspath(path))
    return system.open(path, mode)


@contextlib.contextmanager
def replacing(path, durable=True):
    """Opens a file that takes its name, and its folder, only once it is whole.

    Whoever looks sees the old file or the new one, also after a crash. Until then the
    content is in a hidden file beside it, which the next attempt uses again.

    Args:
        path: str or path.
        durable: bool. Whether to wait until the disk has it, as for what a power cut
            must not take. Defaults to `True`.

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
            if durable and not is_address(path):
                file.flush()
                os.fsync(file.fileno())
        _move(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(part)
        raise


def make_folder(path):
    """Makes a folder and those it is in, where they are not there."""
    if not is_address(path):
        os.makedirs(path or ".", exist_ok=True)
        return
    system, path = _elsewhere(path)
    system.make_folder(path)


def remove(path):
    """Removes a file."""
    if not is_address(path):
        return os.remove(path)
    system, path = _elsewhere(path)
    return system.remove(path)


def _move(old, new):
    if not is_address(old):
        return os.replace(old, new)
    system, old = _elsewhere(old)
    return system.move(old, _elsewhere(new)[1])


def fingerprint(path):
    """What tells a file from what it may be replaced by: its size and its date."""
    if not is_address(path):
        status = os.stat(path)
        return [status.st_size, str(status.st_mtime_ns)]
    system, path = _elsewhere(path)
    return system.fingerprint(path)


def exists(path):
    """Whether there is a file or folder of this name."""
    if not is_address(path):
        return os.path.exists(path)
    system, path = _elsewhere(path)
    return system.exists(path)


def is_folder(path):
    """Whether there is a folder of this name."""
    if not is_address(path):
        return os.path.isdir(path)
    system, path = _elsewhere(path)
    return system.isdir(path)


def matching(pattern):
    """The files that a pattern with `*`, `?` or `[...]` stands for, sorted."""
    if not is_address(pattern):
        return sorted(glob.glob(pattern))
    system, path = _elsewhere(pattern)
    return sorted(system.matching(path))


def all_in(folder):
    """All files of a folder and of the folders in it, as paths within it, sorted."""
    if is_address(folder):
        system, folder = _elsewhere(folder)
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
    """The file of this name in the folder of another, unless it names its place."""
    if is_address(name) or os.path.isabs(name):
        return name
    folder = os.fspath(path).rpartition("/")[0] if is_address(path) else None
    return (
        os.path.join(os.path.dirname(path), name)
        if folder is None
        else (f"{folder}/{name}")
    )


class MissingPackage(ImportError):
    """An address for which nothing that is installed can open files."""


class _Fsspec:
    """An address's files by fsspec and what is installed for its protocol."""

    def __init__(self, system, protocol):
        self.system, self.protocol = system, protocol

    def open(self, path, mode):
        return self.system.open(path, mode)

    def exists(self, path):
        return self.system.exists(path)

    def isdir(self, path):
        return self.system.isdir(path)

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

    def fingerprint(self, path):
        info = self.system.info(path)
        names = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        return [info["size"], str(next((info[n] for n in names if info.get(n)), ""))]


class _TensorFlow:
    """An address's files by `tf.io.gfile`."""

    def __init__(self, gfile):
        self.gfile = gfile

    def open(self, path, mode):
        return self.gfile.GFile(path, mode)

    def exists(self, path):
        return self.gfile.exists(path)

    def isdir(self, path):
        return self.gfile.isdir(path)

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

    def fingerprint(self, path):
        status = self.gfile.stat(path)
        return [status.length, str(status.mtime_nsec)]


def _elsewhere(address):
    """What opens files at an address, and the path to give to it."""
    protocol = address.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
        return _Fsspec(system, protocol), path
    # fsspec says ValueError of a protocol that it has never heard of.
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
        f"Nothing that is installed opens files at {protocol}:// ({reason}): "
        f"{package}. Received: {address}"
    ) from reason
