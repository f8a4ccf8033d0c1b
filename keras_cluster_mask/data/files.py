"""Files by their names, on this machine and elsewhere."""

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
