"""The parts of an index: one file for each shard, which is built once and then mapped.

A part holds a line of JSON, then 32 bytes for each sample, then the contents of samples
that no file holds. It does not depend on which fields are read as image and caption.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.data import files
from keras_cluster_mask.data.pairs import PairReader, fault_of_fields
from keras_cluster_mask.data.sources import Shard, ShardError, whole_shard

# A change of what a part holds needs a new number.
VERSION = 1
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        ("key", "<u8"),
        # The number of the sample in its file, from 0.
        ("number", "<u4"),
        # The fields and the fault of the sample; see `Part.layouts`.
        ("layout", "<u4"),
    ]
)
# The number of samples that are held as Python objects while a part is built.
CHUNK = 2**14
# The number of shards at addresses whose size and date are asked for at the same time.
REQUESTS = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields that some samples of a shard have in common.

    Attributes:
        fields: dict from the name of a field to what it can be; see `Entry`.
        fault: str, the reason why these samples are broken, or None.
        incomplete: bool. Whether the damage of the shard follows.
        count: int. The number of samples.
    """

    fields: dict
    fault: str | None
    incomplete: bool
    count: int


@dataclasses.dataclass(frozen=True)
class Part:
    """The index of a shard.

    Attributes:
        path: str. The file of the part, or None if the shard cannot be read.
        stamp: str. The size and the date of the shard when it was indexed.
        digest: str. A hash of all records.
        layouts: list of `Layout`.
        damage: The last key and the reason (str), or None if the shard is intact.
        context: What `Shard.sample_at` needs.
        start: int. The offset of the records in the file.
    """

    path: str | None
    stamp: str
    digest: str
    layouts: list
    damage: list | None
    context: list | None = None
    start: int = 0

    def __len__(self):
        return sum(layout.count for layout in self.layouts)

    def records(self):
        """Maps the records into memory."""
        if read_part(self.path).digest != self.digest:
            raise changed(self.path)
        if not len(self):
            return np.empty(0, RECORD)
        return np.memmap(self.path, RECORD, "r", self.start, (len(self),))

    @property
    def content_start(self):
        """int. The offset of the contents that the part itself holds."""
        return self.start + len(self) * RECORD.itemsize


def changed(path: str, reason: str = "its index was replaced") -> ValueError:
    """The error about a shard that is not the one that was indexed."""
    return ValueError(
        "`source` must not change while its index is in use: open the index again. "
        f"Received: {path}, {reason}"
    )


def hash_of(key: str) -> int:
    """The 64-bit hash of a key."""
    content = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# === Faults ===


def faults_of(part: Part, reader: PairReader, label_keys: tuple = ()) -> list:
    """What is wrong with the samples of each layout, or None."""
    faults = []
    for layout in part.layouts:
        fault, _ = fault_of_fields(layout.fields, reader, label_keys)
        if layout.incomplete and fault:
            fault = "damaged shard"
        else:
            fault = layout.fault or fault
        faults.append(fault)
    return faults


def num_pairs(part: Part, reader: PairReader) -> int | None:
    """The number of pairs that a reader finds in a shard.

    Args:
        part: `Part` of the shard.
        reader: `PairReader`.

    Returns:
        int, or None if it depends on the content of JSON files or of labels.
    """
    label_keys = reader.labels.keys if reader.labels else ()
    count = 0
    for layout, fault in zip(part.layouts, faults_of(part, reader, label_keys)):
        if fault:
            continue
        if fault_of_fields(layout.fields, reader, label_keys)[1]:
            return None
        count += layout.count
    return count


# === Places ===


def find_part(path: str, index_dir: str | None = None) -> Part | None:
    """The part of a shard, or None if there is none or the shard has changed."""
    try:
        stamp = whole_shard(path).stamp()
    except OSError:
        return None
    for place in _places(path, index_dir):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            part = read_part(place)
            if part.stamp == stamp:
                return part
    return None


def _places(path, index_dir):
    """The files that may hold the part of a shard, the preferred one first."""
    path = path.rstrip("/")
    name = path.rpartition("/")[2]
    whole = path if files.is_address(path) else os.path.realpath(path)
    unique = f"{name[:100]}-{hash_of(whole):016x}.index"
    if index_dir is not None:
        return [os.path.join(index_dir, unique)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [
        os.path.join(folder, "keras_cluster_mask", "index", unique)
        for folder in (cache, tempfile.gettempdir())
    ]
    if files.is_address(path):
        return places
    return [os.path.join(os.path.dirname(path), f".{name}.index"), *places]


# === Reading and writing ===


def build_parts(
    paths: Sequence[str],
    index_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
    verbose: bool = False,
) -> list[Part]:
    """The parts of shards, of which those that are missing or old are built.

    Args:
        paths: Sequence of str. The shards.
        index_dir: As for `open_index`.
        num_workers: As for `open_index`.
        verbose: As for `open_index`.
    """
    index_dir = None if index_dir is None else os.path.abspath(index_dir)
    find = functools.partial(find_part, index_dir=index_dir)
    with futures.ThreadPoolExecutor(REQUESTS, "find parts") as threads:
        parts = dict(zip(paths, threads.map(find, paths)))
    missing = [path for path, part in parts.items() if part is None]
    build = functools.partial(build_part, index_dir=index_dir)
    bar = tqdm(
        total=len(paths),
        initial=len(paths) - len(missing),
        desc="index",
        unit=" shards",
        disable=not verbose,
    )
    workers = min(num_workers, len(missing))
    with bar:
        if not workers:
            for path in missing:
                parts[path] = build(path)
                bar.update()
            return [parts[path] for path in paths]
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(workers, context) as pool:
            started = {pool.submit(build, path): path for path in missing}
            try:
                for done in futures.as_completed(started):
                    parts[started[done]] = done.result()
                    bar.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    return [parts[path] for path in paths]


def read_part(path: str) -> Part:
    """Reads the first line of a part."""
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        start = file.tell()
        length = file.seek(0, os.SEEK_END)
    if head.pop("version") != VERSION or head.pop("length") != length - start:
        raise ValueError(f"{path} is no part of an index of this version.")
    layouts = [Layout(*layout) for layout in head.pop("layouts")]
    return Part(path=path, layouts=layouts, start=start, **head)


def build_part(path: str, index_dir: str | None = None) -> Part:
    """Indexes a shard, from the headers of its files alone.

    Several processes may build the same part at the same time.

    Args:
        path: str. The shard.
        index_dir: str. The folder for the part. Defaults to `None`: that of the shard,
            or a cache folder if the shard is at an address or in a read-only folder.

    Returns:
        `Part`.

    Raises:
        NoRandomAccess: If the shard is compressed.
        OSError: If the part cannot be written.
    """
    shard = whole_shard(path)
    try:
        stamp = shard.stamp()
        builder = _Builder(shard)
        damage = builder.scan()
        context = None if damage and not builder.count else shard.context()
    except OSError as error:
        layout = Layout({}, "unreadable shard", False, 1)
        return Part(None, "", "", [layout], [None, str(error)])
    records, content = builder.records(), b"".join(builder.contents)
    digest = hashlib.blake2b(records, digest_size=16)
    digest.update(content)
    layouts = builder.layouts()
    digest.update(json.dumps([layouts, damage, context]).encode())
    head = {
        "version": VERSION,
        "length": len(records) + len(content),
        "stamp": stamp,
        "digest": digest.hexdigest(),
        "layouts": layouts,
        "damage": damage,
        "context": context,
    }
    line = json.dumps(head).encode()
    # Records are aligned, as NumPy likes them.
    line += b" " * (-(len(line) + 1) % RECORD.itemsize) + b"\n"
    return read_part(_write(_places(path, index_dir), [line, records, content]))


class _Builder:
    """Collects what a shard holds.

    Args:
        shard: `Shard`.
    """

    def __init__(self, shard: Shard):
        self.contents = []
        self.count = 0
        self._shard = shard
        self._keys = set()
        self._chunks, self._rows = [], []
        # From the fields, the fault and so on to the number of a layout.
        self._numbers, self._counts = {}, []

    def scan(self):
        """Reads the shard; returns the last key and the reason if it is damaged."""
        try:
            for entry in self._shard.scan():
                self._add(entry)
        except ShardError as error:
            last_key = error.last_key
            if last_key is not None:
                last_key = last_key.encode("utf-8", "backslashreplace").decode()
            return [last_key, error.reason]
        return None

    def records(self):
        """The bytes of all records."""
        self._flush()
        return b"".join(self._chunks)

    def layouts(self):
        """The arguments of each `Layout`."""
        return [
            [dict(fields), fault, incomplete, count]
            for (fields, fault, incomplete), count in zip(self._numbers, self._counts)
        ]

    def _add(self, entry):
        key, fault = hash_of(entry.key), entry.fault
        if self._shard.unique_keys:
            if key in self._keys:
                fault = "duplicate key"
            self._keys.add(key)
        layout = tuple(entry.fields.items()), fault, entry.incomplete
        number = self._numbers.setdefault(layout, len(self._numbers))
        if number == len(self._counts):
            self._counts.append(0)
        self._counts[number] += 1
        if entry.content is not None:
            self.contents.append(entry.content)
        self._rows.append((entry.offset, entry.size, key, self.count, number))
        self.count += 1
        if len(self._rows) == CHUNK:
            self._flush()

    def _flush(self):
        self._chunks.append(np.array(self._rows, RECORD).tobytes())
        self._rows = []


def _write(places, contents):
    """Writes a part to the first place that can be written to; returns its path."""
    for place in places:
        temporary = f"{place}.{os.getpid()}-{secrets.token_hex(4)}.part"
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            with open(temporary, "xb") as file:
                file.writelines(contents)
            os.replace(temporary, place)
        except OSError as error:
            reason = error
            with contextlib.suppress(OSError):
                os.remove(temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        else:
            return place
    raise OSError(
        reason.errno or errno.EIO,
        "`index_dir` must be a folder that can be written to; the index of a shard "
        f"needs 32 bytes a sample ({reason.strerror}). Received",
        places[0],
    ) from reason
