"""Parquet files, in which each row is a sample."""

import functools
import threading

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import DamagedShard, Entry, Format, is_empty

KEYS = ("__key__", "key", "image_id", "id")
# The groups of rows that are kept in memory. A group is read as a whole.
OPEN_GROUPS = 4
_reading = threading.Lock()


class Parquet(Format):
    """Parquet files, whose columns are the fields. Needs pyarrow.

    An image is a column of bytes, of the names of files, or of dicts of `"bytes"` and
    `"path"`, as the package `datasets` writes them. The key is the column `__key__`,
    `key`, `image_id` or `id`, or the number of the row.

    Parquet cannot read a single row: in an order that is shuffled row by row, a whole
    group of rows is read for each sample. Use `block_size`, or write
    tar shards.
    """

    unique_keys = False
    names_files = True

    def scan(self, path):
        # An older file of this name may still be there.
        _read_group.cache_clear()
        file = _open(path)
        number = 0
        for group in range(file.num_row_groups):
            table = _intact(path, file.read_row_group, group)
            for place in range(table.num_rows):
                row = _intact(path, _row, table, place)
                key, fields = self.parse(row, number, None)
                names = [name for name in fields if not is_empty(fields[name])]
                yield Entry(key, group, place, names)
                number += 1

    def read(self, places):
        rows = []
        for path, group, place in places:
            try:
                table = files.retried(functools.partial(_group, path, group))
                rows.append(_intact(path, _row, table, place))
            except (OSError, DamagedShard) as error:
                rows.append(error)
        return rows

    def parse(self, content, number, context):
        fields = {
            name: plain(value) for name, value in content.items() if value is not None
        }
        key = next((content[name] for name in KEYS if content.get(name)), None)
        return f"{number:08}" if key is None else str(key), fields


def plain(value):
    """A value of a column as other formats have it."""
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():
        return value["path"] if value["bytes"] is None else value["bytes"]
    return value


def _open(path):
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            f"Parquet files need pyarrow: `pip install pyarrow`. Received: {path}"
        ) from error
    return _intact(path, pq.ParquetFile, files.open_file(path))


def _intact(path, read, *arguments):
    """What a function of pyarrow returns; raises `DamagedShard` where it fails."""
    try:
        return read(*arguments)
    except MemoryError:
        raise
    # pyarrow raises many kinds of errors, some of which are an OSError without number.
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DamagedShard(path, None, str(error)) from error


def _group(path, group):
    # Threads that need the same group wait for it, and do not read it as well.
    with _reading:
        return _read_group(path, group)


@functools.lru_cache(OPEN_GROUPS)
def _read_group(path, group):
    return _intact(path, _open(path).read_row_group, group)


def _row(table, place):
    return {name: table[name][place].as_py() for name in table.column_names}
