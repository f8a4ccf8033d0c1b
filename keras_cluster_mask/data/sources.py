"""Sources of samples: objects with a length, whose items are dictionaries of fields.

A list of dictionaries and a Hugging Face `Dataset` are sources as they are, and
`open_source` makes one of files. A source may have the method `__getitems__(numbers)`,
as for a torch `DataLoader`, to read several samples at once, and a `fingerprint`, a
string that changes with its samples.
"""

import bisect
import contextlib
import itertools
import os
import threading

import numpy as np
from PIL import Image

from keras_cluster_mask.data.files import is_address
from keras_cluster_mask.data.images import UnreadableImage
from keras_cluster_mask.data.samples import (
    ERROR,
    KEY,
    BrokenSample,
    Sample,
    SampleError,
    digest_of,
    hash_of,
    hash_of_image,
    read_named_files,
)
from keras_cluster_mask.stream import COMPARED

# The number of samples that are read to check that they have the requested fields.
EXAMPLES = 8
# Several datasets may read the same object.
_reading = threading.RLock()


class Source:
    """A source whose method `__getitems__` any thread may call."""

    def __getitem__(self, number):
        (item,) = self.__getitems__([number])
        return item


class Subset(Source):
    """Some samples of a source; see `subset`.

    Args:
        source: The source.
        indices: Integer array.
    """

    def __init__(self, source, indices):
        self.source, self.indices = source, indices
        # How often it was split.
        self.splits = getattr(source, "splits", 0)

    def __len__(self):
        return len(self.indices)

    def __getitems__(self, numbers):
        return read_items(self.source, self.indices[[*numbers]].tolist())

    @property
    def fingerprint(self):
        return digest_of([fingerprint_of(self.source), hash_of(self.indices.tobytes())])

    def __repr__(self):
        return f"<Subset of {len(self)} of {len(self.source)} samples>"


class Concatenation(Source):
    """Several sources, one after the other.

    Args:
        sources: Sequence of sources.
    """

    def __init__(self, sources):
        self.sources = [*sources]
        self._ends = [*itertools.accumulate(map(len, self.sources))]

    def __len__(self):
        return self._ends[-1]

    def __getitems__(self, numbers):
        owners, found = [self.owner(number) for number in numbers], {}
        for which in {*owners}:
            own = [n for n, owner in zip(numbers, owners) if owner == which]
            first = self._ends[which] - len(self.sources[which])
            items = read_items(self.sources[which], [n - first for n in own])
            found.update(zip(own, items))
        return [found[number] for number in numbers]

    def owner(self, number):
        """Returns which source holds a sample."""
        return bisect.bisect_right(self._ends, number)

    @property
    def fingerprint(self):
        return digest_of([*map(fingerprint_of, self.sources)])


def read_items(source, numbers):
    """Reads samples of a source.

    Args:
        source: The source. One thread at a time reads it, unless it is a `Source`.
        numbers: List of integers.

    Returns:
        List of dictionaries, with a key. That of a sample that cannot be read holds its
        error.
    """
    if isinstance(source, Source):
        return source.__getitems__(numbers)
    with _reading:
        try:
            if len(numbers) > 1 and hasattr(source, "__getitems__"):
                items = source.__getitems__(numbers)
            else:
                items = map(source.__getitem__, numbers)
            return [
                {KEY: f"{number}", **{name: _copied(x) for name, x in item.items()}}
                for number, item in zip(numbers, items, strict=True)
            ]
        except Exception as error:
            key = f"{numbers[0]}"
            # Pillow raises these if the object itself decodes its images.
            is_broken = isinstance(error, OSError | SyntaxError)
            # One by one, to find those that fail.
            if len(numbers) > 1:
                items = [item for n in numbers for item in read_items(source, [n])]
                if is_broken:
                    return items
                # Only `__getitems__` fails.
                key = f"{numbers}"
            elif is_broken:
                fault = BrokenSample("the sample cannot be read", str(error))
                return [{KEY: key, ERROR: fault}]
            raise SampleError("", key, repr(error)) from error


def _copied(value):
    """Returns a copy of an image or an array, which another thread may change."""
    # A damaged image raises its error again where it is used.
    with contextlib.suppress(Exception):
        if isinstance(value, Image.Image | np.ndarray):
            return value.copy()
    return value


def some(source, count):
    """Reads samples of a source: at least so many, evenly spaced, if it has them."""
    numbers = [*range(0, len(source), max(len(source) // count, 1))]
    groups = (numbers[n : n + 256] for n in range(0, len(numbers), 256))
    return [item for group in groups for item in read_items(source, group)]


def parts_of(source):
    """Lists the sources that a source consists of."""
    if isinstance(source, Subset):
        return parts_of(source.source)
    if isinstance(source, Concatenation):
        return [part for each in source.sources for part in parts_of(each)]
    return [source]


def paths_of(source):
    """Lists the files of a source."""
    return [path for each in parts_of(source) for path in getattr(each, "stamps", ())]


def folders_of(source):
    """Returns the names of the folders with images in a source, a set."""
    return {x for each in parts_of(source) for x in getattr(each, "folders", ())}


def fingerprint_of(source):
    """Returns the fingerprint of a source: its own, or its type and its length."""
    own = getattr(source, "fingerprint", None)
    return f"{type(source).__name__} {len(source)}" if own is None else own


def describe(source, fields):
    """Describes the samples of a source, as JSON values, which copied files keep.

    Args:
        source: The source. Of a few samples, keys, captions, labels and images count,
            or what is wrong with them. For images at URLs, only the names count,
            because their content may differ between reads.
        fields: `Fields`.
    """
    facts = []
    for sample in map(fields.sample, some(source, COMPARED)):
        if not is_address(getattr(sample, "path", "")):
            (sample,) = read_named_files([sample])
        # The key, and the captions or the reason of a fault.
        facts += sample[1:3]
        if isinstance(sample, Sample):
            facts += sample.label, os.path.basename(sample.path)
            with contextlib.suppress(UnreadableImage):
                facts.append(hash_of_image(sample.image))
    return {
        "fingerprint": fingerprint_of(source),
        "fields": [fields.wanted, fields.labels and fields.labels.numbers],
        "samples": digest_of(facts),
    }


def versions_of(source, fields):
    """Returns a hash of the sizes and dates of files, and of the images of samples.

    Args:
        source: The source. All samples are read if one of a few has an image file.
        fields: `Fields`.
    """
    found = [getattr(part, "stamps", None) for part in parts_of(source)]
    few = map(fields.sample, some(source, COMPARED))
    if any(getattr(sample, "path", "") for sample in few):
        for item in some(source, len(source)):
            with contextlib.suppress(OSError, AttributeError):
                file = os.stat(os.path.expanduser(fields.sample(item).path))
                found.append([file.st_size, file.st_mtime_ns])
    return digest_of(found)


def check_readable(source, fields):
    """Raises an error if all of a few samples are broken, such as for other fields."""
    items = some(source, EXAMPLES)
    samples = read_named_files([*map(fields.sample, items)])
    if any(isinstance(sample, Sample) for sample in samples):
        return
    names = sorted(x for item in items[:1] for x in item if not x.startswith("__"))
    fault = samples[0] if samples else f"{next(iter(paths_of(source)), 'it')} is empty"
    raise ValueError(
        f"`source` has no readable sample: {fault}. File names in a table are relative "
        "to the folder of the table. Each sample needs one field of each "
        f"of these kinds: {fields.wanted}. To read other fields, rename them, or pass "
        "`image_keys`, `caption_key` or `label_key` to `image_text_dataset`. The first "
        "line of a CSV or TSV file must name the columns. In a tar, the files of a "
        f"sample must be adjacent. Received: {len(source)} samples, the first with the "
        f"fields {names}"
    )
