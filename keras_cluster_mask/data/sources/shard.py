"""The interface of all shards."""

import dataclasses
import typing

from keras_cluster_mask.data import files

# The entry of a sample that tells why it is broken.
FAULT = "__fault__"
# What the value of a field can be: an image or the name of one, a caption, or a value
# that is too large to be read.
IMAGE, TEXT, TOO_LARGE = 1, 2, 4
# The first bytes of a value, which nearly always show whether it is a caption.
GLANCE = 512


class Entry(typing.NamedTuple):
    """The place of a sample in its file, and what its fields can be.

    Attributes:
        key: str.
        offset: int. The first byte of the sample.
        size: int. The number of bytes.
        fields: dict from the name of a field to a sum of `IMAGE`, `TEXT` and
            `TOO_LARGE`.
        fault: str, the reason why the sample is broken, or None.
        incomplete: bool. Whether the damage of the shard follows this sample.
        content: bytes, if an index holds the sample because no file does, or None.
    """

    key: str
    offset: int
    size: int
    fields: dict
    fault: str | None = None
    incomplete: bool = False
    content: bytes | None = None


class NoRandomAccess(ValueError):
    """A shard whose samples can be read from start to end only."""

    def __init__(self, path):
        super().__init__(
            "`source` must be shards that are not compressed, because samples are "
            "read in any order. Convert them: `python -m keras_cluster_mask.data "
            f"convert {path} --to 'shards/train-{{00000}}.tar'`. Received: {path}"
        )
        self.path = path

    def __reduce__(self):
        return NoRandomAccess, (self.path,)


def text_of(value):
    """The text of a value without white space at its ends; empty if it is no text."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return value.strip() if isinstance(value, str) else ""


def state_of(value):
    """What the value of a field can be; see `Entry.fields`."""
    if value is None:
        return TOO_LARGE
    values = value if isinstance(value, list) else [value]
    image = values[0] if values else ""
    is_image = isinstance(image, bytes) or (isinstance(image, str) and image != "")
    return IMAGE * is_image | TEXT * any(map(text_of, values))


def state_in_file(file, size):
    """What the `size` bytes at the position of a file can be, from a glance at them."""
    glance = file.read(min(size, GLANCE))
    # A letter that the glance cuts is no text yet.
    if size > GLANCE and not text_of(glance[:-3]):
        glance += file.read(size - GLANCE)
    return state_of(glance)


class ShardError(ValueError):
    """A shard that cannot be read to its end.

    Attributes:
        shard: str. The file.
        sample: dict. The sample that was being read; it may be complete.
        last_key: str. Its key, or None if no sample was read.
        reason: str.
    """

    def __init__(self, shard, sample, reason):
        self.shard = str(shard)
        self.sample = sample
        self.reason = reason
        self.last_key = last_key = sample.get("__key__")
        place = f"at or after the sample {last_key!r}" if last_key else "at its start"
        super().__init__(f"The shard {shard} is damaged {place}: {reason}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples, or a part of one, that is read from start to end.

    Attributes:
        path: str. The file.
        unique_keys: bool. Whether a duplicate key is an error.
        in_index: bool. Whether an index holds the content of the samples.
    """

    path: str

    unique_keys = True
    in_index = False

    def read(self, fields=None):
        """Reads the samples in order.

        Args:
            fields: collection of str. Read only these fields. A sample without any of
                them is a dict with its key alone. Defaults to `None`: all fields.

        Yields:
            dict: `"__key__"` (str) and the content of each field: bytes, or text as
            str, or a list of these; None if it is too large to be read. A sample that
            cannot be read has the entry `"__fault__"`, the reason (str).

        Raises:
            ShardError: If the file is damaged. It is raised after the last complete
                sample and holds the sample that was being read.
            FileNotFoundError: If the file does not exist.
        """
        raise NotImplementedError

    def scan(self):
        """Finds the samples in order without reading their images.

        Yields:
            `Entry`.

        Raises:
            ShardError, FileNotFoundError: As for `read`. An incomplete sample is
                yielded before.
            NoRandomAccess: If the file is compressed.
        """
        raise NotImplementedError

    def stamp(self):
        """A str that differs if the file changes."""
        return files.stamp(self.path)

    def context(self):
        """What `sample_at` needs to know of the whole file, as JSON can hold it."""
        return None

    def sample_at(self, content, number, context, fields=None):
        """Reads a sample from its bytes.

        Args:
            content: bytes. Those that an `Entry` tells.
            number: int. The number of the sample in the file, from 0.
            context: What the method `context` returned.
            fields: As for `read`.

        Returns:
            dict: As `read` yields it.
        """
        raise NotImplementedError

    def path_of(self, name):
        """The path of a file that a field names."""
        raise ValueError(f"{self} holds images, not names of files.")

    def __str__(self):
        return self.path
