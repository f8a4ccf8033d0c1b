"""Finds the image, the captions and the label of a sample, or its fault."""

import contextlib
import copy
import json
import numbers
import typing

import numpy as np
from PIL import Image

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import UTF_16, entries_of, is_empty

# `path` is also the field of an image in a folder. `filename` may lack the folder that
# another column names.
IMAGE_KEYS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp",
    "image", "file_name", "filepath", "image_path", "path", "filename",
)  # fmt: skip
# `json.captions` may hold all captions, and `txt` only the first one.
CAPTION_KEYS = ("json.captions", "txt", "caption", "captions", "text", "title")
NO_ARRAY = "the array is not uint8 (height, width) or (height, width, 3)"


class Pair(typing.NamedTuple):
    """An encoded image with its captions and label.

    Attributes:
        image: Bytes, or a `PIL.Image.Image`; the file name until it is read.
        captions: Tuple of strings. Not empty if captions are requested.
        key: String.
        shard: String.
        label: Integer, the class of the image; `None` if labels are not requested.
        path: String, the file of the image; empty if it is inside a shard.
    """

    image: typing.Any
    captions: tuple
    key: str
    shard: str
    label: int | None = None
    path: str = ""


class Fault(typing.NamedTuple):
    """A broken sample.

    Attributes:
        shard: String.
        key: String, or `None` if it is unknown.
        reason: String. One of a few fixed reasons, for counting.
        details: String, or `None` if nothing more is known.
    """

    shard: str
    key: str | None
    reason: str
    details: str | None = None

    def __str__(self):
        sample = "" if self.key is None else f"the sample {self.key!r} of "
        details = f" ({self.details})" if self.details else ""
        return f"{sample}the shard {self.shard}: {self.reason}{details}"


class SampleError(RuntimeError):
    """An error in a sample that ends the run.

    Args:
        shard: String.
        key: String.
        reason: String.
    """

    def __str__(self):
        shard, key, reason = self.args
        return f"The sample {key!r} of the shard {shard} failed: {reason}"


class PairReader:
    """Finds the image, the captions and the label of a sample.

    Args:
        image_keys: String or sequence of strings. The field that holds the image or the
            name of its file. If several are given, the first that a sample has is used.
            `None`: common names. Empty: no images.
        caption_key: String or sequence of strings. The field that holds the caption or
            a list of captions. If several are given, the first that is not empty is
            used. `"json.caption"` is the entry `caption` of the field `json`. `None`:
            common names, and each line of `txt` is a caption, unless `json` has the
            entry `caption`.
        wants_caption: Boolean. Whether samples without a caption are broken.
        label_key: See `Labels`. `None`: no labels.
        class_names: See `Labels`.

    Attributes:
        wanted: Dictionary from the kind of each requested content to the fields that
            may hold it, of which a sample needs one.
    """

    def __init__(
        self,
        image_keys=None,
        caption_key=None,
        wants_caption=True,
        label_key=None,
        class_names=None,
    ):
        if class_names is not None and label_key is None:
            raise ValueError(
                "`class_names` need labels: pass the `label_key` of the field that "
                f"holds them. Received: class_names={class_names}, label_key=None"
            )
        self.image_keys = _several(image_keys, IMAGE_KEYS)
        self.caption_keys = _several(caption_key, CAPTION_KEYS)
        self._line_keys = ("txt",) if caption_key is None else ()
        self.labels = None if label_key is None else Labels(label_key, class_names)
        self.wanted = {"image": self.image_keys} if self.image_keys else {}
        if wants_caption:
            self.wanted["caption"] = self.caption_keys
        if self.labels:
            self.wanted["label"] = self.labels.keys

    def filled(self, other):
        """Returns a reader with another one's fields in place of the common names."""
        found = copy.copy(self)
        if self.image_keys == IMAGE_KEYS:
            found.image_keys = other.image_keys
        if self.caption_keys == CAPTION_KEYS:
            found.caption_keys, found._line_keys = other.caption_keys, other._line_keys
        keys = {"image": found.image_keys, "caption": found.caption_keys}
        found.wanted = {kind: keys.get(kind, x) for kind, x in self.wanted.items()}
        return found

    def describe(self):
        """Returns the settings that decide which samples are intact, as JSON values."""
        labels = self.labels and [self.labels.keys, self.labels.numbers]
        return [self.image_keys, self.wanted.get("caption"), labels]

    def fault_of(self, fields):
        """Returns the fault that the names of a sample's fields reveal, or None."""
        for kind, keys in self.wanted.items():
            if not any(_may_have(fields, key) for key in keys):
                return f"no {kind}"
        return None

    def pair(self, shard, key, fields, names_files=True):
        """Returns the `Pair` of a sample, or its `Fault`.

        Args:
            shard: String.
            key: String.
            fields: Dictionary from the name of a field to its content.
            names_files: Boolean. Whether a string is the name of an image file, which
                is relative to the folder of the shard.
        """
        found = (fields[k] for k in self.image_keys if not is_empty(fields.get(k)))
        image, path = next(found, ""), ""
        if isinstance(image, np.ndarray):
            array, image = image, None
            # Pillow would make an array with one axis an image with one column.
            if array.ndim > 1:
                with contextlib.suppress(TypeError, ValueError):
                    image = Image.fromarray(array)
            if image is None:
                return Fault(shard, key, NO_ARRAY, f"{array.dtype} {array.shape}")
        if isinstance(image, str) and image and names_files:
            path = image = files.beside(shard, image)
        # JSON lines may hold values of any type.
        if self.image_keys and not (path or isinstance(image, bytes | Image.Image)):
            return Fault(shard, key, "no image")
        captions, label, fault = (), None, None
        if "caption" in self.wanted:
            captions, fault = self.captions(fields)
        if not fault and self.labels:
            label, fault = self.labels.of(fields)
        if fault:
            return Fault(shard, key, fault)
        return Pair(image, captions, key, shard, label, path)

    def captions(self, fields):
        """Returns the captions of a sample and None, or an empty tuple and a fault."""
        fault = "no caption"
        for key in self.caption_keys:
            value = _field(fields, key)
            if value is None:
                continue
            if isinstance(value, bytes) and value.startswith(UTF_16):
                fault = "the caption is in UTF-16: save it as UTF-8"
                continue
            lines = _text(value).splitlines() if key in self._line_keys else ()
            # img2dataset writes a caption with its line breaks, to `json`, too.
            if len(lines) > 1 and _field(fields, "json.caption") is None:
                value = lines
            values = value if isinstance(value, list | tuple) else [value]
            captions = tuple(filter(None, map(_text, values)))
            if captions:
                return captions, None
            fault = "empty caption"
        return (), fault

    def with_images(self, samples):
        """Reads the image files of pairs together, and adds their content.

        Args:
            samples: List of `Pair` and `Fault`.
        """
        places = [i for i, each in enumerate(samples) if getattr(each, "path", "")]
        contents = files.read_ranges([(samples[i].path, 0, None) for i in places])
        for place, content in zip(places, contents):
            pair = samples[place]
            if isinstance(content, Exception):
                reason = "the image file cannot be read", f"{pair.path}: {content}"
                samples[place] = Fault(pair.shard, pair.key, *reason)
            else:
                samples[place] = pair._replace(image=content)
        return samples


class Labels:
    """Finds the class of a sample.

    Args:
        label_key: String or sequence of strings. The field that holds the label. If
            several are given, the first that a sample has is used.
        class_names: Sequence of strings in which labels are looked up, or `None` if
            labels are numbers or folders.

    Attributes:
        numbers: Dictionary from the name of each class to its number, or `None` if
            labels are numbers.
    """

    def __init__(self, label_key, class_names=None):
        self.keys = _several(label_key, ())
        self.numbers = None
        if class_names is not None:
            names = [_text(name) for name in class_names]
            self.numbers = {name: number for number, name in enumerate(names)}
            others = [x for n, x in enumerate(names) if x.isdecimal() and x != str(n)]
            if len(self.numbers) < len(names) or "" in self.numbers or others:
                raise ValueError(
                    "`class_names` must be unique and not empty, and a number must be "
                    "its own index, as labels may be numbers of classes. Received: "
                    f"class_names={list(class_names)}"
                )

    def add_folders(self, folders):
        """Takes a set of folders as classes, if these are the labels without names."""
        is_folder = self.numbers is None and self.keys == ("folder",)
        if is_folder and not all(map(str.isdecimal, folders)):
            self.numbers = {name: n for n, name in enumerate(sorted(folders))}

    def of(self, sample):
        """Returns the label of a sample and None, or an invalid label and a fault."""
        found = (_field(sample, key) for key in self.keys)
        label = next((each for each in found if each is not None), None)
        if label is None:
            return None, "no label"
        if isinstance(label, list):
            label = label[0] if len(label) == 1 else None
        # In a table, numbers are text.
        if text := _text(label):
            label = (self.numbers or {}).get(text, text)
            with contextlib.suppress(ValueError):
                label = float(label)
        is_number = isinstance(label, numbers.Real) and not isinstance(label, bool)
        number = int(label) if is_number and label == label // 1 else -1
        known = range(2**31 if self.numbers is None else len(self.numbers))
        return number, None if number in known else "unknown label"


def _may_have(fields, key):
    """Returns whether a sample with these fields may have a value for a key."""
    field, _, entry = key.partition(".")
    if key in fields or not entry or field not in fields:
        return key in fields
    # If true, `fields` contains all entries of this field.
    is_listed = entries_of(field) in fields
    return not is_listed or f"{field}.{entry.partition('.')[0]}" in fields


def _field(sample, key):
    """Returns the value of a field or of an entry in a JSON field, or None."""
    if key in sample:
        value = sample[key]
        return value.tolist() if isinstance(value, np.ndarray) else value
    field, _, entries = key.partition(".")
    if not entries or sample.get(field) is None:
        return None
    value = sample[field]
    try:
        value = json.loads(value) if isinstance(value, str | bytes) else value
        for entry in entries.split("."):
            value = value[entry]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value


def _text(value):
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return value.strip() if isinstance(value, str) else ""


def _several(names, common):
    if names is None:
        return common
    return (names,) if isinstance(names, str) else tuple(names)
