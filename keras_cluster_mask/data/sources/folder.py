"""Folders of pictures with nothing beside them, and single pictures."""

import dataclasses
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Shard

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# So many pictures are a shard: few enough to be shuffled well.
PICTURES = 1024


@dataclasses.dataclass(frozen=True)
class FolderPart(Shard):
    """Some pictures of a folder and of the folders in it, by name; or one picture.

    A sample's key is the picture's path within the folder. Its fields are `path`, and
    `folder`, the name of the folder that the picture lies in, for where folders are
    classes.

    Attributes:
        first: int. The number of the first picture, from 0.
        names: tuple of str. Their paths within the folder.
    """

    first: int
    names: tuple = dataclasses.field(repr=False)

    def read(self, fields=None):
        for name in self.names:
            path = files.beside(self.path, name)
            folder = os.path.basename(os.path.dirname(path))
            sample = {"path": path, "folder": folder}
            yield {
                "__key__": name,
                **{k: v for k, v in sample.items() if fields is None or k in fields},
            }

    def path_of(self, name):
        return name

    def __str__(self):
        return f"{self.path} from picture {self.first}" if self.first else self.path


def folder_parts(path):
    """The parts of a folder; of a single picture, the picture."""
    found = [os.path.basename(path)]
    if files.is_folder(path):
        path = path.rstrip("/") + "/"
        found = pictures_in(path)
    return [
        FolderPart(path, first, tuple(found[first : first + PICTURES]))
        for first in range(0, len(found), PICTURES)
    ]


def pictures_in(folder):
    """The pictures of a folder and of the folders in it, sorted; no hidden ones."""
    return [
        name
        for name in files.all_in(folder)
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name}"
    ]
