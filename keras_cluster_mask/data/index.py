"""The index of a source: counts its samples, and reads any sample by its number."""

import bisect
import collections
import contextlib
import functools
import itertools
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from keras_cluster_mask.data.files import Threads
from keras_cluster_mask.data.formats import DamagedShard, format_of
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.objects import ObjectIndex
from keras_cluster_mask.data.pairs import Fault, Pair, PairReader
from keras_cluster_mask.data.parts import (
    SHORT,
    build_parts,
    checksum_of,
    digest_of,
    hash_of,
)
from keras_cluster_mask.data.shards import find_shards
from keras_cluster_mask.data.workers import in_order

# The number of shards with broken samples whose intact samples are cached.
REMEMBERED = 1024
# The maximum size of samples that are read together, and the size that is assumed for
# a sample of unknown size, in bytes.
MAX_TOGETHER = 2**24
GUESS = 2**20
# The fault of a shard that cannot be read to its end.
DAMAGED = "damaged shard"
# The bytes that are read of a broken sample to find its key.
GLANCE = 2**16
# The threads of `read_all`, and the number of samples that each reads together.
READERS, TOGETHER = 16, 16


def open_index(source, reader, index_dir=None, num_workers=0, process=(0, 1)):
    """Opens the index of a source, and builds missing parts.

    Args:
        source: String or path, or a list of them; see `list_shards`. Or an object with
            `__len__` and `__getitem__` whose items are dictionaries. Or a `SourcePart`.
        reader: `PairReader`.
        index_dir: See `build_parts`.
        num_workers: See `build_parts`.
        process: See `build_parts`.

    Returns:
        `Index`, or `ObjectIndex` for an object.
    """
    # `splitting` imports this module, so its class is known by its method.
    if hasattr(source, "open_index"):
        return source.open_index(reader, index_dir, num_workers, process)
    first = source[0] if isinstance(source, list | tuple) and source else ""
    has_names = isinstance(source, str | os.PathLike | list | tuple | set | Mapping)
    if not has_names or not isinstance(first, str | os.PathLike):
        return ObjectIndex(source, reader)
    shards = find_shards(source)
    parts = build_parts(shards, reader.image_keys, index_dir, num_workers, process)
    if reader.labels:
        named = zip(shards, parts)
        folders = [part.context for path, part in named if format_of(path).in_index]
        reader.labels.add_folders({*itertools.chain(*folders)})
    return Index([*shards], parts, reader)


def read_captions(
    source: Any,
    caption_key: str | Sequence[str] | None = None,
) -> list[str]:
    """Reads all captions of a source, for training a tokenizer.

    Example:

    ```python
    captions = kcm.data.read_captions(kcm.data.example_images() / "train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: See `image_text_dataset`, but no dictionary.
        caption_key: String or sequence of strings. The field that holds captions; see
            `image_text_dataset`. Defaults to `None`: common names.

    Returns:
        List of strings, in the order of the samples. Images are neither needed nor
        read.
    """
    index = open_index(source, PairReader((), caption_key))
    for fault in index.damage:
        message = f"{fault.details}. The captions after it are missing."
        warnings.warn(message, stacklevel=2)
    captions, fault = [], None
    for each in index.read(range(len(index)), with_images=False):
        if each.key is None:
            raise OSError(f"{each.reason}: {each.shard}: {each.details}")
        if isinstance(each, Fault):
            fault = fault or each
        else:
            captions.extend(each.captions)
    if not captions:
        raise ValueError(
            "`caption_key` must name a field of `source` with captions. Received: "
            f"caption_key={caption_key}, with the fields {index.fields}, and first "
            f"{fault}"
        )
    return captions


def read_all(index, function, title):
    """Reads all samples in threads, with a progress bar.

    Args:
        index: `Index` or `ObjectIndex`.
        function: Function of a `Pair` or a `Fault`.
        title: String. The title of the progress bar.

    Yields:
        The result of the function for each sample, in order.
    """

    def read(first):
        numbers = range(first, min(first + TOGETHER, len(index)))
        return [*map(function, index.read(numbers))]

    bar = tqdm(total=len(index), desc=title, unit=" samples", delay=SHORT)
    with bar, Threads(READERS) as threads:
        groups = range(0, len(index), TOGETHER)
        for group in in_order(threads, read, groups, ahead=2 * READERS):
            bar.update(len(group))
            yield from group


class Index:
    """The samples of shards, with random access by number.

    Intact samples are numbered in the order of the shards and of the samples in them.
    The rows of one image in a table are one sample, at the place of the first row.
    Broken samples, such as those without an image or a caption, are counted in
    `faults`. Reading is thread-safe. A pickle contains file names, but no content.

    Args:
        paths: List of strings. The shards.
        parts: List of `Part`.
        reader: `PairReader`.
        keep: List of a boolean array `(records,)` for each shard. The records that
            belong to the index, intact or broken. Defaults to `()`: all.

    Attributes:
        paths: List of strings. The shards.
        faults: Counter of the reasons of broken samples. A damaged shard counts as one
            sample, because the number of samples after the damage is unknown.
        damage: List of `Fault`, one for each damaged shard.
        fingerprint: String. Changes with the keys of samples, with their fields, as far
            as `checksum_of` covers them, and with the names of the fields that are
            read, but not if files are moved.
        stamps: List of strings, which change with the dates of the shards.
    """

    def __init__(self, paths, parts, reader, keep=()):
        self.paths, self._parts, self._reader = paths, parts, reader
        self._keep, kept = keep, keep or itertools.repeat(True)
        self._shards = [_Shard(*each, reader) for each in zip(paths, parts, kept)]
        counts = [shard.counts() for shard in self._shards]
        # The number of the first sample of each shard, and the total number of samples.
        self._starts = [0, *itertools.accumulate(each.pop(None, 0) for each in counts)]
        self.faults = sum(counts, collections.Counter())
        self.damage = [
            Fault(path, None, DAMAGED, str(DamagedShard(path, *part.damage)))
            for path, part in zip(paths, parts)
            if part.damage
        ]
        selected = [hash_of(each.tobytes()) for each in keep]
        digests = [p.digest for p in parts]
        self.fingerprint = digest_of([reader.describe(), digests, selected])
        self.stamps = [p.stamp for p in parts]
        self._intact = functools.lru_cache(REMEMBERED)(_Shard.intact)

    def __len__(self):
        return self._starts[-1]

    def __reduce__(self):
        return Index, (self.paths, self._parts, self._reader, self._keep)

    @property
    def fields(self):
        """Set of strings. The fields of all samples."""
        return {name for p in self._parts for each in p.layouts for name in each[0]}

    def select(self, keep):
        """Returns the `Index` of those records that `keep` chooses, too."""
        keep = [shard.keep & each for shard, each in zip(self._shards, keep)]
        return Index(self.paths, self._parts, self._reader, keep)

    def record_hashes(self, of_samples):
        """Yields the hashes of all records of each shard, a uint64 array `(records,)`.

        Args:
            of_samples: uint64 array `(len,)`. The hash of each sample, for its records.
                Other records have the hash of their key.
        """
        for first, shard in zip(self._starts, self._shards):
            numbers, starts = self._intact(shard)
            samples = of_samples[first : first + len(starts) - 1]
            hashes = shard.part.records()["key"].copy()
            hashes[numbers] = np.repeat(samples, np.diff(starts))
            yield hashes

    def key_hashes(self):
        """Returns the hash of each key, as a uint64 array `(len,)`; see `hash_of`."""
        hashes = [np.empty(0, "u8")]
        for shard in self._shards:
            numbers, starts = self._intact(shard)
            hashes.append(shard.part.records()["key"][numbers[starts[:-1]]])
        return np.concatenate(hashes)

    def row_groups(self):
        """Returns the mean number of row groups of Parquet that a sample is read from.

        `None` without such samples.
        """
        read, samples = 0, 0
        for shard in self._shards:
            if isinstance(shard.format, Parquet):
                numbers, starts = self._intact(shard)
                groups = shard.part.records()["offset"][numbers]
                # Neighbors on both sides of a border are no reason to sort.
                is_apart = np.diff(numbers, prepend=-2) != 1
                is_apart &= np.diff(groups, prepend=-1) != 0
                is_apart[starts[:-1]] = True
                read += np.count_nonzero(is_apart)
                samples += len(starts) - 1
        return read / samples if samples else None

    def examples(self, count):
        """Yields a `Fault` for the first `count` broken samples of each reason.

        Their keys are read from the shards.
        """
        yield from self.damage[:count]
        for reason in self.faults:
            faults = (f for shard in self._shards for f in shard.broken(reason))
            yield from itertools.islice(faults, count)

    def read(self, numbers, with_images=True):
        """Reads samples in order, and neighbors in a shard together.

        Args:
            numbers: Iterable of integers, from 0 to `len(index) - 1`.
            with_images: Boolean. Whether to read the image files that samples name.

        Yields:
            `Pair`, or `Fault` for a sample that cannot be read or turns out to be
            broken. Only a few are in memory at a time.

        Raises:
            ValueError: If a shard has changed since it was indexed.
        """
        group, size = [], 0
        for number in numbers:
            which = bisect.bisect_right(self._starts, number) - 1
            shard, row = self._shards[which], number - self._starts[which]
            rows = [row]
            if not shard.is_whole:
                intact, starts = self._intact(shard)
                rows = intact[starts[row] : starts[row + 1]].tolist()
            rows = [(shard.format, shard, row, shard.part.entry(row)) for row in rows]
            has_more = shard.format.names_files
            of_sample = GUESS if has_more else sum(entry.size for *_, entry in rows)
            if group and size + of_sample > MAX_TOGETHER:
                yield from self._read(group, with_images)
                group, size = [], 0
            group.append(rows)
            size += of_sample
        yield from self._read(group, with_images)

    def _read(self, samples, with_images):
        """Returns the `Pair` or the `Fault` of each sample, a list of rows.

        A row is a tuple: its format, its shard, its number there and its `Entry`.
        """
        found, results = [], []
        rows = itertools.chain(*samples)
        for format, group in itertools.groupby(rows, operator.itemgetter(0)):
            places = [place for _, *place in group]
            for place, content in zip(places, _contents(format, places)):
                found.append(self._pair(*place, content))
        found = iter(found)
        for sample in samples:
            several = [*itertools.islice(found, len(sample))]
            pairs = [row for row in several if isinstance(row, Pair)]
            first = pairs[0] if pairs else several[0]
            if any(pair.label != first.label for pair in pairs):
                reason = "rows of one image with different labels"
                first = Fault(first.shard, first.key, reason)
            elif len(pairs) > 1:
                captions = itertools.chain(*(pair.captions for pair in pairs))
                first = first._replace(captions=tuple(captions))
            results.append(first)
        return self._reader.with_images(results) if with_images else results

    def _pair(self, shard, number, entry, content):
        path, format = shard.path, shard.format
        if isinstance(content, Exception):
            return Fault(path, None, "the shard cannot be read", str(content))
        reason = "another sample is in its place"
        try:
            key, fields = format.parse(content, number, shard.part.context)
            same = hash_of(key) == entry.key and checksum_of(fields) == entry.checksum
        except MemoryError:
            raise
        except Exception as error:
            same, reason = False, repr(error)
        if not same:
            raise ValueError(
                "`source` must not change while it is read: make the dataset again. If "
                "that does not help, since the file has the size and the date of an "
                f"older one, delete its index first, {shard.part.path}. "
                f"Received: {path}, sample {number} of its index: {reason}"
            )
        return self._reader.pair(path, key, fields, format.names_files)


class _Shard:
    """A shard and its part of the index.

    Args:
        path: String.
        part: `Part`.
        keep: Boolean array `(records,)`, the records that are read, or `True`: all.
        reader: `PairReader`.
    """

    def __init__(self, path, part, keep, reader):
        self.path, self.part, self.keep, self.reader = path, part, keep, reader
        self.format = format_of(path)
        # For each layout, the reason why its samples are broken, or None.
        self.reasons = [fault or reader.fault_of(x) for x, fault, _ in part.layouts]
        # Whether each record is a sample.
        self.is_whole = not (any(self.reasons) or part.has_groups or keep is not True)

    def counts(self):
        """Counts broken samples by reason, and intact samples under `None`."""
        counts = collections.Counter()
        for reason, (_, _, count) in zip(self.reasons, self.part.layouts):
            counts[reason] += count
        if self.keep is not True:
            counts = +collections.Counter({x: len(self._numbers(x)) for x in counts})
        if self.part.damage:
            counts[DAMAGED] += 1
        if self.part.has_groups:
            counts[None] = len(self.intact()[1]) - 1
        return counts

    def broken(self, reason):
        """Yields a `Fault` for each record that is broken for a reason.

        Its key is that in the shard, if the shard can be read.
        """
        if reason not in self.reasons:
            return
        for number in self._numbers(reason).tolist():
            entry, names_files = self.part.entry(number), self.format.names_files
            key, details = None, None
            # In a tar, the first header contains the key, and its file may be large.
            if not names_files:
                entry = entry._replace(size=min(entry.size, GLANCE))
            with contextlib.suppress(Exception):
                (content,) = _contents(self.format, [(self, number, entry)])
                key, fields = self.format.parse(content, number, self.part.context)
                # The image file that a row names may be missing.
                details = self.reader.pair(self.path, key, fields, names_files).path
            yield Fault(self.path, key, reason, details or None)

    def _numbers(self, reason):
        """Returns the numbers of the records that are broken for a reason, or intact.

        Args:
            reason: String, or `None` for the intact records.
        """
        has_reason = np.array([each == reason for each in self.reasons], bool)
        return np.flatnonzero(has_reason[self.part.records()["layout"]] & self.keep)

    def intact(self):
        """Returns the numbers of the intact records, sorted by sample, and the starts.

        Those of the sample `n` are `numbers[starts[n] : starts[n + 1]]`.
        """
        numbers = self._numbers(None)
        firsts = self.part.first_rows()[numbers] if self.part.has_groups else numbers
        order = np.argsort(firsts, kind="stable")
        starts = np.flatnonzero(np.diff(firsts[order], prepend=-1, append=-2))
        return numbers[order], starts


def _contents(format, places):
    """Reads the content of rows, or errors.

    Args:
        format: `Format`.
        places: List of the shard, the number there and the `Entry` of each row.
    """
    if format.in_index:
        return [shard.part.content(entry) for shard, _, entry in places]
    return format.read([(shard.path, x.offset, x.size) for shard, _, x in places])
