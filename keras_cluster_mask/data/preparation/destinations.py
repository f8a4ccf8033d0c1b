"""Where samples are written to: tar shards, TFRecord shards, folders of pictures."""

import contextlib
import hashlib
import json
import os
import re
import typing

from keras_cluster_mask.data import files
from keras_cluster_mask.data.pairs import IMAGE_KEYS
from keras_cluster_mask.data.sources import read_samples
from keras_cluster_mask.data.sources.manifest import ManifestWriter
from keras_cluster_mask.data.sources.tfrecord import RecordWriter
from keras_cluster_mask.data.sources.webdataset import TarWriter, tar_key

# A name of a file has 255 bytes at most; a number, an ending and a mark are added.
MAX_NAME = 200
EXTENSIONS = {"JPEG": "jpg"}


class Encoded(typing.NamedTuple):
    """A picture as it is written.

    Attributes:
        content: bytes.
        format: str. What kind of file it is, such as `"JPEG"`.
    """

    content: bytes
    format: str

    @property
    def extension(self):
        """str. What the name of such a file ends in."""
        return EXTENSIONS.get(self.format, self.format.lower())


def find_destination(to):
    """What `to` asks for.

    Args:
        to: str or path. `shards/train-{00000}.tar` or `.tfrecord`: shards, numbered as
            the zeros say; without these, one shard. `folder/metadata.csv`, `.tsv` or
            `.jsonl`: pictures in `folder`, and a manifest.

    Returns:
        A `Destination`.

    Raises:
        ValueError: if its name ends otherwise.
    """
    to = os.fspath(to) if files.is_address(to) else os.path.expanduser(to)
    kinds = {
        r"\.tar": TarDestination,
        r"\.tfrec(ords?)?(\.gz)?": RecordDestination,
        r"\.(csv|tsv|jsonl)": FolderDestination,
    }
    for ending, kind in kinds.items():
        if re.search(ending + "$", to, re.IGNORECASE):
            return kind(to)
    raise ValueError(
        "`to` must say what to write by its end: 'shards/train-{00000}.tar', "
        "'shards/train-{00000}.tfrecord', or 'folder/metadata.csv' (or .tsv, .jsonl). "
        f"Received: {to}"
    )


class Destination:
    """Where samples go, part by part; a part is there only once it is whole.

    Args:
        to: str. As the user wrote it.
    """

    def __init__(self, to):
        self.to = to
        match = re.search(r"\{(0+)\}", to)
        if "{" in (to.replace(match[0], "", 1) if match else to):
            raise ValueError(
                "`to` must hold nothing but zeros between its braces, as in "
                f"'train-{{00000}}.tar', and braces once. Received: {to}"
            )
        self.several = match is not None
        self._width = len(match[1]) if match else 0
        self._before, _, self._after = to.partition(match[0] if match else "\0")

    @property
    def state_path(self):
        """str. The file that says how far a run is."""
        return self.to + ".state.json"

    def path(self, number):
        """The file of a part."""
        if not self.several:
            return self.to
        return f"{self._before}{number:0{self._width}}{self._after}"

    def outputs(self, count):
        """The files to be read once all `count` parts are there."""
        return [self.path(number) for number in range(count)]

    def key(self, key):
        """A key as it can be written here."""
        return key

    def same(self, key):
        """What two keys share that cannot stand beside one another."""
        return key

    def open(self, number):
        """A context manager: a part, to whose `write` go key, `Encoded`, captions."""
        raise NotImplementedError

    def keys(self, number):
        """The keys in a part that is there."""
        return (sample["__key__"] for sample in read_samples(self.path(number), ()))

    def finish(self, count):
        """Makes one of all parts, where that is to be done."""

    def tidy(self, count):
        """Removes what is of no use after the end."""
        # Of an earlier run that was longer.
        while self.several and files.exists(self.path(count)):
            files.remove(self.path(count))
            count += 1


class TarDestination(Destination):
    """Tar shards in the layout of WebDataset and img2dataset.

    Of several captions the first is `KEY.txt`, and `KEY.json` holds all.
    """

    def key(self, key):
        return tar_key(safe_path(key))

    @contextlib.contextmanager
    def open(self, number):
        with files.replacing(self.path(number)) as file:
            writer = TarWriter(file)
            yield _TarPart(writer)
            writer.close()


class _TarPart:
    def __init__(self, writer):
        self._writer = writer

    def write(self, key, picture, captions):
        # Under this name a reader finds the kinds that it does not know by theirs.
        known = picture.extension in IMAGE_KEYS
        fields = {
            picture.extension if known else "image": picture.content,
            "txt": captions[0].encode("utf-8", "replace"),
        }
        if len(captions) > 1:
            several = json.dumps({"captions": list(captions)}, ensure_ascii=False)
            fields["json"] = several.encode("utf-8", "replace")
        self._writer.write(key, fields)


class RecordDestination(Destination):
    """TFRecord shards: `__key__`, `image`, and one or more values of `caption`."""

    @contextlib.contextmanager
    def open(self, number):
        with files.replacing(self.path(number)) as file:
            writer = RecordWriter(file, self.to.lower().endswith(".gz"))
            yield _RecordPart(writer)
            writer.close()


class _RecordPart:
    def __init__(self, writer):
        self._writer = writer

    def write(self, key, picture, captions):
        captions = [caption.encode("utf-8", "replace") for caption in captions]
        self._writer.write(key, {"image": [picture.content], "caption": captions})


class FolderDestination(Destination):
    """Pictures in folders of a part each, and a manifest beside these.

    The manifest is written last: without it the folder is not a dataset. Until then its
    rows are in a hidden folder.
    """

    def __init__(self, to):
        super().__init__(to)
        if self.several:
            raise ValueError(
                f"`to` must name one manifest, without braces. Received: {to}"
            )
        # All the same in parts.
        self.several = True
        self._name = to.rpartition("/")[2]

    def path(self, number):
        ending = self._name.rpartition(".")[2]
        return files.beside(self.to, f".{self._name}.parts/{number:05}.{ending}")

    def outputs(self, count):
        return [self.to]

    def key(self, key):
        return safe_path(key)

    def same(self, key):
        # Some file systems do not tell A from a.
        return key.casefold()

    @contextlib.contextmanager
    def open(self, number):
        with files.replacing(self.path(number)) as file:
            writer = ManifestWriter(file, self.to)
            yield _FolderPart(writer, self.to, f"{number:05}")
            writer.close()

    def finish(self, count):
        with files.replacing(self.to) as file:
            if not count:
                ManifestWriter(file, self.to)
            for number in range(count):
                with files.open_file(self.path(number)) as part:
                    if number and not self.to.lower().endswith(".jsonl"):
                        part.readline()
                    while content := part.read(2**20):
                        file.write(content)

    def tidy(self, count):
        for number in range(count):
            if files.exists(self.path(number)):
                files.remove(self.path(number))
        folder = files.beside(self.to, f".{self._name}.parts")
        if not files.is_address(folder) and os.path.isdir(folder):
            os.rmdir(folder)


class _FolderPart:
    def __init__(self, writer, manifest, folder):
        self._writer = writer
        self._manifest = manifest
        self._folder = folder

    def write(self, key, picture, captions):
        name = f"{self._folder}/{key}.{picture.extension}"
        path = files.beside(self._manifest, name)
        # To wait for the disk at each would take longer than all the rest.
        with files.replacing(path, durable=False) as file:
            file.write(picture.content)
        self._writer.write(key, {"file_name": name, "captions": list(captions)})


def safe_path(key):
    """A key as a path below a folder, on any system.

    Args:
        key: str.

    Returns:
        str: without the ending of a picture's name, without parts that lead elsewhere
        or hide, and without characters that some systems do not have in names.
    """
    key = re.sub(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", "", key, flags=re.IGNORECASE)
    key = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]', "_", key)
    names = (name.lstrip(". ").rstrip(". ") for name in key.split("/"))
    return "/".join(_short(name) for name in names if name) or "sample"


def _short(name):
    content = name.encode()
    if len(content) <= MAX_NAME:
        return name
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    return content[: MAX_NAME - 13].decode("utf-8", "ignore") + "-" + digest
