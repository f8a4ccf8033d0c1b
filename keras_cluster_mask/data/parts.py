"""The parts of an index: a file for each shard that says where its samples are.

A part is written once, when a shard is first used, so that later any sample is read by
its number, without a scan of the shard. The file holds, in this order:

| content | size | meaning |
| --- | --- | --- |
| head | a line of JSON | the attributes of `Part` after `stamp`, but not `start` |
| records | 32 bytes each | the place of each sample or row in the shard; see `RECORD` |
| contents | any | the samples of a format that stores samples in the index |
| first rows | 8 bytes each | for each row, the first row with the same image |
| stamp | a short text | the size and the date of the shard, to notice changes |

Only a folder of images has contents, and only a table in which rows share an image has
first rows. For tables, the part also depends on the field that is read as image.

The digest covers the samples, and not the stamp. If a shard gets a new date and no
other change, the new part has the same digest, and can be read in place of the old one.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import mmap
import multiprocessing
import os
import struct
import zlib
from concurrent import futures

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import IMAGE_KEYS, DamagedShard, hash_of
from keras_cluster_mask.data.shards import format_of

# Increase this number when the format of parts changes.
VERSION = 6
# The place of a sample in its shard, the hash of its key, the number of its entry in
# `Part.layouts`, and the checksum of its fields.
RECORD = np.dtype(
    {
        "names": ["place", "key", "layout", "checksum"],
        "formats": ["2<u8", "<u8", "<u4", "<u4"],
    }
)
PACKED = struct.Struct("<QQQII")
# The number of parts that a process keeps open. Each has a file descriptor, of which a
# process may have 256 on macOS and 1,024 on Linux, and a source may have 10,000 shards.
MAX_OPEN = 128
# The fault of files that have the key of a sample, but come later in the shard.
NEIGHBORS = "the files of a sample must be neighbors"
# The fault of rows that name a local image file which does not exist.
MISSING = "the image file is missing"
# The seconds before a progress bar is shown.
SHORT = 1.0


@dataclasses.dataclass(frozen=True)
class Part:
    """The index of a shard.

    Attributes:
        shard: String. The path of the shard.
        path: String. The file of the part.
        stamp: String. The size and the date of the shard when it was indexed.
        digest: String. A hash of all records: of the keys of samples, and of the sizes
            and values of their fields, but not of images.
        layouts: List of `(fields, fault, count)`: the names of the fields that these
            samples have, the reason why they are broken or `None`, and the number of
            these records.
        has_groups: Boolean. Whether several rows have the same image.
        damage: `None`, or `(last_key, reason, share)` of a shard that is damaged; see
            `DamagedShard`.
        context: The result of `Format.context`, for `Format.parse`.
        start: Integer. The offset of the records in the file.
    """

    shard: str
    path: str
    stamp: str
    digest: str
    layouts: list
    has_groups: bool
    damage: list | None
    context: list | None
    start: int = 0

    @property
    def num_records(self):
        """Integer. The number of samples or rows, broken ones included."""
        return sum(count for _, _, count in self.layouts)

    def record(self, number):
        """Reads the record of a sample or row: its place, key hash and checksum."""
        content = _mapped(self.path, self.digest)
        start = self.start + number * RECORD.itemsize
        first, second, key, _, checksum = PACKED.unpack_from(content, start)
        return (first, second), key, checksum

    def records(self):
        """Returns all records, a read-only array."""
        content = _mapped(self.path, self.digest)
        return np.frombuffer(content, RECORD, self.num_records, self.start)

    def first_rows(self):
        """Returns the number of the first row with the same image, for each row."""
        content = _mapped(self.path, self.digest)
        return np.frombuffer(content, "<i8", self.num_records, self._records_end)

    def content(self, place):
        """Returns the content of a sample that is stored in the part."""
        start, size = self._records_end + place[0], place[1]
        return _mapped(self.path, self.digest)[start : start + size]

    @property
    def _records_end(self):
        return self.start + self.num_records * RECORD.itemsize


@functools.lru_cache(MAX_OPEN)
def _mapped(path, digest):
    """Maps a part into memory, unless the file is the part of another digest.

    Threads share the maps of a process.
    """
    head, content = json.dumps({"version": VERSION, "digest": digest})[:-1], b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", 0) as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if content[: len(head)] != head.encode():
        raise ValueError(
            "`source` and its index must not change while they are read: make the "
            f"dataset again. Received: {path}, an index that was replaced or deleted"
        )
    return content


def checksum_of(fields):
    """Returns a hash of the fields of a sample, an integer of 32 bits.

    Args:
        fields: Dictionary from the name of a field to its content. Of bytes, only the
            size counts. Empty fields do not count.
    """
    values = sorted(
        (name, len(value) if isinstance(value, bytes) else value)
        for name, value in fields.items()
        if value not in (None, "")
    )
    return zlib.crc32(ascii(values).encode())


def read_part(shard, path):
    """Reads the head and the stamp of a part of a shard."""
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        start = file.tell()
        file.seek(start + head.pop("length"))
        stamp = file.read().decode()
    if head.pop("version") != VERSION or not stamp:
        raise ValueError(f"{path} is not a part of an index of this version.")
    return Part(shard=shard, path=path, stamp=stamp, start=start, **head)


def build_parts(shards, image_keys, index_dir=None, num_workers=0, process=(0, 1)):
    """Returns the parts of shards, and builds missing and outdated ones.

    Args:
        shards: Dictionary from the paths of shards to their stamps, as of
            `find_shards`.
        image_keys: Tuple of strings. The fields that may hold the image of a row.
        index_dir: String or path. The folder of the parts, or `"beside"` for a hidden
            file in the folder of each shard, if it is local and can be written to.
            Defaults to `None`: a cache folder.
        num_workers: Integer. The number of processes that build parts; 0 for none.
        process: Pair of integers. The index of this process, and the number of
            processes that build the same parts. Each process starts at a different
            shard, and uses the parts that others have built.

    Returns:
        List of `Part`.
    """
    first = len(shards) * process[0] // process[1]
    order = [*shards][first:] + [*shards][:first]
    build = functools.partial(build_part, image_keys=image_keys, index_dir=index_dir)
    with contextlib.ExitStack() as stack:
        apply = map
        if num_workers:
            context = multiprocessing.get_context("spawn")
            pool = futures.ProcessPoolExecutor(num_workers, context)
            apply = stack.enter_context(pool).map
        built = apply(build, order, [shards[path] for path in order])
        built = zip(order, built)
        parts = dict(tqdm(built, "index", len(shards), unit=" files", delay=SHORT))
    return [parts[path] for path in shards]


def build_part(path, stamp, image_keys, index_dir=None):
    """Indexes a shard, unless it has a part that is not outdated.

    Several processes may build the same part at the same time.

    Args:
        path: String. The shard.
        stamp: String.
        image_keys: See `build_parts`.
        index_dir: See `build_parts`.

    Returns:
        `Part`.

    Raises:
        ValueError: If the shard is compressed or of an unknown format.
        OSError: If the shard cannot be read, or the part cannot be written.
    """
    places = _places(path, image_keys, index_dir)
    for place in places:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            part = read_part(path, place)
            # A file that was missing may exist now.
            is_missing = any(fault == MISSING for _, fault, _ in part.layouts)
            if part.stamp == stamp and not is_missing:
                return part
    scan = functools.partial(_scan, path, format_of(path), image_keys)
    head, *contents = files.retried(scan, path)
    contents = json.dumps(head).encode() + b"\n", *contents, stamp.encode()
    # Windows does not replace a file that is open.
    _mapped.cache_clear()
    for place in places:
        try:
            with files.replacing(place) as file:
                file.writelines(contents)
            break
        except OSError as error:
            if place == places[-1]:
                reason = (
                    "`index_dir` must be a folder that can hold the index: free space "
                    f"in it, or pass another. Received: {place}: {error}"
                )
                raise OSError(error.errno, reason) from error
    return read_part(path, place)


def _scan(path, format, image_keys):
    """Scans a shard; returns the head of its part as a dictionary, and the rest."""
    records, content, images = bytearray(), bytearray(), array.array("Q")
    seen, layouts, damage, context = {}, {}, None, None
    try:
        context = format.context(path)
        for entry in format.scan(path):
            key, fault = hash_of(entry.key), entry.fault
            if format.has_rows:
                named = (entry.fields[k] for k in image_keys if k in entry.fields)
                image = next(named, len(images))
                images.append(hash_of(image))
                file = files.beside(path, image) if isinstance(image, str) else ""
                if file and not files.is_address(file) and not os.path.isfile(file):
                    fault = fault or MISSING
            elif key in seen:
                is_rest = not {*seen[key]} & {*entry.fields}
                fault = NEIGHBORS if is_rest else "duplicate key"
            else:
                seen[key] = entry.fields
            layout = tuple(sorted(entry.fields)), fault
            number, count = layouts.get(layout, (len(layouts), 0))
            layouts[layout] = number, count + 1
            checksum = checksum_of(entry.fields)
            records += PACKED.pack(*entry.place, key, number, checksum)
            content += entry.content
    except DamagedShard as error:
        _, last_key, reason, share = error.args
        if last_key is not None:
            last_key = last_key.encode("utf-8", "backslashreplace").decode()
        damage = last_key, reason, share
    _, first, image_of = np.unique(images, return_index=True, return_inverse=True)
    has_groups = len(first) < len(images)
    if has_groups:
        content = first[image_of].astype("<i8").tobytes()
    layouts = [(*layout, count) for layout, (_, count) in layouts.items()]
    digest = hashlib.blake2b(records + content, digest_size=16)
    digest.update(json.dumps([layouts, damage, context]).encode())
    head = {
        # `Part` expects these two first.
        "version": VERSION,
        "digest": digest.hexdigest(),
        "length": len(records) + len(content),
        "layouts": layouts,
        "has_groups": has_groups,
        "damage": damage,
        "context": context,
    }
    return head, records, content


def _places(path, image_keys, index_dir):
    """Returns the possible paths of the part of a shard, in order of preference."""
    name = path.rstrip("/").rpartition("/")[2]
    if image_keys != IMAGE_KEYS and format_of(path).has_rows:
        name += f"-{hash_of(image_keys):016x}"
    unique = f"{name[:100]}-{hash_of(path):016x}.index"
    if index_dir not in (None, "beside"):
        return [os.path.join(os.path.abspath(os.path.expanduser(index_dir)), unique)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cached = os.path.join(cache, "keras_cluster_mask", "index", unique)
    if files.is_address(path):
        return [cached]
    beside = os.path.join(os.path.dirname(path.rstrip("/")), f".{name}.index")
    # An index that someone else has put beside the shards is used in any case.
    return [beside, cached] if index_dir else [cached, beside]
