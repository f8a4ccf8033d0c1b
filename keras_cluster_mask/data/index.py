"""The index of a source: counts its samples, and reads any sample by its number."""

import bisect
import collections
import contextlib
import functools
import itertools
import os
from collections.abc import Mapping

import numpy as np

from keras_cluster_mask.data.formats.folder import Folder
from keras_cluster_mask.data.objects import ObjectIndex
from keras_cluster_mask.data.parts import build_parts, checksum_of
from keras_cluster_mask.data.samples import (
    DamagedShard,
    Fault,
    Sample,
    digest_of,
    digest_of_files,
    digest_of_samples,
    hash_of,
    read_images,
)
from keras_cluster_mask.data.shards import find_shards, format_of

# The number of shards with broken samples for which intact samples are cached.
REMEMBERED = 1024
# The maximum size of samples that are read together, and the size that is assumed for
# a sample of unknown size, in bytes.
MAX_TOGETHER = 2**24
GUESS = 2**20
# The bytes that are read of a broken sample to find its key.
GLANCE = 2**16


def open_index(source, fields, index_dir=None, num_workers=0, process=(0, 1)):
    """Opens the index of a source, and builds missing parts.

    Args:
        source: String or path, or a list of them; see `list_shards`. Or an object with
            `__len__` and `__getitem__` that holds dictionaries. Or a `SourcePart`.
        fields: `Fields`.
        index_dir: See `build_parts`.
        num_workers: See `build_parts`.
        process: See `build_parts`.

    Returns:
        `Index`, or `ObjectIndex` for an object.
    """
    # `splitting` imports this module, so its class is known by its method.
    if hasattr(source, "open_index"):
        return source.open_index(fields, index_dir, num_workers, process)
    first = source[0] if isinstance(source, list | tuple) and source else ""
    has_names = isinstance(source, str | os.PathLike | list | tuple | set | Mapping)
    if not has_names or not isinstance(first, str | os.PathLike):
        return ObjectIndex(source, fields)
    shards = find_shards(source)
    parts = build_parts(shards, fields.image_keys, index_dir, num_workers, process)
    if fields.labels:
        folders = [x.context for x in parts if isinstance(format_of(x.shard), Folder)]
        fields.labels.add_folders({*itertools.chain(*folders)})
    return Index(parts, fields)


def no_intact_sample(index, examples=()):
    """Returns the error for a source without samples that can be read.

    Args:
        index: `Index` or `ObjectIndex`.
        examples: Sequence of `Fault`, of samples that were read.
    """
    faults = collections.Counter(fault.reason for fault in examples) + index.faults
    known = itertools.chain(examples, index.examples(1), index.paths)
    names = sorted(name for name in index.fields if not name.endswith("."))
    return ValueError(
        f"`source` has no intact sample: {next(known)}. Each sample needs one "
        f"of these fields: {index.wanted}. `image_keys`, `caption_key` and "
        "`label_key` choose other fields. Received: "
        f"{dict(faults) or 'no sample'} with the fields {names}"
    )


class Index:
    """The samples of shards, with random access by number.

    Intact samples are numbered in the order of the shards and of the samples in them.
    The rows of one image in a table are one sample, at the place of the first row.
    Broken samples, such as those without an image or a caption, are counted in
    `faults`. Reading is thread-safe. A pickle contains file names, but no content.

    Args:
        parts: List of `Part`.
        fields: `Fields`.
        keep: List of a boolean array `(records,)` for each shard. The records that
            belong to the index, intact or broken. Defaults to `()`: all.

    Attributes:
        paths: List of strings. The shards.
        faults: Counter of the reasons of broken samples. Samples that a damaged file
            has lost are counted by estimate, at least one for each such file.
        damage: List of `Fault`, one for each damaged file.
        stamps: List of strings, which change with the dates of the shards.
        wanted: Dictionary of the fields that a sample needs, see `Fields.wanted`.
    """

    def __init__(self, parts, fields, keep=()):
        self._parts, self._fields, self._keep = parts, fields, keep
        kept = keep or itertools.repeat(True)
        self._shards = [_Shard(*each, fields) for each in zip(parts, kept)]
        # The number of the first sample of each shard, and the total number of samples.
        self._starts = [0, *itertools.accumulate(each.count for each in self._shards)]
        largest = max(each.size if each.share else 0 for each in self._shards)
        self.damage = [
            each.count_lost(largest) for each in self._shards if each.part.damage
        ]
        self.faults = sum((each.faults for each in self._shards), collections.Counter())
        self.paths = [part.shard for part in parts]
        self.stamps = [part.stamp for part in parts]
        self.wanted = fields.wanted
        self._intact = functools.lru_cache(REMEMBERED)(_Shard.intact)

    def __len__(self):
        return self._starts[-1]

    def __reduce__(self):
        return Index, (self._parts, self._fields, self._keep)

    @property
    def fields(self):
        """Set of strings. The names of the fields of all samples."""
        return {x for part in self._parts for names, *_ in part.layouts for x in names}

    @functools.cached_property
    def fingerprint(self):
        """String. A hash of the samples that the index reads.

        It changes with the keys of samples, with their fields, as far as `checksum_of`
        covers them, with the names of the fields that are read, and with images, as far
        as `digest_of_samples` covers them, but not if files are copied or moved.
        """
        selected = [hash_of(each.tobytes()) for each in self._keep]
        digests = [part.digest for part in self._parts]
        return digest_of(
            [self._fields.describe(), digests, selected, digest_of_samples(self)]
        )

    @property
    def versions(self):
        """String. A hash of the sizes and dates of shards and of local image files."""
        numbers = [
            number
            for first, shard in zip(self._starts, self._shards)
            if shard.format.names_files
            for number in range(first, first + shard.count)
        ]
        return digest_of([self.stamps, digest_of_files(self, numbers)])

    def select(self, keep):
        """Returns the `Index` of those records that `keep` chooses, too."""
        keep = [shard.keep & each for shard, each in zip(self._shards, keep)]
        return Index(self._parts, self._fields, keep)

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
            with_images: Boolean, or `"local"`. Whether to read the image files that
                samples name, or all but those at URLs.

        Yields:
            `Sample`, or `Fault` for a sample that cannot be read or turns out to be
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
            rows = [(shard, row, *shard.part.record(row)) for row in rows]
            of_sample = GUESS
            if not shard.format.names_files:
                of_sample = sum(num_bytes for _, _, (_, num_bytes), *_ in rows)
            if group and size + of_sample > MAX_TOGETHER:
                yield from _read(group, with_images)
                group, size = [], 0
            group.append(rows)
            size += of_sample
        yield from _read(group, with_images)


def _read(group, with_images):
    """Reads the samples of a group.

    Args:
        group: List of the rows of each sample: a row is the `_Shard`, its number there,
            its place, the hash of its key, and the checksum of its fields.
        with_images: See `Index.read`.

    Returns:
        List of the `Sample` or the `Fault` of each sample.
    """
    contents = {}
    for format in {shard.format for rows in group for shard, *_ in rows}:
        rows = [row for rows in group for row in rows if row[0].format is format]
        places = [(shard.part, place) for shard, _, place, *_ in rows]
        contents.update(zip(rows, format.read(places)))
    samples = []
    for rows in group:
        several = [row[0].sample(row, contents[row]) for row in rows]
        intact = [each for each in several if isinstance(each, Sample)]
        first = intact[0] if intact else several[0]
        if any(each.label != first.label for each in intact):
            reason = "rows of one image with different labels"
            first = Fault(first.file, first.key, reason)
        elif len(intact) > 1:
            captions = itertools.chain(*(each.captions for each in intact))
            first = first._replace(captions=tuple(captions))
        samples.append(first)
    return read_images(samples, with_images) if with_images else samples


class _Shard:
    """A part of the index, with what is wanted of its samples.

    Args:
        part: `Part`.
        keep: Boolean array `(records,)`, the records that are read, or `True`: all.
        fields: `Fields`.

    Attributes:
        count: Integer. The number of intact samples.
        faults: Counter of the reasons of broken samples.
        found: Integer. The number of samples, intact or broken.
        share: Number. The fraction of its samples that were found, 0 if unknown.
        size: Float. The number of its samples, the lost ones included. If the fraction
            is unknown, it is assumed to be a half.
    """

    def __init__(self, part, keep, fields):
        self.part, self.keep, self.fields = part, keep, fields
        self.format = format_of(part.shard)
        # For each layout, the reason why its samples are broken, or None.
        self.reasons = [fault or fields.fault_of(x) for x, fault, _ in part.layouts]
        # Whether each record is a sample.
        self.is_whole = not (any(self.reasons) or part.has_groups or keep is not True)
        self.faults = collections.Counter()
        for reason, (_, _, count) in zip(self.reasons, part.layouts):
            self.faults[reason] += count
        if keep is not True:
            counts = {reason: len(self._numbers(reason)) for reason in self.faults}
            self.faults = +collections.Counter(counts)
        self.count = self.faults.pop(None, 0)
        if part.has_groups:
            self.count = len(self.intact()[1]) - 1
        self.found = self.count + self.faults.total()
        self.share = part.damage[2] if part.damage else 1
        self.size = self.found / (self.share or 0.5)

    def count_lost(self, largest):
        """Counts the samples that the file has lost by damage; returns its `Fault`.

        Args:
            largest: Number. The largest size that is known of a file of the source.
        """
        size, why, noun = self.size, "by the size of the rest", self.format.noun
        if not self.share:
            size = largest if largest > self.found else size
            why = f"since a {noun} of {size:.0f} samples is assumed"
        reason, shard = f"damaged {noun}", self.part.shard
        lost = self.faults[reason] = max(round(size - self.found), 1)
        details = f"{DamagedShard(shard, *self.part.damage)}; {lost} samples are "
        return Fault(shard, None, reason, f"{details}counted as lost, {why}")

    def sample(self, row, content):
        """Returns the `Sample` or the `Fault` of a row; see `_read`."""
        _, number, _, *expected = row
        part, reason = self.part, "another sample is in its place"
        if isinstance(content, Exception):
            reason = f"the {self.format.noun} cannot be read"
            return Fault(part.shard, None, reason, str(content))
        try:
            key, fields = self.format.parse(content, number, part.context)
            same = [hash_of(key), checksum_of(fields)] == expected
        except MemoryError:
            raise
        except Exception as error:
            same, reason = False, repr(error)
        if not same:
            raise ValueError(
                "`source` must not change while it is read: make the dataset again. If "
                "that does not help, since the file has the size and the date of an "
                f"older one, delete its index first, {part.path}. "
                f"Received: {part.shard}, sample {number} of its index: {reason}"
            )
        return self.fields.sample(part.shard, key, fields, self.format.names_files)

    def broken(self, reason):
        """Yields a `Fault` for each record that is broken for a reason.

        Its key is that in the shard, if the shard can be read.
        """
        if reason not in self.reasons:
            return
        part, names_files, details = self.part, self.format.names_files, None
        # Not even the names of all columns have the field.
        if self.fields.fault_of(part.context or ()) == reason:
            details = self.format.explain(part.context)
        for number in self._numbers(reason).tolist():
            place, *_ = part.record(number)
            key, path = None, None
            # In a tar, the first header contains the key, and its file may be large.
            if not names_files:
                place = place[0], min(place[1], GLANCE)
            with contextlib.suppress(Exception):
                (content,) = self.format.read([(part, place)])
                key, fields = self.format.parse(content, number, part.context)
                # The image file that a row names may be missing.
                sample = self.fields.sample(part.shard, key, fields, names_files)
                path = sample.path
            yield Fault(part.shard, key, reason, path or details)

    def _numbers(self, reason):
        """Returns the numbers of the records that are broken for a reason, or intact.

        Args:
            reason: String, or `None` for the intact records.
        """
        has_reason = np.array([each == reason for each in self.reasons], bool)
        return np.flatnonzero(has_reason[self.part.records()["layout"]] & self.keep)

    def intact(self):
        """Returns the numbers of the intact records, sorted by sample, and the starts.

        The records of sample `n` are `numbers[starts[n] : starts[n + 1]]`.
        """
        numbers = self._numbers(None)
        firsts = self.part.first_rows()[numbers] if self.part.has_groups else numbers
        order = np.argsort(firsts, kind="stable")
        starts = np.flatnonzero(np.diff(firsts[order], prepend=-1, append=-2))
        return numbers[order], starts
