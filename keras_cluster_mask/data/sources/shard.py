"""The interface of all shards."""

import dataclasses

# The entry of a sample that tells why it is broken.
FAULT = "__fault__"


class ShardError(ValueError):
    """A shard that cannot be read to its end.

    Attributes:
        shard: str. The file.
        sample: dict. The sample that was being read; it may be complete.
        last_key: str. Its key, or None if no sample was read.
    """

    def __init__(self, shard, sample, reason):
        self.shard = str(shard)
        self.sample = sample
        self.last_key = last_key = sample.get("__key__")
        place = f"at or after the sample {last_key!r}" if last_key else "at its start"
        super().__init__(f"The shard {shard} is damaged {place}: {reason}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples, or a part of one, that is read from start to end.

    Attributes:
        path: str. The file.
        unique_keys: bool. Whether a duplicate key is an error.
    """

    path: str

    unique_keys = True

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

    def path_of(self, name):
        """The path of a file that a field names."""
        raise ValueError(f"{self} holds images, not names of files.")

    def __str__(self):
        return self.path
