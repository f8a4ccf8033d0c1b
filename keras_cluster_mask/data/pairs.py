"""Finds the image, the captions and the label of a sample, or what is wrong."""

import dataclasses
import json

from keras_cluster_mask.data.sources import ShardError
from keras_cluster_mask.data.sources.shard import (
    FAULT,
    IMAGE,
    TEXT,
    TOO_LARGE,
    text_of,
)

IMAGE_KEYS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    # `path` is also the field of an image in a folder.
    *("image", "image/encoded", "file_name", "filepath", "image_path", "path"),
)
# `convert` writes all captions to `json.captions`, and the first one to `txt`.
CAPTION_KEYS = (
    *("json.captions", "txt"),
    *("caption", "caption/raw", "captions", "text", "title"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """An encoded image with its captions and label.

    Attributes:
        image: bytes, or str, the name of the file.
        captions: tuple of str. Not empty if captions are requested.
        key: str.
        shard: str.
        label: int, the class of the image; None if labels are not requested.
    """

    image: bytes | str
    captions: tuple
    key: str
    shard: str
    label: int | None = None


class PairReader:
    """Finds the pairs in shards.

    Args:
        shards: list of `Shard`.
        image_keys: str or sequence of str. The field that holds the image or the name
            of its file; of several, the first that a sample has. `None`: common names.
        caption_key: str or sequence of str. The field that holds the caption or a list
            of captions; of several, the first that is not empty. `"json.caption"` is
            the entry `caption` of the field `json`. `None`: common names.
        wants_caption: bool. Whether samples without a caption are left out.
        labels: `Labels`, or None for no labels.

    Attributes:
        fields: set of str. The fields of a sample that may be needed.
    """

    def __init__(
        self,
        shards,
        image_keys=None,
        caption_key=None,
        wants_caption=True,
        labels=None,
    ):
        self.shards = shards
        self.image_keys = several(image_keys, IMAGE_KEYS)
        self.caption_keys = several(caption_key, CAPTION_KEYS)
        self.caption_fields = fields_of(self.caption_keys)
        self.labels = labels
        self.wants_caption = wants_caption
        self.fields = {
            *self.image_keys,
            *(self.caption_fields if wants_caption else ()),
            *(fields_of(labels.keys) if labels else ()),
        }

    @property
    def wanted(self):
        """str. What a sample must hold, for error messages."""
        wanted = [f"an image (`image_keys`, here {list(self.image_keys)})"]
        if self.wants_caption:
            wanted.append(
                f"a caption (`caption_key`, here {list(self.caption_keys)}) that is "
                "not empty"
            )
        if self.labels:
            wanted.append(f"a known label (`label_key`, here {list(self.labels.keys)})")
        return " and ".join(wanted)

    def read(self, shard, report):
        """Reads the pairs of a shard.

        Args:
            shard: `Shard`.
            report: Function that is called for each sample with the shard, the key, the
                reason (str) if it is left out, else None, and further details (str) or
                None.

        Yields:
            `Pair`.
        """
        keys = set()
        for sample in self._samples(shard, report):
            key = sample["__key__"]
            pair, fault = self.pair(shard, sample)
            if shard.unique_keys and key in keys:
                fault = "duplicate key"
            keys.add(key)
            report(str(shard), key, fault, None)
            if not fault:
                yield pair

    def _samples(self, shard, report):
        try:
            yield from shard.read(self.fields)
        except ShardError as error:
            # The last sample may be complete. If not, the damaged shard is counted.
            if self.pair(shard, error.sample)[0] is not None:
                yield error.sample
            report(str(shard), error.last_key, "damaged shard", str(error))
        except OSError as error:
            report(str(shard), None, "unreadable shard", f"The shard {shard}: {error}")

    def pair(self, shard, sample):
        """The pair that a sample holds and None, or None and what is wrong."""
        if FAULT in sample:
            return None, sample[FAULT]
        image = next((sample[k] for k in self.image_keys if k in sample), "")
        if image is None:
            return None, "file too large"
        if isinstance(image, list):
            image = image[0] if image else ""
        if isinstance(image, str):
            image = image and shard.path_of(image)
        # JSON lines may hold values of any type.
        if not isinstance(image, str | bytes) or image == "":
            return None, "no image"
        captions = ()
        if self.wants_caption:
            captions, fault = self.captions(sample)
            if fault:
                return None, fault
        label = None
        if self.labels:
            label, fault = self.labels.of(sample)
            if fault:
                return None, fault
        return Pair(image, captions, sample["__key__"], str(shard), label), None

    def captions(self, sample):
        """The captions of a sample and None, or no captions and what is wrong."""
        fault = "no caption"
        for key in self.caption_keys:
            value = _field(sample, key)
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            captions = tuple(filter(None, map(text_of, values)))
            if captions:
                return captions, None
            fault = "empty caption"
        return (), fault


def fault_of_fields(states, reader, label_keys=()):
    """What is wrong with a sample, as far as its fields alone tell.

    Args:
        states: dict from each field of the sample to what it can be; see `Entry`.
        reader: `PairReader`, whose keys are looked for.
        label_keys: tuple of str. Fields of which the sample must have one.

    Returns:
        tuple: The reason (str), as `PairReader.pair` gives it, or None; and whether
        the content of the fields may change it.
    """
    image = next((states[k] for k in reader.image_keys if k in states), 0)
    if image & TOO_LARGE:
        return "file too large", False
    if not image & IMAGE:
        return "no image", False
    uncertain = False
    if reader.wants_caption:
        fault = "no caption"
        for key in reader.caption_keys:
            state = _state(states, key)
            if state == _IN_JSON:
                uncertain = True
            elif state & TEXT:
                fault = None
                break
            elif state != TOO_LARGE:
                fault = "empty caption"
        if fault and not uncertain:
            return fault, False
        uncertain = uncertain and fault is not None
    if label_keys:
        if all(_state(states, key) == TOO_LARGE for key in label_keys):
            return "no label", False
        uncertain = True
    return None, uncertain


# The state of an entry of a field that may hold JSON.
_IN_JSON = -1


def _state(states, key):
    """The state of a field, or of an entry in it; `TOO_LARGE` also if it is missing."""
    if key in states:
        return states[key]
    field, _, entries = key.partition(".")
    if not entries or states.get(field, TOO_LARGE) == TOO_LARGE:
        return TOO_LARGE
    return _IN_JSON


class Labels:
    """Finds the class of a sample.

    Args:
        label_key: str or sequence of str. The field that holds the label; of several,
            the first that a sample has.
        class_names: Sequence of str in which labels are looked up, or None if labels
            are numbers.
    """

    def __init__(self, label_key, class_names=None):
        self.keys = several(label_key, ())
        self._numbers = None
        if class_names is not None:
            names = [text_of(name) for name in class_names]
            self._numbers = {name: number for number, name in enumerate(names)}
            if len(self._numbers) < len(names) or "" in self._numbers:
                raise ValueError(
                    "`class_names` must be unique and not empty. "
                    f"Received: class_names={list(class_names)}"
                )

    def of(self, sample):
        """The label of a sample and None, or its invalid label and what is wrong."""
        found = (_field(sample, key) for key in self.keys)
        label = next((each for each in found if each is not None), None)
        if label is None:
            return None, "no label"
        if isinstance(label, list):
            label = label[0] if len(label) == 1 else None
        if isinstance(label, int | float) and not isinstance(label, bool):
            number = int(label) if label == label // 1 else -1
        elif self._numbers is not None:
            number = self._numbers.get(text_of(label), -1)
        else:
            text = text_of(label)
            number = int(text) if text.isdecimal() else -1
        known = range(2**31 if self._numbers is None else len(self._numbers))
        return number, None if number in known else "unknown label"


def fields_of(keys):
    """Keys, and the fields that contain nested keys."""
    return {*keys, *(key.partition(".")[0] for key in keys)}


def _field(sample, key):
    """The value of a field, or of an entry in a JSON field; None if it is missing."""
    if key in sample:
        return sample[key]
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


def several(names, common):
    if names is None:
        return common
    return (names,) if isinstance(names, str) else tuple(names)
