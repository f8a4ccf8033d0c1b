"""Base class of formats, which find the samples once and read any of them."""

import contextlib
import json
import typing

import numpy as np

from keras_cluster_mask.data import files


class Entry(typing.NamedTuple):
    """The position of a sample in its shard.

    Attributes:
        key: str; in an index its hash, an int.
        offset: int. The first byte of the sample; for Parquet the row group.
        size: int. The number of bytes; for Parquet the row in the group.
        fields: dict from the name of each field that is not empty to its content or
            its size, or to None for an entry of a JSON field; in an index the names.
        fault: str, the reason why the sample is broken, or None.
        content: bytes of a sample that is stored in the index, or None.
        checksum: int, in an index the hash of the fields; see `checksum_of`.
    """

    key: str | int
    offset: int
    size: int
    fields: typing.Collection
    fault: str | None = None
    content: bytes | None = None
    checksum: int | None = None


def is_empty(value):
    """Returns whether the value of a field counts as missing. Numbers never do."""
    if isinstance(value, np.ndarray):
        return not value.size
    return value is None or (hasattr(value, "__len__") and not len(value))


def key_of(value):
    """Returns the key of a sample as a str."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)


def entries_of(field):
    """Returns the marker that shows that the entries of a JSON field are listed."""
    return f"{field}."


class DamagedShard(ValueError):
    """A shard that cannot be read to its end.

    Args:
        path: str.
        last_key: str, the key of the last sample that was found, or None.
        reason: str.
    """

    def __str__(self):
        path, last_key, reason = self.args
        place = f"after the sample {last_key!r}" if last_key else "at its start"
        return f"The shard {path} is damaged {place}: {reason}"


def json_object(content):
    """Returns the dict that bytes hold as JSON, or None."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None


class Format:
    """A format of shards.

    Attributes:
        has_rows: bool. Whether a shard has rows, of which those of one image are a
            sample. In other formats, a duplicate key in a shard is a fault.
        in_index: bool. Whether the content of the samples is stored in the index.
        names_files: bool. Whether samples may hold the names of image files, which are
            relative to the folder of the shard.
    """

    has_rows = False
    in_index = False
    names_files = False

    def scan(self, path):
        """Finds the samples of a shard in order.

        Args:
            path: str.

        Yields:
            `Entry`.

        Raises:
            DamagedShard: After the last intact sample.
            ValueError: If the file has another format.
            OSError: If the file cannot be read.
        """
        raise NotImplementedError

    @staticmethod
    def entry(key, offset, size, fields, fault=None):
        """Returns an `Entry` with the fields that are not empty."""
        fields = {name: value for name, value in fields.items() if not is_empty(value)}
        return Entry(key, offset, size, fields, fault)

    def context(self, path):
        """Returns the data on the whole shard that `parse` needs, as JSON values."""
        return None

    def read(self, places):
        """Reads the content of samples from any shards.

        Args:
            places: list of `(path, offset, size)`, one for each sample.

        Returns:
            list of the content for `parse`, or an error, for each sample.
        """
        return files.read_ranges([(path, at, at + size) for path, at, size in places])

    def parse(self, content, number, context):
        """Parses the key and the fields of a sample.

        Args:
            content: bytes, or another result of `read`.
            number: int. The number of the sample in its shard.
            context: The result of the method `context`.

        Returns:
            tuple: The key, a str, and a dict from the name of a field to bytes, a str,
            or a list of these.
        """
        raise NotImplementedError
