"""An index of samples: how many there are, and each of them by its number."""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.data.index_parts import (
    build_parts,
    changed,
    faults_of,
    hash_of,
    read_part,
)
from keras_cluster_mask.data.pairs import (
    PairReader,
    fields_of,
    several,
)
from keras_cluster_mask.data.sources import Shard, ShardError, list_shards, whole_shard

# The number of parts that are mapped, and of files that are open, at the same time.
OPEN_FILES = 128


def open_index(
    source: str | os.PathLike | Sequence,
    *,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    wants_caption: bool = True,
    index_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
    verbose: bool = False,
) -> "Index | ObjectIndex":
    """Opens the index of a source, and builds what is missing.

    Only the headers of shards are read. The index of a shard is kept in a hidden file
    beside it, or in a cache folder if the shard is at an address or its folder cannot
    be written to. It is built again if the size or the date of the shard changes.

    The index counts all samples that hold an image and a caption. That an image does
    not decode, or that the entry of a JSON file is no caption, shows only when the
    sample is read.

    Example:

    ```python
    index = kcm.data.open_index("shards/train-*.tar")
    print(len(index), index.faults["by_reason"], index[0]["__key__"])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`. Or an object with
            `__len__` and `__getitem__` whose items are dicts, such as a data set of the
            package `datasets` whose images are not decoded.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        label_key: str or sequence of str. The field that holds the label. Defaults to
            `None`: samples need no label.
        wants_caption: bool. Whether samples need a caption. Defaults to `True`.
        index_dir: str or path. The folder for the index. Defaults to `None`: the
            folders of the shards, or a cache folder.
        num_workers: int. The number of processes that build the index. A program that
            uses them needs `if __name__ == "__main__":`. Defaults to `0`: none, it is
            built here.
        verbose: bool. Whether to show a progress bar. Defaults to `False`.

    Returns:
        `Index`, or `ObjectIndex` for an object.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If a shard is compressed, so that its samples cannot be read in any
            order. The message tells how to convert it.
    """
    fields = {
        "image_keys": image_keys,
        "caption_key": caption_key,
        "wants_caption": wants_caption,
        "label_keys": () if label_key is None else several(label_key, ()),
    }
    if not _names_files(source):
        return ObjectIndex(source, **fields)
    paths = list_shards(source)
    parts = build_parts(paths, index_dir, num_workers, verbose)
    return Index(paths, parts, **fields)


def _names_files(source):
    if isinstance(source, str | os.PathLike) or not hasattr(source, "__getitem__"):
        return True
    items = source if isinstance(source, list | tuple) else [None]
    return all(isinstance(item, str | os.PathLike) for item in items)


class Index:
    """The samples of shards, each of which can be read by its number.

    Samples have the order of the shards and of the samples in them. Those that lack an
    image or a caption have no number, and are counted by `faults`. Reading is safe in
    several threads, and after a fork. A pickle holds the names of files and not their
    content.

    Args:
        paths: list of str. The shards.
        parts: list of `Part`.
        image_keys: As for `PairReader`.
        caption_key: As for `PairReader`.
        wants_caption: As for `PairReader`.
        label_keys: tuple of str. Fields of which a sample must have one.

    Attributes:
        shards: list of `Shard`.
        faults: dict. `"by_reason"`, a dict from each reason to the number of broken
            samples; `"by_shard"`, a dict from the names of shards with faults to such
            dicts; and `"details"`, a dict from the names of damaged shards to what is
            known. A damaged shard counts as one, because the number of samples after
            the damage is unknown.
        fingerprint: str. Differs if the samples differ or other fields are read, but
            not if files have been moved.
    """

    def __init__(
        self,
        paths,
        parts,
        image_keys=None,
        caption_key=None,
        wants_caption=True,
        label_keys=(),
    ):
        self.shards = [whole_shard(path) for path in paths]
        self._parts = parts
        self._choices = {
            "image_keys": image_keys,
            "caption_key": caption_key,
            "wants_caption": wants_caption,
            "label_keys": label_keys,
        }
        reader = PairReader([], image_keys, caption_key, wants_caption)
        self._fields = reader.fields | fields_of(label_keys)
        self._faults = [faults_of(part, reader, label_keys) for part in parts]
        counts = [
            sum(each.count for each, fault in zip(part.layouts, faults) if not fault)
            for part, faults in zip(parts, self._faults)
        ]
        # The number of the first sample of each shard, and the number of all samples.
        self._starts = [0, *itertools.accumulate(counts)]
        self.faults = self._count_faults()
        keys = reader.image_keys, reader.caption_keys, wants_caption, label_keys
        self.fingerprint = _hash([keys, [part.digest for part in parts]])
        self._opened = functools.lru_cache(OPEN_FILES)(self._open)

    def __len__(self):
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict:
        return self.read(index)

    def __iter__(self):
        return map(self.read, range(len(self)))

    def read(self, index: int, fields: Sequence[str] | None = None) -> dict:
        """Reads a sample.

        Args:
            index: int.
            fields: Sequence of str. Defaults to `None`: the fields that may hold the
                image, the caption or the label.

        Returns:
            dict: `"__key__"` (str) and the content of each field, as `PairReader.pair`
            takes it.

        Raises:
            ValueError: If the shard changed since it was indexed.
            OSError: If the shard cannot be read.
        """
        number, place = self._place(index)
        shard, part = self.shards[number], self._parts[number]
        fields = self._fields if fields is None else fields
        opened = self._opened(number)
        record, content = opened.record_and_content(place)
        try:
            sample = shard.sample_at(
                content, int(record["number"]), part.context, fields
            )
        except Exception as error:
            raise changed(shard, str(error)) from error
        if hash_of(sample["__key__"]) != record["key"]:
            raise changed(shard, "another sample is in its place")
        return sample

    def key(self, index: int) -> str:
        """The key of a sample, read from its shard."""
        return self.read(index, ())["__key__"]

    def shard_of(self, index: int) -> Shard:
        """The shard of a sample; `str` gives its name."""
        return self.shards[self._place(index)[0]]

    def _place(self, index):
        """The number of the shard of a sample, and its number among the intact ones."""
        position = range(len(self))[index]
        number = bisect.bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]

    def _open(self, number):
        shard, part = self.shards[number], self._parts[number]
        # The images of a folder are listed once, not whenever one is read.
        if not shard.in_index and shard.stamp() != part.stamp:
            raise changed(shard, "its size or its date differ")
        return _Opened(shard, part, self._faults[number])

    def _count_faults(self):
        by_reason, by_shard, details = collections.Counter(), {}, {}
        for shard, part, faults in zip(self.shards, self._parts, self._faults):
            counts = collections.Counter()
            for layout, fault in zip(part.layouts, faults):
                # What the damage cuts off does not count beside the damage.
                if fault and fault != "damaged shard":
                    counts[fault] += layout.count
            if part.damage:
                counts["damaged shard"] += part.path is not None
                details[str(shard)] = _details(shard, part)
            counts = +counts
            by_reason.update(counts)
            if counts:
                by_shard[str(shard)] = dict(sorted(counts.items()))
        by_reason = dict(sorted(by_reason.items()))
        return {"by_reason": by_reason, "by_shard": by_shard, "details": details}

    def __getstate__(self):
        return {
            "paths": [shard.path for shard in self.shards],
            # A shard that cannot be read has no file.
            "parts": [part.path or part for part in self._parts],
            "choices": self._choices,
            "fingerprint": self.fingerprint,
        }

    def __setstate__(self, state):
        parts = [
            read_part(part) if isinstance(part, str) else part
            for part in state["parts"]
        ]
        self.__init__(state["paths"], parts, **state["choices"])
        if self.fingerprint != state["fingerprint"]:
            raise changed(f"{state['paths'][0]} and {len(parts) - 1} more")

    def __repr__(self):
        return f"<Index of {len(self)} samples in {len(self.shards)} shards>"


class _Opened:
    """A shard and its part, open for reading."""

    def __init__(self, shard, part, faults):
        self._records = part.records()
        intact = np.array([fault is None for fault in faults])
        self._intact = None
        if not intact.all():
            self._intact = np.flatnonzero(intact[self._records["layout"]])
        self._start = part.content_start if shard.in_index else 0
        self._file = files.RandomAccess(part.path if shard.in_index else shard.path)

    def record_and_content(self, place):
        """The record and the bytes of a sample by its number among the intact ones."""
        record = self._records[place if self._intact is None else self._intact[place]]
        offset, size = int(record["offset"]), int(record["size"])
        return record, self._file.read(self._start + offset, size)


def _details(shard, part):
    last_key, reason = part.damage
    if part.path is None:
        return f"The shard {shard}: {reason}"
    last = {} if last_key is None else {"__key__": last_key}
    return str(ShardError(shard, last, reason))


def _hash(content):
    content = json.dumps(content).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class ObjectShard(Shard):
    """Stands for an object that gives samples."""

    unique_keys = False

    def path_of(self, name):
        return name


class ObjectIndex:
    """The samples of an object with `__len__` and `__getitem__`.

    The key of a sample is its entry `"__key__"`, or its number. What is wrong with a
    sample shows when it is read. Has the methods and attributes of `Index`.

    Args:
        source: The object. Its items are dicts; an image is bytes, the name of a file,
            or a dict of `"bytes"` and `"path"`.
        **choices: As for `Index`.
    """

    def __init__(self, source, **choices):
        self._source = source
        kind = type(source).__name__
        self.shards = [ObjectShard(kind)]
        self.faults = {"by_reason": {}, "by_shard": {}, "details": {}}
        identity = getattr(source, "_fingerprint", None)
        self.fingerprint = _hash([kind, str(identity), len(source), choices])
        labels = choices.pop("label_keys")
        self._fields = PairReader([], **choices).fields | fields_of(labels)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self.read(index)

    def __iter__(self):
        return map(self.read, range(len(self)))

    def read(self, index: int, fields: Sequence[str] | None = None) -> dict:
        """Reads a sample; see `Index.read`."""
        position = range(len(self))[index]
        sample = self._source[position]
        if not isinstance(sample, Mapping):
            raise ValueError(
                "`source` must give samples that are dicts from the names of fields to "
                f"their content. Received: a {type(sample).__name__} as sample {index}"
            )
        fields = self._fields if fields is None else fields
        wanted = {
            name: _encoded(value, name)
            for name, value in sample.items()
            if value is not None and name in fields
        }
        return {**wanted, "__key__": str(sample.get("__key__", position))}

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self.read(index, ())["__key__"]

    def shard_of(self, index: int) -> Shard:
        """What stands for the object."""
        return self.shards[0]

    def __repr__(self):
        return f"<ObjectIndex of {len(self)} samples>"


def _encoded(value, name):
    """A value as a shard would give it."""
    if isinstance(value, Mapping) and {*value} == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    if hasattr(value, "getexif"):
        raise ValueError(
            "`source` must give images that are not decoded, such as by `dataset."
            f"cast_column({name!r}, datasets.Image(decode=False))`. Received: "
            f"{type(value).__name__}"
        )
    return value
