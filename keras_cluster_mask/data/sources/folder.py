"""Folders of images without a table, and single images."""

import dataclasses
import hashlib
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Entry, Shard, state_of

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# The number of images in a shard: few enough to be shuffled well.
IMAGES = 1024


@dataclasses.dataclass(frozen=True)
class FolderPart(Shard):
    """Some images of a folder and its subfolders, or a single image.

    The key of a sample is the path of the image within the folder. Its fields are
    `path`, and `folder`, the name of the image's folder, which may be a class.

    Attributes:
        first: int. The number of the first image, from 0.
        names: tuple of str. The paths of the images within the folder.
    """

    first: int
    names: tuple = dataclasses.field(repr=False)

    in_index = True

    def read(self, fields=None):
        for name in self.names:
            yield self._sample(name, fields)

    def scan(self):
        offset = 0
        for name in _names(self.path):
            sample = self._sample(name, None)
            fields = {k: state_of(v) for k, v in sample.items() if k != "__key__"}
            content = os.fsencode(name)
            yield Entry(name, offset, len(content), fields, content=content)
            offset += len(content)

    def sample_at(self, content, number, context, fields=None):
        return self._sample(os.fsdecode(content), fields)

    def _sample(self, name, fields):
        path = files.beside(self.path, name)
        folder = os.path.basename(os.path.dirname(path))
        sample = {"path": path, "folder": folder}
        wanted = {k: v for k, v in sample.items() if fields is None or k in fields}
        return {"__key__": name, **wanted}

    def stamp(self):
        """The number of images and a hash of their names."""
        names = b"\0".join(map(os.fsencode, _names(self.path)))
        digest = hashlib.blake2b(names, digest_size=16).hexdigest()
        return f"{len(names)} {digest}"

    def path_of(self, name):
        return name

    def __str__(self):
        return f"{self.path} from image {self.first}" if self.first else self.path


def folder_parts(path):
    """The parts of a folder, or a single image as one part."""
    found = _names(path)
    path = _with_slash(path)
    return [
        FolderPart(path, first, tuple(found[first : first + IMAGES]))
        for first in range(0, len(found), IMAGES)
    ]


def whole_folder(path):
    """A folder as one part that lists its images when it is indexed."""
    return FolderPart(_with_slash(path), 0, ())


def _with_slash(path):
    return path.rstrip("/") + "/" if files.is_folder(path) else path


def _names(path):
    """The names of the images in a folder, or that of a single image."""
    path = _with_slash(path)
    return images_in(path) if path.endswith("/") else [os.path.basename(path)]


def images_in(folder):
    """The images of a folder and its subfolders, sorted, without hidden files."""
    return [
        name
        for name in files.all_in(folder)
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name}"
    ]
