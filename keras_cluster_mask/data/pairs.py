"""What a sample holds for a model: a picture, captions, a label, or a fault."""

import dataclasses
import json

from keras_cluster_mask.data.sources import ShardError
from keras_cluster_mask.data.sources.shard import FAULT

IMAGE_KEYS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    # The last is also a field of a folder's pictures.
    *("image", "image/encoded", "file_name", "filepath", "image_path", "path"),
)
# Where there are several captions, `txt` is but the first of them.
CAPTION_KEYS = (
    *("json.captions", "txt"),
    *("caption", "caption/raw", "captions", "text", "title"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A picture, still encoded, and what belongs to it.

    Attributes:
        image: bytes; or str, the file that holds them.
        captions: tuple of str, at least one if captions are wanted.
        key: str.
        shard: str.
        label: int, the class of the picture; None if labels are not wanted.
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
        image_keys: str or sequence of str: the field that holds the picture, or names
            its file; of several the first that a sample has. `None`: what is common.
        caption_key: str or sequence of str: the field that holds the caption, or a list
            of captions; of several the first that is not empty. `"json.caption"` is the
            entry `caption` of the field `json`. `None`: what is common.
        wants_caption: bool. Whether a sample without a caption is left out.
        labels: `Labels`, or None if they are not wanted.
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
        self.image_keys = _several(image_keys, IMAGE_KEYS)
        self.caption_keys = _several(caption_key, CAPTION_KEYS)
        self.caption_fields = _fields(self.caption_keys)
        self.labels = labels
        self._wants_caption = wants_caption
        self._fields = {
            *self.image_keys,
            *(self.caption_fields if wants_caption else ()),
            *(_fields(labels.keys) if labels else ()),
        }

    @property
    def wanted(self):
        """str. What a sample must hold, in words."""
        wanted = [f"an image (`image_keys`, here {list(self.image_keys)})"]
        if self._wants_caption:
            wanted.append(
                f"a caption (`caption_key`, here {list(self.caption_keys)}) that is "
                "not empty"
            )
        if self.labels:
            wanted.append(f"a known label (`label_key`, here {list(self.labels.keys)})")
        return " and ".join(wanted)

    def read(self, shard, report):
        """The pairs of a shard, one after another.

        Args:
            shard: `Shard`.
            report: function that is told of each sample: the shard, the key, why it is
                left out (str) or None if it is given, and what else is known (str) or
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
            yield from shard.read(self._fields)
        except ShardError as error:
            # The last sample may be whole. If not, the shard's damage is the reason.
            if self.pair(shard, error.sample)[0] is not None:
                yield error.sample
            report(str(shard), error.last_key, "damaged shard", str(error))
        except OSError as error:
            report(str(shard), None, "unreadable shard", f"The shard {shard}: {error}")

    def pair(self, shard, sample):
        """The pair that a sample holds, or None, and what is wrong with it if not."""
        if FAULT in sample:
            return None, sample[FAULT]
        image = next((sample[k] for k in self.image_keys if k in sample), "")
        if image is None:
            return None, "file too large"
        if isinstance(image, list):
            image = image[0] if image else ""
        if isinstance(image, str):
            image = image and shard.path_of(image)
        # A cell of JSON lines may hold anything.
        if not isinstance(image, str | bytes) or image == "":
            return None, "no image"
        captions = ()
        if self._wants_caption:
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
        """The captions of a sample, and what is wrong with them if there are none."""
        fault = "no caption"
        for key in self.caption_keys:
            value = _field(sample, key)
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            captions = tuple(filter(None, map(_text, values)))
            if captions:
                return captions, None
            fault = "empty caption"
        return (), fault


class Labels:
    """Finds the class of a sample.

    Args:
        label_key: str or sequence of str: the field that holds the label; of several
            the first that a sample has.
        class_names: sequence of str, which labels are looked up in; or None, if they
            are numbers.
    """

    def __init__(self, label_key, class_names=None):
        self.keys = _several(label_key, ())
        self._numbers = None
        if class_names is not None:
            names = [_text(name) for name in class_names]
            self._numbers = {name: number for number, name in enumerate(names)}
            if len(self._numbers) < len(names) or "" in self._numbers:
                raise ValueError(
                    "`class_names` must be different names, none of them empty. "
                    f"Received: class_names={list(class_names)}"
                )

    def of(self, sample):
        """The number of a sample's class, and what is wrong if there is none."""
        found = (_field(sample, key) for key in self.keys)
        label = next((each for each in found if each is not None), None)
        if label is None:
            return None, "no label"
        if isinstance(label, list):
            label = label[0] if len(label) == 1 else None
        if isinstance(label, int | float) and not isinstance(label, bool):
            number = int(label) if label == label // 1 else -1
        elif self._numbers is not None:
            number = self._numbers.get(_text(label), -1)
        else:
            text = _text(label)
            number = int(text) if text.isdecimal() else -1
        known = range(2**31 if self._numbers is None else len(self._numbers))
        return number, None if number in known else "unknown label"


def _fields(keys):
    """Keys, and the fields whose entries they are."""
    return {*keys, *(key.partition(".")[0] for key in keys)}


def _field(sample, key):
    """What a field holds, or an entry of one that holds JSON; None if there is none."""
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


def _text(value):
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return value.strip() if isinstance(value, str) else ""


def _several(names, common):
    if names is None:
        return common
    return (names,) if isinstance(names, str) else tuple(names)
