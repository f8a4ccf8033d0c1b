"""An index of samples: how many there are, and each of them by its number."""

import bisect
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import typing
from collections.abc import Mapping

import numpy as np

from keras_cluster_mask.data.formats import DamagedShard, Format, format_of
from keras_cluster_mask.data.formats.parquet import plain
from keras_cluster_mask.data.pairs import Fault, SampleError
from keras_cluster_mask.data.parts import build_parts, hash_of, read_part
from keras_cluster_mask.data.shards import find_shards

# The number of shards with broken samples of which the intact ones are remembered.
REMEMBERED = 1024
# What is read together, in bytes, and the bytes of a sample where they are not known.
MAX_TOGETHER = 2**24
GUESS = 2**20
# What is read of a broken sample to learn its key.
GLANCE = 2**16


def open_index(
    source, reader, index_dir=None, num_workers=0, verbose=None, process=(0, 1)
):
    """Opens the index of a source, and builds what is missing.

    Args:
        source: str or path, or a list of them; see `list_shards`. Or an object with
            `__len__` and `__getitem__` whose items are dicts.
        reader: `PairReader`.
        index_dir: As for `build_parts`.
        num_workers: As for `build_parts`.
        verbose: As for `build_parts`.
        process: As for `build_parts`.

    Returns:
        `Index`, or `ObjectIndex` for an object.
    """
    is_list = isinstance(source, list | tuple)
    first = source[0] if is_list and source else None
    if isinstance(first, Mapping) or (
        hasattr(source, "__getitem__") and not isinstance(source, str) and not is_list
    ):
        if index_dir is not None:
            raise ValueError(
                "`index_dir` is for files: an object has no index. Received: "
                f"index_dir={index_dir!r}, source of type {type(source).__name__}"
            )
        return ObjectIndex(source, reader)
    shards = find_shards(source)
    parts = build_parts(shards, index_dir, num_workers, verbose, process)
    return Index(list(shards), parts, reader)


class Faults(typing.NamedTuple):
    """What an index leaves out.

    Attributes:
        by_reason: dict from each reason to the number of broken samples. A damaged
            shard counts as one, because the number of samples after the damage is
            unknown.
        by_shard: dict from the names of shards with faults to such dicts.
        details: list of str, about each damaged shard.
    """

    by_reason: dict
    by_shard: dict
    details: list


class Index:
    """The samples of shards, each of which can be read by its number.

    Samples have the order of the shards and of the samples in them. Those that lack an
    image or a caption have no number, and are counted by `faults`. Reading is safe in
    several threads. A pickle holds the names of files and not their content.

    Args:
        paths: list of str. The shards.
        parts: list of `Part`.
        reader: `PairReader`.
        copies: dict from the paths of shards to those of copies that are read instead.

    Attributes:
        paths: list of str. The shards.
        faults: `Faults`.
        fingerprint: str. Differs if the samples differ or other fields are read, but
            not if files have been moved.
    """

    def __init__(self, paths, parts, reader, copies=None):
        self.paths = paths
        self._copies = copies or {}
        self._parts = parts
        self._reader = reader
        self._faulty = [
            [reader.fault_of(*each[:2]) for each in p.layouts] for p in parts
        ]
        counts = [
            sum(
                count for (_, _, count), fault in zip(part.layouts, faulty) if not fault
            )
            for part, faulty in zip(parts, self._faulty)
        ]
        # The number of the first sample of each shard, and the number of all samples.
        self._starts = [0, *itertools.accumulate(counts)]
        digests = [part.digest for part in parts]
        self.fingerprint = _digest([reader.describe(), digests])
        self._intact = functools.lru_cache(REMEMBERED)(self._find_intact)

    def __len__(self):
        return self._starts[-1]

    @property
    def fields(self):
        """set of str. The fields of all samples."""
        return {name for p in self._parts for each in p.layouts for name in each[0]}

    @functools.cached_property
    def faults(self):
        by_shard, details = {}, []
        for path, part, faulty in zip(self.paths, self._parts, self._faulty):
            counts = collections.Counter()
            for (_, _, count), fault in zip(part.layouts, faulty):
                if fault:
                    counts[fault] += count
            if part.damage:
                counts["damaged shard"] += 1
                details.append(str(DamagedShard(path, *part.damage)))
            if counts:
                by_shard[path] = dict(sorted(counts.items()))
        total = sum(map(collections.Counter, by_shard.values()), collections.Counter())
        return Faults(dict(sorted(total.items())), by_shard, details)

    def key_hashes(self):
        """The hashes of the keys of all samples, as of `hash_of`, uint64 `(len,)`."""
        hashes = [np.empty(0, "u8")]
        for shard, (part, faulty) in enumerate(zip(self._parts, self._faulty)):
            of_part = part.records()["key"]
            hashes.append(of_part[self._intact(shard)] if any(faulty) else of_part)
        return np.concatenate(hashes)

    def broken(self):
        """Yields a `Fault` for each broken sample, whose key is read from its shard."""
        for shard, (path, part) in enumerate(zip(self.paths, self._parts)):
            if part.damage:
                yield Fault(path, part.damage[0], "damaged shard", part.damage[1])
            faulty = self._faulty[shard]
            for number, record in enumerate(part.records() if any(faulty) else ()):
                if fault := faulty[record["layout"]]:
                    key, place = None, self._place(shard, number, record)
                    place_path, offset, size = place.span
                    # The first file of a tar has the key, and may be large.
                    size = min(size, GLANCE) if place.format.has_images else size
                    with contextlib.suppress(Exception):
                        content = place.format.read([(place_path, offset, size)])[0]
                        key, _ = place.format.parse(content, number, part.context)
                    yield Fault(path, key, fault)

    def read_in_turn(self, numbers):
        """Yields the samples that `read` returns; few are in memory at a time."""
        group, size = [], 0
        for place in map(self._find, numbers):
            of_sample = place.span[2] if place.format.has_images else GUESS
            if group and size + of_sample > MAX_TOGETHER:
                yield from self._read(group)
                group, size = [], 0
            group.append(place)
            size += of_sample
        yield from self._read(group)

    def read(self, numbers, with_images=True):
        """Reads samples; neighbours in a shard together.

        Args:
            numbers: list of int, from 0 to `len(index) - 1`.
            with_images: bool. Whether to read the image files that samples name.

        Returns:
            list of `Pair`, or of `Fault` for samples that cannot be read or turn out to
            be broken.

        Raises:
            ValueError: If a shard changed since it was indexed.
        """
        return self._read([self._find(number) for number in numbers], with_images)

    def _read(self, places, with_images=True):
        results, by_format = [None] * len(places), {}
        for index, place in enumerate(places):
            by_format.setdefault(place.format, []).append(index)
        for format, indices in by_format.items():
            contents = format.read([places[index].span for index in indices])
            for index, content in zip(indices, contents):
                results[index] = self._pair(places[index], content)
        return self._reader.with_images(results) if with_images else results

    def _find(self, number):
        """The `_Place` of a sample."""
        shard = bisect.bisect_right(self._starts, number) - 1
        number -= self._starts[shard]
        if any(self._faulty[shard]):
            number = int(self._intact(shard)[number])
        return self._place(shard, number, self._parts[shard].record(number))

    def _place(self, shard, number, record):
        path, offset = self.paths[shard], int(record["offset"])
        path = self._copies.get(path, path)
        format = format_of(path)
        if format.in_index:
            path = self._parts[shard].path
            offset += self._parts[shard].content_start
        span = path, offset, int(record["size"])
        return _Place(shard, number, format, span, int(record["key"]))

    def _pair(self, place, content):
        path, format = self.paths[place.shard], place.format
        if isinstance(content, Exception):
            return Fault(path, None, "the shard cannot be read", str(content))
        context = self._parts[place.shard].context
        reason = "another sample is in its place"
        try:
            key, fields = format.parse(content, place.number, context)
            same = hash_of(key) == place.key
        except MemoryError:
            raise
        except Exception as error:
            same, reason = False, repr(error)
        if not same:
            raise ValueError(
                "`source` must not change while it is read: make the dataset again. "
                f"Received: {path}, sample {place.number} of its index: {reason}"
            )
        return self._reader.pair(
            path, key, fields, lambda name: format.path_of(path, name)
        )

    def _find_intact(self, shard):
        """The numbers of the intact samples of a shard."""
        faulty = np.array([fault is not None for fault in self._faulty[shard]], bool)
        return np.flatnonzero(~faulty[self._parts[shard].records()["layout"]])

    def __getstate__(self):
        paths = [part.path for part in self._parts]
        return self.paths, paths, self._reader, self._copies, self.fingerprint

    def __setstate__(self, state):
        paths, parts, reader, copies, fingerprint = state
        self.__init__(paths, [read_part(part) for part in parts], reader, copies)
        if self.fingerprint != fingerprint:
            raise ValueError(
                "`source` must not change while it is read: make the dataset again. "
                f"Received: {paths[0]} and others, whose index was replaced"
            )


class _Place(typing.NamedTuple):
    """Where a sample is: its shard, its number in it, its bytes, and its hash."""

    shard: int
    number: int
    format: Format
    span: tuple
    key: int


class ObjectIndex:
    """The samples of an object with `__len__` and `__getitem__`.

    The key of a sample is its entry `"__key__"`, or its number. What is wrong with a
    sample shows when it is read. Has the methods and attributes of `Index`.

    Args:
        source: The object. Its items are dicts; an image is bytes, the name of a file,
            a dict of `"bytes"` and `"path"`, or a `PIL.Image.Image`.
        reader: `PairReader`.
    """

    def __init__(self, source, reader):
        self._source, self._reader = source, reader
        self.paths = [type(source).__name__]
        self.faults = Faults({}, {}, [])
        first = source[0] if len(source) else ()
        self.fields = set(first) if isinstance(first, Mapping) else set()
        identity = str(getattr(source, "_fingerprint", None))
        self.fingerprint = _digest(
            [*self.paths, identity, len(source), reader.describe()]
        )

    def __len__(self):
        return len(self._source)

    def key_hashes(self):
        """See `Index.key_hashes`. Keys other than numbers are read with their samples.

        The first sample shows whether there are any.
        """
        keys = map(str, range(len(self)))
        if "__key__" in self.fields:
            keys = (self._pair(number).key for number in range(len(self)))
        return np.fromiter(map(hash_of, keys), "u8", len(self))

    def broken(self):
        """Nothing: what is broken shows when it is read."""
        return iter(())

    def read_in_turn(self, numbers):
        """Yields samples; see `Index.read_in_turn`."""
        for number in numbers:
            yield from self.read([number])

    def read(self, numbers, with_images=True):
        """Reads samples; see `Index.read`."""
        results = [self._pair(int(number)) for number in numbers]
        return self._reader.with_images(results) if with_images else results

    def _pair(self, number):
        try:
            sample = self._source[number]
        # What Pillow raises where an object decodes its images.
        except (OSError, SyntaxError) as error:
            reason = "the sample cannot be read"
            return Fault(self.paths[0], str(number), reason, str(error))
        except Exception as error:
            raise SampleError(self.paths[0], str(number), repr(error)) from error
        if not isinstance(sample, Mapping):
            raise ValueError(
                "`source` must give samples that are dicts from the names of fields to "
                f"their content. Received: a {type(sample).__name__} as sample {number}"
            )
        fields = {k: plain(v) for k, v in sample.items() if v is not None}
        key = str(fields.pop("__key__", number))
        return self._reader.pair(self.paths[0], key, fields, lambda name: name)


def _digest(content):
    content = json.dumps(content).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
