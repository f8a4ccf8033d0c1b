"""Files as a source: their samples are found once, and then read by their number.

The index of a file says where its rows are. It is a file in a cache folder, named by
the path, the size and the date of the file, written when that is first used, and mapped
into memory: a line of JSON, and 24 bytes for each row, its place and its sample.
"""

import array
import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import warnings
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import (
    ERROR,
    FILE,
    IMAGE_KEYS,
    KEY,
    BrokenSample,
    digest_of,
    hash_of,
    merged,
)
from keras_cluster_mask.data.sources import Source

# Increase this number when the format of the index changes.
VERSION = 6
# The number of indexes that a process keeps open. Each has a file descriptor, of which
# a process may have 256 on macOS and 1,024 on Linux.
MAX_OPEN = 128
# The place of a row, two integers, and the number of its sample.
ROW_BYTES = 24
# The seconds before a progress bar is shown.
SHORT = 1.0


class DamagedFile(ValueError):
    """A file that cannot be read to its end.

    Args:
        path: String.
        last_key: String, the key of the last sample that was found, or `None`.
        reason: String.
        lost: Float, the share of its bytes after the damage. Defaults to `None`: the
            file ends too early, and how much is missing is unknown.
    """

    def __init__(self, path, last_key, reason, lost=None):
        place = f"after the sample {last_key!r}" if last_key else "at its start"
        super().__init__(f"{path} is damaged {place}: {reason}")
        self.lost = lost


class Row(NamedTuple):
    """What a scan finds of a sample, or of a row that may be a part of one.

    Attributes:
        place: Pair of integers, by which the format finds the row again.
        facts: Bytes that identify it.
        image: What rows of one sample share; `None` for a sample of its own.
    """

    place: tuple[int, int]
    facts: bytes
    image: Any = None


class IndexedFiles(Source):
    """The samples of files of one format, a source; see `open_source`.

    Files are in the given order, and samples in the order of their first rows. Reading
    is thread-safe. A pickle holds the names of files and no samples. The samples after
    the damage of a file count, and are broken. How many these are is estimated.

    Args:
        stamps: Dictionary from the path of each file to a string that changes with it.
        image_keys: Sequence of strings. The columns that may hold the image.

    Attributes:
        stamps: The argument.
        fingerprint: String. A hash of the facts of all rows.
    """

    # The word for such a file in messages.
    noun = "table"

    def __init__(self, stamps, image_keys=IMAGE_KEYS):
        self.stamps, self._image_keys = stamps, tuple(image_keys)
        bar = tqdm(stamps, "index", unit=" files", delay=SHORT)
        self._parts = [self._open(path) for path in bar]
        self.fingerprint = digest_of([part["digest"] for part in self._parts])
        damaged = [part for part in self._parts if part["damage"]]
        intact = [part["samples"] for part in self._parts if not part["damage"]]
        lost = [_lost(part, intact) for part in self._parts]
        counts = (part["samples"] + n for part, n in zip(self._parts, lost))
        self._ends = [*itertools.accumulate(counts)]
        if damaged:
            warnings.warn(
                f"{damaged[0]['damage'][0]}. About {sum(lost)} samples are lost in "
                f"{len(damaged)} damaged files, and count as broken.",
                stacklevel=2,
            )

    def __len__(self):
        return self._ends[-1]

    def __getitems__(self, numbers):
        samples = [self._sample(number) for number in numbers]
        rows = [
            (part["path"], place) for part, _, places in samples for place in places
        ]
        contents = iter(self.read(rows))
        return [
            self._item(part, number, [next(contents) for _ in places])
            for part, number, places in samples
        ]

    def _sample(self, number):
        """Returns the part, the number and the places of the rows of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect.bisect_right(self._ends, number)
        part = self._parts[which]
        number -= self._ends[which - 1] if which else 0
        rows = _rows(part["index"], part["start"], part["rows"])
        first, stop = number, number + 1
        if part["rows"] > part["samples"]:
            first, stop = (bisect.bisect_left(rows[:, 2], n) for n in (first, stop))
        return part, number, rows[first:stop, :2].tolist()

    def _item(self, part, number, contents):
        """Returns a sample of a file, with the contents of its rows."""
        key, items = str(number), []
        try:
            if not contents:
                raise BrokenSample(f"damaged {self.noun}", part["damage"][0])
            for content in contents:
                if isinstance(content, Exception):
                    reason = f"the {self.noun} cannot be read"
                    raise BrokenSample(reason, str(content))
                of_row, item = self.parse(content, number, part["context"])
                key = key if items else of_row
                items.append(item)
        except BrokenSample as error:
            return {KEY: key, FILE: part["path"], ERROR: error}
        return {**merged(items), KEY: key, FILE: part["path"]}

    # === Of a format ===

    def context(self, path):
        """Returns the data on a file that `parse` needs, as JSON values."""
        return None

    def scan(self, path, context):
        """Finds the rows of a file in order.

        Yields:
            `Row`.

        Raises:
            DamagedFile: After the last intact row.
            ValueError: If the file has another format.
            OSError: If the file cannot be read.
        """
        raise NotImplementedError

    def read(self, rows):
        """Reads rows of any files.

        Args:
            rows: List of the path and the `Row.place` of each row.

        Returns:
            List of the content for `parse`, or an error, for each row.
        """
        return files.read_ranges([(path, a, a + size) for path, (a, size) in rows])

    def parse(self, content, number, context):
        """Returns the key of a row, a string, and its fields, a dictionary.

        Args:
            content: Bytes, or another result of `read`.
            number: Integer. The number of the sample in its file.
            context: The result of `context`.

        Raises:
            BrokenSample: If the row is broken.
        """
        raise NotImplementedError

    # === The index ===

    def _open(self, path):
        """Opens the index of a file. Several processes may write the same one."""
        identity = path, self.stamps[path], self._image_keys, VERSION
        name = f"{os.path.basename(path)[:100]}-{hash_of(identity):016x}.index"
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        index = os.path.join(cache, "keras_cluster_mask", "index", name)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return _head(path, index)
        content = self._scanned(path)
        try:
            with files.replacing(index) as file:
                file.write(content)
        except OSError as error:
            reason = (
                "The index of `source` cannot be written to the cache folder: free "
                "some space, or set the environment variable XDG_CACHE_HOME to another "
                f"folder. Received: {index}: {error}"
            )
            raise OSError(error.errno, reason) from error
        return _head(path, index)

    def _scanned(self, path):
        """Scans a file, and returns the content of its index."""
        rows, digest = array.array("q"), hashlib.blake2b(digest_size=16)
        damage, context = None, None
        try:
            context = self.context(path)
            for row in self.scan(path, context):
                image = len(rows) if row.image is None else hash_of(row.image) >> 1
                rows.extend((*row.place, image))
                digest.update(b"%d %b" % (len(row.facts), row.facts))
        except DamagedFile as error:
            damage = str(error).encode("utf-8", "replace").decode(), error.lost
        rows = np.array(rows, "<i8").reshape(-1, 3)
        # Samples are in the order of their first rows.
        _, first, sample = np.unique(rows[:, 2], return_index=True, return_inverse=True)
        rows[:, 2] = np.argsort(np.argsort(first))[sample]
        rows = rows[np.argsort(rows[:, 2], kind="stable")]
        head = {
            "digest": digest.hexdigest(),
            "rows": len(rows),
            "samples": len(first),
            "damage": damage,
            "context": context,
        }
        return json.dumps(head).encode() + b"\n" + rows.tobytes()


def _head(path, index):
    """Reads the head of the index of a file."""
    with open(index, "rb") as file:
        head, start = json.loads(file.readline()), file.tell()
    if os.path.getsize(index) != start + head["rows"] * ROW_BYTES:
        raise ValueError(f"{index} is damaged.")
    return {**head, "path": path, "index": index, "start": start}


def _lost(part, intact):
    """Estimates the number of samples after the damage of a file.

    Args:
        part: The head of its index.
        intact: List of the numbers of samples of intact files.
    """
    if not part["damage"]:
        return 0
    found, (_, lost) = part["samples"], part["damage"]
    largest = max(intact, default=0)
    whole = largest if largest > found else 2 * found
    if found and lost is not None:
        whole = found / (1 - lost)
    return max(round(whole) - found, 1)


@functools.lru_cache(MAX_OPEN)
def _rows(index, start, count):
    """Maps the rows of an index into memory; threads share the maps of a process."""
    if not count:
        return np.empty((0, 3), "<i8")
    return np.asarray(np.memmap(index, "<i8", "r", start, (count, 3)))
