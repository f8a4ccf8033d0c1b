"""The parts of an index: one file for each shard, which is built once.

A part holds a line of JSON, then a record for each sample, then the contents of samples
that are stored in the index. It does not depend on which fields are read as image and
caption.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import struct
from concurrent import futures

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats import (
    DamagedShard,
    Entry,
    NoRandomAccess,
    format_of,
)

# Increase this number when the format of parts changes.
VERSION = 1
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        # The hash of the key.
        ("key", "<u8"),
        # The number of the layout: the fields and the fault.
        ("layout", "<u4"),
    ]
)
PACKED = struct.Struct("<QQQI")
# The seconds before a progress bar is shown.
SHORT = 1.0


@dataclasses.dataclass(frozen=True)
class Part:
    """The index of a shard.

    Attributes:
        path: str. The file of the part.
        stamp: str. The size and the date of the shard when it was indexed.
        digest: str. A hash of all records.
        layouts: list of `(fields, fault, count)`: the names of the fields that these
            samples have, the reason why they are broken or None, and the number of
            these samples.
        damage: None, or `(last_key, reason)` of a shard that is damaged.
        context: The result of `Format.context`, for `Format.parse`.
        start: int. The offset of the records in the file.
    """

    path: str
    stamp: str
    digest: str
    layouts: list
    damage: list | None
    context: list | None
    start: int = 0

    def __reduce__(self):
        return read_part, (self.path, self.digest)

    @property
    def num_records(self):
        """int. The number of samples, broken ones included."""
        return sum(count for _, _, count in self.layouts)

    def entry(self, number):
        """Reads the `Entry` of a sample, with the hash of its key.

        No file stays open, because there may be too many parts.
        """
        at = self.start + number * RECORD.itemsize
        record = np.fromfile(self.path, RECORD, 1, offset=at)[0]
        offset, size, key, layout = record.tolist()
        return Entry(key, offset, size, *self.layouts[layout][:2])

    def records(self):
        """Maps the records into memory."""
        if not self.num_records:
            return np.empty(0, RECORD)
        return np.memmap(self.path, RECORD, "r", self.start, (self.num_records,))

    @property
    def content_start(self):
        """int. The offset of the contents that are stored in the part."""
        return self.start + self.num_records * RECORD.itemsize


def hash_of(key):
    """Returns the 64-bit hash of a key."""
    content = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read_part(path, digest=None):
    """Reads the first line of a part.

    Args:
        path: str.
        digest: str. The digest that the part must have, or None for any.
    """
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        start = file.tell()
        length = file.seek(0, os.SEEK_END)
    if head.pop("version") != VERSION or head.pop("length") != length - start:
        raise ValueError(f"{path} is not a part of an index of this version.")
    if digest not in (None, head["digest"]):
        raise ValueError(
            "`source` must not change while it is read: make the dataset again. "
            f"Received: {path}, an index that was replaced"
        )
    return Part(path=path, start=start, **head)


def build_parts(shards, index_dir=None, num_workers=0, process=(0, 1)):
    """Returns the parts of shards, and builds missing and outdated ones.

    Args:
        shards: dict from the paths of shards to their stamps, as of `find_shards`.
        index_dir: str or path. The folder of the parts, or `"beside"` for a hidden file
            in the folder of each shard, if it is local and can be written to. Defaults
            to `None`: a cache folder.
        num_workers: int. The number of processes that build parts; 0 for none.
        process: Pair of ints. The index of this process, and the number of processes
            that build the same parts. Each process starts at a different shard, and
            uses the parts that others have built.

    Returns:
        list of `Part`.
    """
    if index_dir not in (None, "beside"):
        index_dir = os.path.abspath(os.path.expanduser(index_dir))
    parts = {path: _find(path, stamp, index_dir) for path, stamp in shards.items()}
    missing = [path for path, part in parts.items() if part is None]
    first = len(missing) * process[0] // process[1]
    missing = missing[first:] + missing[:first]
    bar = tqdm(
        total=len(shards),
        initial=len(shards) - len(missing),
        desc="index",
        unit=" shards",
        delay=SHORT,
        disable=not missing,
    )
    build = functools.partial(build_part, index_dir=index_dir)
    with bar, contextlib.ExitStack() as stack:
        apply = map
        if num_workers and missing:
            context = multiprocessing.get_context("spawn")
            workers = min(num_workers, len(missing))
            pool = futures.ProcessPoolExecutor(workers, context)
            apply = stack.enter_context(pool).map
        stamps = [shards[path] for path in missing]
        for path, part in zip(missing, apply(build, missing, stamps)):
            parts[path] = part
            bar.update()
    return list(parts.values())


def build_part(path, stamp, index_dir=None):
    """Indexes a shard, unless another process has built its part in the meantime.

    Several processes may build the same part at the same time.

    Args:
        path: str. The shard.
        stamp: str.
        index_dir: See `build_parts`.

    Returns:
        `Part`.

    Raises:
        NoRandomAccess: If the shard does not support random access.
        OSError: If the shard cannot be read, or the part cannot be written.
    """
    if part := _find(path, stamp, index_dir):
        return part
    head, *contents = files.retried(lambda: _scan(path, format_of(path)), path)
    head = {"version": VERSION, "stamp": stamp, **head}
    line = json.dumps(head).encode() + b"\n"
    return read_part(_write(_places(path, index_dir), [line, *contents]))


def _scan(path, format):
    """Scans a shard; returns the part's first line as a dict, records and contents."""
    if files.is_address(path) and not format.in_index:
        _check_ranges(path)
    records, content = bytearray(), bytearray()
    seen, layouts, damage, context = set(), {}, None, None
    try:
        context = format.context(path)
        for entry in format.scan(path):
            key, fault = hash_of(entry.key), entry.fault
            if format.unique_keys:
                fault = "duplicate key" if key in seen else fault
                seen.add(key)
            layout = tuple(sorted(entry.fields)), fault
            number, count = layouts.get(layout, (len(layouts), 0))
            layouts[layout] = number, count + 1
            records += PACKED.pack(entry.offset, entry.size, key, number)
            content += entry.content or b""
    except DamagedShard as error:
        _, last_key, reason = error.args
        if last_key is not None:
            last_key = last_key.encode("utf-8", "backslashreplace").decode()
        damage = last_key, reason
    layouts = [(*layout, count) for layout, (_, count) in layouts.items()]
    digest = hashlib.blake2b(records + content, digest_size=16)
    digest.update(json.dumps([layouts, damage, context]).encode())
    head = {
        "length": len(records) + len(content),
        "digest": digest.hexdigest(),
        "layouts": layouts,
        "damage": damage,
        "context": context,
    }
    return head, records, content


def _check_ranges(path):
    """Raises an error if a web server does not support range requests."""
    reply = files.fetch([(path, 0, 1)])[0]
    if isinstance(reply, Exception):
        raise reply
    if len(reply) > 1:
        kind = "on a server that does not send parts of files: download it"
        raise NoRandomAccess(path, kind)


def _find(path, stamp, index_dir):
    """Returns the part of a shard, or None if it is missing or outdated."""
    for place in _places(path, index_dir):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            part = read_part(place)
            if part.stamp == stamp:
                return part
    return None


def _places(path, index_dir):
    """Returns the possible paths of the part of a shard, in order of preference."""
    name = path.rstrip("/").rpartition("/")[2]
    unique = f"{name[:100]}-{hash_of(path):016x}.index"
    if index_dir not in (None, "beside"):
        return [os.path.join(index_dir, unique)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cached = os.path.join(cache, "keras_cluster_mask", "index", unique)
    if files.is_address(path):
        return [cached]
    beside = os.path.join(os.path.dirname(path.rstrip("/")), f".{name}.index")
    # An index that someone else has put beside the shards is used in any case.
    return [beside, cached] if index_dir else [cached, beside]


def _write(places, contents):
    """Writes a part to the first writable path, and returns this path."""
    for place in places:
        try:
            with files.replacing(place) as file:
                file.writelines(contents)
            return place
        except OSError as error:
            reason = error
    raise OSError(
        "`index_dir` must be a folder that can be written to; the index of a shard "
        f"needs {RECORD.itemsize} bytes a sample ({reason}). Received: {places[0]}"
    ) from reason
