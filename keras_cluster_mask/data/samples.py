"""A sample: its image, its captions and its label, from the fields of an item.

`Fields` turns an item of a source, a dictionary, into a `Sample`, or into the `Fault`
of a broken one.
"""

import codecs
import contextlib
import hashlib
import json
import os
import typing

import numpy as np
from PIL import Image

from keras_cluster_mask.data import files
from keras_cluster_mask.data.images import decoding

# `path` is also the field of an image in a folder. `filename` may lack the folder that
# another column names.
IMAGE_KEYS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "heic", "heif",
    "image", "file_name", "filepath", "image_path", "path", "filename",
)  # fmt: skip
# `json.captions` may hold all captions, and `txt` only the first one.
CAPTION_KEYS = ("json.captions", "txt", "caption", "captions", "text", "title")
# Fields of an item about itself: its key; the file that it comes from, with its image
# files next to it; and the error for which it cannot be read.
KEY, FILE, ERROR = "__key__", "__file__", "__error__"
NO_ARRAY = "the array is not uint8 (height, width) or (height, width, 3)"
# How a text in UTF-16 starts.
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
SIZED = str, bytes, list, tuple, dict


class Sample(typing.NamedTuple):
    """An image with its captions and its label.

    Attributes:
        file: String, the file that it comes from; empty for an item of an object.
        key: String.
        captions: Tuple of strings. Not empty if captions are requested.
        label: Integer, the class of the image; `None` if labels are not requested.
        path: String, the file of the image; empty if it is inside the item.
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
        file: String, the file that it comes from; empty for an item of an object.
        key: String.
        reason: String. One of a few fixed reasons, for counting.
        details: String, or `None` if nothing more is known.
    """

    file: str
    key: str
    reason: str
    details: str | None = None

    def __str__(self):
        of_file = f" of {self.file}" if self.file else ""
        details = f" ({self.details})" if self.details else ""
        return f"the sample {self.key!r}{of_file}: {self.reason}{details}"


class BrokenSample(ValueError):
    """A sample that cannot be used.

    Args:
        reason: See `Fault`.
        details: See `Fault`.
    """


class SampleError(RuntimeError):
    """An error in a sample that ends the run.

    Args:
        file: See `Fault`.
        key: String.
        reason: String.
    """

    # All arguments go to `Exception`, so that worker processes can send the error.
    def __str__(self):
        file, key, reason = self.args
        of_file = f" of {file}" if file else ""
        return f"The sample {key!r}{of_file} failed: {reason}"


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
                "`class_names` must be passed together with `label_key`, the field of "
                f"the labels. Received: class_names={class_names}, label_key=None"
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

    def sample(self, item):
        """Returns the `Sample` of an item with a key, or its `Fault`.

        The image file that it refers to is not read; see `read_named_files`.
        """
        file, key = item.get(FILE, ""), key_of(item[KEY])
        try:
            if ERROR in item:
                raise item[ERROR]
            item = filled(item)
            path, image = self._image(file, item)
            captions = self._captions(item) if self.wants_caption else ()
            label = self.labels.of(item) if self.labels else None
        except BrokenSample as error:
            return Fault(file, key, *error.args)
        return Sample(file, key, captions, label, path, image)

    def _image(self, file, item):
        """Returns the name of the file of an image, and the image, if it has one."""
        image = next((item[key] for key in self.image_keys if key in item), None)
        # As the package `datasets` stores them.
        if isinstance(image, dict) and {"bytes", "path"} <= image.keys():
            image = image["path"] if image["bytes"] is None else image["bytes"]
        if isinstance(image, np.ndarray):
            array = image
            # Pillow would make an array with one axis an image with one column.
            with contextlib.suppress(TypeError, ValueError):
                image = Image.fromarray(array) if array.ndim > 1 else None
            if not isinstance(image, Image.Image):
                raise BrokenSample(NO_ARRAY, f"{array.dtype} {array.shape}")
        if isinstance(image, str | os.PathLike):
            return files.beside(file, os.fspath(image)), None
        # JSON lines may hold values of any type.
        if self.image_keys and not isinstance(image, bytes | Image.Image):
            raise BrokenSample("no image")
        return "", image

    def _captions(self, item):
        """Returns the captions of a sample."""
        fault, is_common = "no caption", self.caption_keys == CAPTION_KEYS
        for key in self.caption_keys:
            value = _value(item, key)
            if value is None:
                continue
            if isinstance(value, bytes) and value.startswith(UTF_16):
                fault = "the caption is in UTF-16: save it as UTF-8"
                continue
            lines = _text(value).split("\n") if is_common and key == "txt" else ()
            # img2dataset writes a caption with its line breaks, to `json`, too.
            if len(lines) > 1 and _value(item, "json.caption") is None:
                value = lines
            captions = tuple(filter(None, map(_text, _flat(value))))
            if captions:
                return captions
            fault = "empty caption"
        raise BrokenSample(fault)


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
            is_mixed_up = bool(others) and not self.are_folders
            is_text = isinstance(class_names, str)
            if len({*names, ""}) <= len(names) or is_mixed_up or is_text:
                raise ValueError(
                    "`class_names` must be a list of unique, non-empty names. A name "
                    "that is a number must be its own index, because labels may be "
                    f"class numbers. Received: class_names={class_names!r}"
                )

    def add_folders(self, folders):
        """Takes a set of folders as classes, if these are the labels without names."""
        is_unnamed = self.numbers is None and self.are_folders
        if is_unnamed and not all(map(str.isdecimal, folders)):
            names = sorted({*map(_text, folders)})
            self.numbers = {name: number for number, name in enumerate(names)}

    def of(self, item):
        """Returns the label of a sample."""
        found = (_value(item, key) for key in self.keys)
        label = next((each for each in found if each is not None), None)
        if label is None:
            raise BrokenSample("no label")
        if isinstance(label, list) and len(label) == 1:
            (label,) = label
        names, number = self.numbers or {}, -1
        # Python prints no number of very many digits.
        with contextlib.suppress(ValueError, OverflowError):
            # In a table, numbers are text.
            text = _text(label) or str(label)
            number = names.get(text, -1)
            if number < 0 and not (names and self.are_folders):
                number = float(text)
        count = 2**31 if self.numbers is None else len(names)
        if not 0 <= number < count or number % 1:
            raise BrokenSample("unknown label")
        return int(number)


def read_named_files(samples):
    """Reads the image files of samples together.

    Args:
        samples: List of `Sample` and `Fault`.

    Returns:
        List of `Sample`, with its image, and `Fault`.
    """
    named = [number for number, each in enumerate(samples) if getattr(each, "path", "")]
    contents = files.read_ranges([(samples[n].path, 0, None) for n in named])
    for number, content in zip(named, contents):
        sample = samples[number]
        if isinstance(content, Exception):
            reason = "the image file cannot be read", f"{sample.path}: {content}"
            samples[number] = Fault(sample.file, sample.key, *reason)
        else:
            samples[number] = sample._replace(image=content)
    return samples


def merged(items):
    """Returns one item for several rows: a field with several values is a list."""
    first, *others = items
    for name in {name for item in others for name in item}:
        values = [item[name] for item in items if name in item]
        if any(value != values[0] for value in values):
            first[name] = values
        else:
            first[name] = values[0]
    return first


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


def hash_of(key):
    """Returns the 64-bit hash of bytes, or of a key or another value as a string."""
    is_bytes = isinstance(key, bytes)
    content = key if is_bytes else str(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def hash_of_image(image):
    """Returns the hash of an encoded image, or of the pixels of a `PIL.Image.Image`.

    Raises:
        UnreadableImage: If the pixels cannot be decoded.
    """
    if isinstance(image, bytes):
        return hash_of(image)
    with decoding():
        return hash_of(f"{image.mode} {image.size}".encode() + image.tobytes())


def digest_of(content):
    """Returns the hash of JSON values, a string."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _value(item, key):
    """Returns the value of a field or of an entry in a JSON field, or None."""
    if key in item:
        value = item[key]
        return value.tolist() if isinstance(value, np.ndarray) else value
    field, _, entries = key.partition(".")
    if not entries or field not in item:
        return None
    value = item[field]
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


def _flat(value):
    """Lists the captions of a field, which rows of one image may each list."""
    if isinstance(value, list | tuple):
        return [text for each in value for text in _flat(each)]
    return [value]


def _several(names, common):
    if names is None:
        return common
    return (names,) if isinstance(names, str) else tuple(names)
