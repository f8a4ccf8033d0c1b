"""A sample: its image, its captions and its label, or what is wrong with it.

A `Format` finds the samples of a shard, and reads the fields of any of them. `Fields`
turns these into a `Sample`, or the `Fault` of a broken one.
"""

import codecs
import contextlib
import copy
import hashlib
import json
import os
import typing

import numpy as np
from PIL import Image

from keras_cluster_mask.checks import is_number
from keras_cluster_mask.data import files
from keras_cluster_mask.data.images import UnreadableImage, decoding
from keras_cluster_mask.stream import COMPARED

# `path` is also the field of an image in a folder. `filename` may lack the folder that
# another column names.
IMAGE_KEYS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp",
    "image", "file_name", "filepath", "image_path", "path", "filename",
)  # fmt: skip
# `json.captions` may hold all captions, and `txt` only the first one.
CAPTION_KEYS = ("json.captions", "txt", "caption", "captions", "text", "title")
NO_ARRAY = "the array is not uint8 (height, width) or (height, width, 3)"
# How a text in UTF-16 starts.
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
SIZED = str, bytes, list, tuple, dict


class Sample(typing.NamedTuple):
    """An image with its captions and its label.

    Attributes:
        file: String. The file or folder of the sample, or the class of an object.
        key: String.
        captions: Tuple of strings. Not empty if captions are requested.
        label: Integer, the class of the image; `None` if labels are not requested.
        path: String, the file of the image; empty if it is inside of `file`.
        image: The encoded image, bytes or a `PIL.Image.Image`. `None` before the file
            `path` is read, and after the image is decoded.
        pixels: uint8 array, the decoded image. `None` before.
    """

    file: str
    key: str
    captions: tuple = ()
    label: int | None = None
    path: str = ""
    image: typing.Any = None
    pixels: np.ndarray | None = None


class Fault(typing.NamedTuple):
    """What is wrong with a broken sample.

    Attributes:
        file: String. See `Sample`.
        key: String, or `None` if it is unknown.
        reason: String. One of a few fixed reasons, for counting.
        details: String, or `None` if nothing more is known.
    """

    file: str
    key: str | None
    reason: str
    details: str | None = None

    def __str__(self):
        sample = "" if self.key is None else f"the sample {self.key!r} of "
        details = f" ({self.details})" if self.details else ""
        return f"{sample}{self.file}: {self.reason}{details}"


class SampleError(RuntimeError):
    """An error in a sample that ends the run.

    Args:
        file: String. See `Sample`.
        key: String.
        reason: String.
    """

    def __str__(self):
        file, key, reason = self.args
        return f"The sample {key!r} of {file} failed: {reason}"


class DamagedShard(ValueError):
    """A file that cannot be read to its end.

    Args:
        path: String.
        last_key: String, the key of the last sample that was found, or `None`.
        reason: String.
        share: Float. The fraction of its samples that were found, estimated by the size
            of the rest. 0 if that is unknown.
    """

    def __str__(self):
        path, last_key, reason, _ = self.args
        place = f"after the sample {last_key!r}" if last_key else "at its start"
        return f"{path} is damaged {place}: {reason}"


class Entry(typing.NamedTuple):
    """What a scan finds of a sample, or of a row that may be a part of one.

    Attributes:
        key: String.
        place: Pair of integers, by which the format finds the sample again: its first
            byte and its number of bytes, or what the format says.
        fields: Dictionary from the name of each field that is not empty to the content
            or the size of the field. The entries of a JSON field are named, too, such
            as `"json.caption"`, with the value `None`.
        fault: String. The reason why the sample is broken. `None` if the sample is
            intact.
        content: Bytes. The sample itself, if the index stores it, as for folders.
    """

    key: str
    place: tuple[int, int]
    fields: dict
    fault: str | None = None
    content: bytes = b""


class Format:
    """A format of files: how their rows become samples.

    Attributes:
        noun: String. The word for such a file in messages.
        has_rows: Boolean. Whether a shard has rows. All rows of one image form a
            sample. In other formats, a duplicate key in a shard is a fault.
        names_files: Boolean. Whether samples may hold the names of image files, which
            are relative to the folder of the shard.
    """

    noun = "file"
    has_rows = False
    names_files = False

    def context(self, path):
        """Returns the data on the whole shard that `parse` needs, as JSON values."""
        return None

    def explain(self, context):
        """Returns why all samples of a file may lack a field, or `None`."""
        return None

    def scan(self, path):
        """Finds the samples of a shard in order.

        Args:
            path: String.

        Yields:
            `Entry`.

        Raises:
            DamagedShard: After the last intact sample.
            ValueError: If the file has another format.
            OSError: If the file cannot be read.
        """
        raise NotImplementedError

    def read(self, places):
        """Reads the content of samples from any shards.

        Args:
            places: List of the `Part` and the `Entry.place` of each sample.

        Returns:
            List of the content for `parse`, or an error, for each sample.
        """
        return files.read_ranges(
            [(part.shard, start, start + size) for part, (start, size) in places]
        )

    def parse(self, content, number, context):
        """Parses the key and the fields of a sample.

        Args:
            content: Bytes, or another result of `read`.
            number: Integer. The number of the sample in its shard.
            context: The result of the method `context`.

        Returns:
            Tuple `(key, fields)`: a string, and a dictionary from the name of each
            field that is not empty to bytes, a string, or a list of bytes or strings.
        """
        raise NotImplementedError


class Fields:
    """The fields of a sample that hold its image, its captions and its label.

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
        self.wants_caption = wants_caption
        self.labels = None if label_key is None else Labels(label_key, class_names)

    @property
    def wanted(self):
        """Dictionary from the kind of each content to the fields that may hold it."""
        captions = self.caption_keys if self.wants_caption else ()
        labels = self.labels.keys if self.labels else ()
        return filled({"image": self.image_keys, "caption": captions, "label": labels})

    def replaced(self, other):
        """Returns the fields, with another's in place of the common names."""
        found = copy.copy(self)
        if self.image_keys == IMAGE_KEYS:
            found.image_keys = other.image_keys
        if self.caption_keys == CAPTION_KEYS:
            found.caption_keys = other.caption_keys
        return found

    def describe(self):
        """Returns the settings that decide which samples are intact, as JSON values."""
        labels = self.labels and [self.labels.keys, self.labels.numbers]
        return [self.image_keys, self.wants_caption and self.caption_keys, labels]

    def fault_of(self, names):
        """Returns the fault that the names of a sample's fields reveal, or `None`."""
        for kind, keys in self.wanted.items():
            if not any(_may_have(names, key) for key in keys):
                return f"no {kind}"
        return None

    def sample(self, shard, key, fields, names_files=True):
        """Returns the `Sample` of some fields, or its `Fault`.

        Args:
            shard: String.
            key: String.
            fields: Dictionary from the name of a field to its content.
            names_files: Boolean. Whether a string is the name of an image file, which
                is relative to the folder of the shard.
        """
        images = (fields[key] for key in self.image_keys if key in fields)
        image = next((x for x in images if not isinstance(x, SIZED) or x), None)
        captions, label, path, fault = (), None, "", None
        if isinstance(image, np.ndarray):
            array, image = image, None
            # Pillow would make an array with one axis an image with one column.
            if array.ndim > 1:
                with contextlib.suppress(TypeError, ValueError):
                    image = Image.fromarray(array)
            if image is None:
                return Fault(shard, key, NO_ARRAY, f"{array.dtype} {array.shape}")
        if isinstance(image, str) and names_files:
            path, image = files.beside(shard, image), None
        # JSON lines may hold values of any type.
        if self.image_keys and not (path or isinstance(image, bytes | Image.Image)):
            return Fault(shard, key, "no image")
        if self.wants_caption:
            captions, fault = self.captions(fields)
        if not fault and self.labels:
            label, fault = self.labels.of(fields)
        if fault:
            return Fault(shard, key, fault)
        return Sample(shard, key, captions, label, path, image)

    def captions(self, fields):
        """Returns the captions of a sample and None, or an empty tuple and a fault."""
        fault, is_common = "no caption", self.caption_keys == CAPTION_KEYS
        for key in self.caption_keys:
            value = _value(fields, key)
            if value is None:
                continue
            if isinstance(value, bytes) and value.startswith(UTF_16):
                fault = "the caption is in UTF-16: save it as UTF-8"
                continue
            lines = _text(value).split("\n") if is_common and key == "txt" else ()
            # img2dataset writes a caption with its line breaks, to `json`, too.
            if len(lines) > 1 and _value(fields, "json.caption") is None:
                value = lines
            values = value if isinstance(value, list | tuple) else [value]
            captions = tuple(filter(None, map(_text, values)))
            if captions:
                return captions, None
            fault = "empty caption"
        return (), fault


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
        # Folders are names, and never the numbers of classes that have names.
        self.are_folders = self.keys == ("folder",)
        self.numbers = None
        if class_names is not None:
            names = [_text(name) for name in class_names]
            self.numbers = {name: number for number, name in enumerate(names)}
            others = [x for n, x in enumerate(names) if x.isdecimal() and x != str(n)]
            others = others and not self.are_folders
            is_text = isinstance(class_names, str | bytes)
            twice = len(self.numbers) < len(names)
            if is_text or twice or "" in self.numbers or others:
                raise ValueError(
                    "`class_names` must be a list of names, unique and not empty, and "
                    "a number must be its own index, as labels may be numbers of "
                    f"classes. Received: class_names={class_names!r}"
                )

    def add_folders(self, folders):
        """Takes a set of folders as classes, if these are the labels without names."""
        is_unnamed = self.numbers is None and self.are_folders
        if is_unnamed and not all(map(str.isdecimal, folders)):
            names = sorted({*map(_text, folders)})
            self.numbers = {name: number for number, name in enumerate(names)}

    def of(self, fields):
        """Returns the label of a sample and None, or an invalid label and a fault."""
        found = (_value(fields, key) for key in self.keys)
        label = next((each for each in found if each is not None), None)
        if label is None:
            return None, "no label"
        if isinstance(label, list):
            label = label[0] if len(label) == 1 else None
        # In a table, numbers are text.
        if text := _text(label):
            label = (self.numbers or {}).get(text, text)
            if self.numbers is None or not self.are_folders:
                with contextlib.suppress(ValueError):
                    label = float(label)
        number = int(label) if is_number(label) and label == label // 1 else -1
        known = range(2**31 if self.numbers is None else len(self.numbers))
        return number, None if number in known else "unknown label"


def read_images(samples, which=True):
    """Reads the image files that samples name together.

    Args:
        samples: List of `Sample` and `Fault`.
        which: `True`, or `"local"` to leave out files at URLs.

    Returns:
        List of `Sample`, with its image, and `Fault`.
    """
    named = [
        number
        for number, each in enumerate(samples)
        if getattr(each, "path", "")
        and not (which == "local" and files.is_address(each.path))
    ]
    contents = files.read_ranges([(samples[n].path, 0, None) for n in named])
    for number, content in zip(named, contents):
        sample = samples[number]
        if isinstance(content, Exception):
            reason = "the image file cannot be read", f"{sample.path}: {content}"
            samples[number] = Fault(sample.file, sample.key, *reason)
        else:
            samples[number] = sample._replace(image=content)
    return samples


def filled(fields):
    """Returns the fields that are not empty. Numbers never are."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and (not isinstance(value, SIZED) or value)
    }


def key_of(value):
    """Returns the key of a sample as a string."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value)


def entries_of(field):
    """Returns the marker that shows that the entries of a JSON field are listed."""
    return f"{field}."


def json_object(content):
    """Returns the dictionary that bytes hold as JSON, or `None`."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        return value if isinstance(value, dict) else None


def hash_of(key):
    """Returns the 64-bit hash of bytes, or of a key or another value as a string."""
    is_bytes = isinstance(key, bytes)
    content = key if is_bytes else str(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def digest_of(content):
    """Returns the hash of JSON values, a string."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def hash_of_image(image):
    """Returns the hash of an encoded image, or of the pixels of a `PIL.Image.Image`.

    Raises:
        UnreadableImage: If the pixels cannot be decoded.
    """
    if isinstance(image, bytes):
        return hash_of(image)
    with decoding():
        return hash_of(f"{image.mode} {image.size}".encode() + image.tobytes())


def some(items):
    """Returns at least `COMPARED` items of a sequence, if it has so many."""
    return items[:: max(len(items) // COMPARED, 1)]


def digest_of_samples(index):
    """Returns a hash of some samples of an index, which copied files do not change.

    The hash covers keys, captions, labels and images, or what is wrong with a sample.
    Only the names of images at URLs count, since they may not be read twice alike.

    Args:
        index: `Index` or `ObjectIndex`.
    """
    facts = []
    for sample in index.read(some(range(len(index))), with_images="local"):
        # The key, and the captions or the reason of a fault.
        facts += sample[1:3]
        if isinstance(sample, Sample):
            facts += sample.label, os.path.basename(sample.path.rstrip("/"))
            with contextlib.suppress(UnreadableImage):
                facts.append(hash_of_image(sample.image))
    return digest_of(facts)


def digest_of_files(index, numbers):
    """Returns a hash of the sizes and dates of the local image files of samples.

    Args:
        index: `Index` or `ObjectIndex`.
        numbers: Sequence of integers. The samples that may name files. All are read if
            one of a few does.
    """
    digest = ""
    if any(getattr(x, "path", "") for x in index.read(some(numbers), False)):
        for sample in index.read(numbers, with_images=False):
            with contextlib.suppress(OSError, AttributeError):
                file = os.stat(os.path.expanduser(sample.path))
                digest = digest_of([digest, file.st_size, file.st_mtime_ns])
    return digest


def _may_have(names, key):
    """Returns whether a sample with fields of these names may have a value of a key."""
    field, _, entry = key.partition(".")
    if key in names or not entry or field not in names:
        return key in names
    # If true, `names` contains all entries of this field.
    is_listed = entries_of(field) in names
    return not is_listed or f"{field}.{entry.partition('.')[0]}" in names


def _value(fields, key):
    """Returns the value of a field or of an entry in a JSON field, or None."""
    if key in fields:
        value = fields[key]
        return value.tolist() if isinstance(value, np.ndarray) else value
    field, _, entries = key.partition(".")
    if not entries or field not in fields:
        return None
    value = fields[field]
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
    # Editors on Windows write a byte order mark first, which Python keeps.
    return value.removeprefix("\ufeff").strip() if isinstance(value, str) else ""


def _several(names, common):
    if names is None:
        return common
    return (names,) if isinstance(names, str) else tuple(names)
