"""Parquet files, with a row for each image or caption."""

import contextlib
import functools
import threading

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.indexed import DamagedFile, IndexedFiles, Row
from keras_cluster_mask.data.samples import filled, key_of

KEYS = ("__key__", "key", "image_id", "id")
# The number of row groups that are kept in memory. A group is read as a whole.
OPEN_GROUPS = 4
_reading = threading.Lock()


class Parquet(IndexedFiles):
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

    def scan(self, path, context):
        # The cache may hold row groups of an older file of this name.
        _read_group.cache_clear()
        with _open(path) as file:
            count = file.num_row_groups
            for group in range(count):
                table = _intact(path, file.read_row_group, group)
                for place in range(table.num_rows):
                    (row,) = _intact(path, table.slice(place, 1).to_pylist)
                    row = filled(row)
                    image = next((row[k] for k in self._image_keys if k in row), None)
                    if isinstance(image, dict):
                        image = image.get("bytes") or image.get("path")
                    yield Row((group, place), repr(row).encode(), image)

    def read(self, rows):
        found = []
        for path, (group, place) in rows:
            try:
                # The lock prevents threads from reading the same group twice.
                with _reading:
                    table = _read_group(path, group)
                found += _intact(path, table.slice(place, 1).to_pylist)
            except TimeoutError:
                raise
            except (OSError, DamagedFile) as error:
                found.append(error)
        return found

    def parse(self, content, number, context):
        row = filled(content)
        key = next((row[name] for name in KEYS if name in row), f"{number:08}")
        return key_of(key), row


@contextlib.contextmanager
def _open(path):
    # Imported here, since only Parquet files need it.
    import pyarrow.parquet as pq

    # pyarrow reads each column of a group at once, so a buffer would only add bytes.
    with files.open_file(path) as file:
        yield _intact(path, pq.ParquetFile, file.raw)


def _intact(path, read, *arguments):
    """Calls a function of pyarrow, and raises `DamagedFile` if it fails."""
    try:
        return read(*arguments)
    except MemoryError:
        raise
    # pyarrow raises many kinds of errors, including `OSError` without an `errno`.
    except Exception as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise DamagedFile(path, None, str(error)) from error


@functools.lru_cache(OPEN_GROUPS)
def _read_group(path, group):
    with _open(path) as file:
        return _intact(path, file.read_row_group, group)
