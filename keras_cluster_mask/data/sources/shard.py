import dataclasses

# The entry of a sample that says what is wrong with it.
FAULT = "__fault__"


class ShardError(ValueError):
    """A shard that cannot be read to its end.

    Attributes:
        shard: str. The file.
        sample: dict. The sample that was being read, as far as it was; it may be whole.
        last_key: str. Its key; None if there was no sample yet.
    """

    def __init__(self, shard, sample, reason):
        self.shard = str(shard)
        self.sample = sample
        self.last_key = last_key = sample.get("__key__")
        place = f"at or after the sample {last_key!r}" if last_key else "at its start"
        super().__init__(f"The shard {shard} is damaged {place}: {reason}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples, or a part of one, that is read from its start to its end.

    Attributes:
        path: str. The file.
        unique_keys: bool. Whether a key that comes again is a fault.
    """

    path: str

    unique_keys = True

    def read(self, fields=None):
        """The samples, in order and one at a time.

        Args:
            fields: collection of str. Read only these; samples without any still come,
                with their key alone. Defaults to `None`: all.

        Yields:
            dict: `"__key__"` (str) and what each field holds: bytes, or text as str, or
            a list of these. None stands for what is too large to be read. A sample
            that cannot be read holds `"__fault__"`, what is wrong with it (str).

        Raises:
            ShardError: if the file breaks off, after all whole samples but the one that
                was being read, which the error holds.
            FileNotFoundError: if the file is not there.
        """
        raise NotImplementedError

    def path_of(self, name):
        """The file that a field names, where samples name files."""
        raise ValueError(f"{self} holds images, not names of files.")

    def __str__(self):
        return self.path
