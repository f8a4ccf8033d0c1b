"""Parquet files, with a row for each image or caption."""

import contextlib
import functools
import os
import threading

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import (
    DamagedShard,
    Entry,
    Format,
    filled,
    key_of,
)

KEYS = ("__key__", "key", "image_id", "id")
# The number of row groups that are kept in memory. A group is read as a whole.
OPEN_GROUPS = 4
_reading = threading.Lock()


class Parquet(Format):
    """Parquet files, with columns as fields. Needs pyarrow.

    The image column contains bytes, file names, or dictionaries of `"bytes"` and
    `"path"`, as the package `datasets` writes them. The rows of one image are a sample
    with several captions. Its key is the column `__key__`, `key`, `image_id` or `id` of
    its first row, or the row number.

    The place of a row is the number of its row group and its number there.

    Parquet cannot read single rows. If samples are shuffled one by one, a whole row
    group is read for each sample, so blocks of rows are shuffled; see `block_size`.
    """

    noun = "Parquet file"
    has_rows = True
    names_files = True

    def scan(self, path):
        # The cache may hold row groups of an older file of this name.
        _read_group.cache_clear()
        number = 0
        with _open(path) as file:
            for group in range(file.num_row_groups):
                # The metadata at the end of the file has the number of all rows.
                share = number and number / file.metadata.num_rows
                table = _intact(path, file.read_row_group, group, share=share)
                for place in range(table.num_rows):
                    row = _intact(path, table.slice(place, 1).to_pylist)[0]
                    key, fields = self.parse(row, number, None)
                    yield Entry(key, (group, place), fields)
                    number += 1

    def read(self, places):
        rows = []
        for part, (group, place) in places:
            read = functools.partial(_read_group, part.shard, group)
            try:
                # The lock prevents threads from reading the same group twice.
                with _reading:
                    table = files.retried(read, part.shard)
                rows.append(_intact(part.shard, table.slice(place, 1).to_pylist)[0])
            except (OSError, DamagedShard) as error:
                rows.append(error)
        return rows

    def parse(self, content, number, context):
        fields = filled(plain(content))
        key = next((fields[name] for name in KEYS if name in fields), f"{number:08}")
        return key_of(key), fields


def plain(columns):
    """Returns the values of columns as other formats have them, without `None`."""
    fields = {}
    for name, value in columns.items():
        if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if value is not None:
            fields[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return fields


@contextlib.contextmanager
def _open(path):
    # Imported here, since only Parquet files need it.
    import pyarrow.parquet as pq

    # pyarrow reads each column of a group at once, so a buffer would only add bytes.
    with files.open_file(path) as file:
        yield _intact(path, pq.ParquetFile, file.raw)


def _intact(path, read, *arguments, share=0.0):
    """Calls a function of pyarrow, and raises `DamagedShard` if it fails."""
    try:
        return read(*arguments)
    except MemoryError:
        raise
    # pyarrow raises many kinds of errors, including `OSError` without an `errno`.
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DamagedShard(path, None, str(error), share) from error


@functools.lru_cache(OPEN_GROUPS)
def _read_group(path, group):
    with _open(path) as file:
        return _intact(path, file.read_row_group, group)
