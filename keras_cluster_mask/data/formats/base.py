"""Base class of formats, which find the samples once and read any of them."""

import codecs
import contextlib
import json
import typing

import numpy as np

from keras_cluster_mask.data import files

# How a text in UTF-16 starts.
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class Entry(typing.NamedTuple):
    """A sample of a shard: its key, its position, and the fields that it has.

    `Format.scan` finds the entries of a shard. An index returns entries with hashes in
    place of keys and fields.

    Attributes:
        key: String. The key of the sample. From an index: integer, the hash of the key.
        offset: Integer. The position of the first byte of the sample in the shard. In a
            Parquet file: the number of the row group.
        size: Integer. The number of bytes of the sample. In a Parquet file: the number
            of the row within its row group.
        fields: Dictionary from the name of each field that is not empty to the content
            or the size of the field. The entries of a JSON field are named, too, such
            as `"json.caption"`, with the value `None`. From an index: empty.
        fault: String. The reason why the sample is broken. `None` if the sample is
            intact.
        content: Bytes. The sample itself, if its format has `in_index`, such as a
            folder of images. `None` for other formats.
        checksum: Integer. From an index: the hash of the fields, by which a run that is
            resumed notices other data; see `checksum_of`. `None` from `scan`.
    """

    key: str | int
    offset: int
    size: int
    fields: typing.Collection = ()
    fault: str | None = None
    content: bytes | None = None
    checksum: int | None = None


def is_empty(value):
    """Returns whether the value of a field counts as missing. Numbers never do."""
    if isinstance(value, np.ndarray):
        return not value.size
    return value is None or (hasattr(value, "__len__") and not len(value))


def key_of(value):
    """Returns the key of a sample as a string."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)


def entries_of(field):
    """Returns the marker that shows that the entries of a JSON field are listed."""
    return f"{field}."


class DamagedShard(ValueError):
    """A shard that cannot be read to its end.

    Args:
        path: String.
        last_key: String, the key of the last sample that was found, or `None`.
        reason: String.
    """

    def __str__(self):
        path, last_key, reason = self.args
        place = f"after the sample {last_key!r}" if last_key else "at its start"
        return f"The shard {path} is damaged {place}: {reason}"


def json_object(content):
    """Returns the dictionary that bytes hold as JSON, or `None`."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None


class Format:
    """A format of shards.

    Attributes:
        has_rows: Boolean. Whether a shard has rows, of which those of one image are a
            sample. In other formats, a duplicate key in a shard is a fault.
        in_index: Boolean. Whether the content of the samples is stored in the index.
        names_files: Boolean. Whether samples may hold the names of image files, which
            are relative to the folder of the shard.
    """

    has_rows = False
    in_index = False
    names_files = False

    def scan(self, path):
        """Finds the samples of a shard in order.

        Args:
            path: String.

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
            places: List of `(path, offset, size)`, one for each sample.

        Returns:
            List of the content for `parse`, or an error, for each sample.
        """
        return files.read_ranges([(path, at, at + size) for path, at, size in places])

    def parse(self, content, number, context):
        """Parses the key and the fields of a sample.

        Args:
            content: Bytes, or another result of `read`.
            number: Integer. The number of the sample in its shard.
            context: The result of the method `context`.

        Returns:
            Tuple `(key, fields)`: a string, and a dictionary from the name of each
            field to bytes, a string, or a list of bytes or strings.
        """
        raise NotImplementedError
