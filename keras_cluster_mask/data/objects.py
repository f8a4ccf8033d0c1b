"""Objects as sources, such as a list of dictionaries or a Hugging Face `Dataset`."""

import collections
import contextlib
import functools
import threading
from collections.abc import Mapping

import numpy as np
from PIL import Image

from keras_cluster_mask.data.formats.parquet import plain
from keras_cluster_mask.data.samples import (
    Fault,
    SampleError,
    digest_of,
    digest_of_files,
    digest_of_samples,
    hash_of,
    key_of,
    read_images,
)

# Several indexes may read the same object.
_reading = threading.RLock()


class ObjectIndex:
    """The samples of an object with `__len__` and `__getitem__`.

    The key of a sample is its entry `"__key__"`, or its number. Broken samples are only
    found when they are read. Has the methods and attributes of `Index`.

    Args:
        source: The object. Its items are dictionaries; an image is bytes, the name of a
            file, a dictionary of `"bytes"` and `"path"`, a `PIL.Image.Image`, or an
            array. Only one thread at a time reads an item and decodes its image, unless
            the object has the attribute `thread_safe = True`.
        fields: `Fields`.
        numbers: Integer array, the numbers of the items that are samples. Defaults to
            `None`: all.
    """

    def __init__(self, source, fields, numbers=None):
        self._source, self._fields, self.wanted = source, fields, fields.wanted
        self.paths = [type(source).__name__]
        self.faults, self.damage = collections.Counter(), []
        try:
            with self._turn():
                first = self._item(0) if len(source) else {}
        # An item of a DataFrame is a column, and streams have no length.
        except (TypeError, SampleError) as error:
            raise ValueError(
                "`source` must be paths, or an object with `len` that holds dicts: "
                "pass `[{'image': x, 'caption': y} for x, y in pairs]` instead of "
                "pairs, and `frame.to_dict('records')` instead of a DataFrame, and "
                "load a streaming dataset without streaming. Received: "
                f"source={self.paths[0]}: {error}"
            ) from error
        self.fields = set(first) if isinstance(first, Mapping) else set()
        self.stamps = [len(source)]
        self._numbers = range(len(source)) if numbers is None else numbers

    @functools.cached_property
    def fingerprint(self):
        """String. See `Index.fingerprint`. It covers some samples, and their number."""
        settings = self._fields.describe()
        return digest_of([self.paths, len(self), settings, digest_of_samples(self)])

    @property
    def versions(self):
        """String. See `Index.versions`. A Hugging Face `Dataset` has its own, too."""
        identity = str(getattr(self._source, "_fingerprint", None))
        return digest_of([identity, digest_of_files(self, range(len(self)))])

    def __len__(self):
        return len(self._numbers)

    def select(self, keep):
        """Returns the index of some samples; see `Index.select`."""
        numbers = np.asarray(self._numbers)[keep[0]]
        return ObjectIndex(self._source, self._fields, numbers)

    def record_hashes(self, of_samples):
        """See `Index.record_hashes`. The records are the samples of this index."""
        yield of_samples

    def key_hashes(self):
        """See `Index.key_hashes`. Reads samples only if the first has `"__key__"`."""
        keys = self._numbers
        if "__key__" in self.fields:
            samples = self.read(range(len(self)), with_images=False)
            keys = [sample.key for sample in samples]
        return np.fromiter(map(hash_of, keys), "u8", len(self))

    def examples(self, count):
        """Returns nothing: broken samples are only found when they are read."""
        return ()

    def read(self, numbers, with_images=True):
        """Reads samples one by one; see `Index.read`."""
        for number in numbers:
            with self._turn():
                sample = self._sample(int(self._numbers[number]), with_images)
            yield read_images([sample], with_images)[0] if with_images else sample

    def _turn(self):
        """Returns a context in which no other thread reads objects."""
        is_safe = getattr(self._source, "thread_safe", False) is True
        return contextlib.nullcontext() if is_safe else _reading

    def _item(self, number):
        """Returns an item of the object, or a `Fault`."""
        try:
            item = self._source[number]
            if not isinstance(item, Mapping):
                raise TypeError(f"{type(item).__name__} is not a dict")
            return item
        # Pillow raises these if the object itself decodes its images.
        except (OSError, SyntaxError) as error:
            reason = "the sample cannot be read"
            return Fault(self.paths[0], str(number), reason, str(error))
        except Exception as error:
            raise SampleError(self.paths[0], str(number), repr(error)) from error

    def _sample(self, number, with_images):
        item = self._item(number)
        if isinstance(item, Fault):
            return item
        fields = plain(item)
        key = key_of(fields.pop("__key__", number))
        sample = self._fields.sample(self.paths[0], key, fields)
        image = getattr(sample, "image", None)
        if with_images and isinstance(image, Image.Image):
            # Decode it here. A damaged image raises the error again where it is used.
            with contextlib.suppress(Exception):
                sample = sample._replace(image=image.copy())
        return sample
