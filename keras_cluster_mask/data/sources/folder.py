"""Folders of images without a table, and single images."""

import dataclasses
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.sources.shard import Shard

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
        return f"{self.path} from image {self.first}" if self.first else self.path


def folder_parts(path):
    """The parts of a folder, or a single image as one part."""
    found = [os.path.basename(path)]
    if files.is_folder(path):
        path = path.rstrip("/") + "/"
        found = images_in(path)
    return [
        FolderPart(path, first, tuple(found[first : first + IMAGES]))
        for first in range(0, len(found), IMAGES)
    ]


def images_in(folder):
    """The images of a folder and its subfolders, sorted, without hidden files."""
    return [
        name
        for name in files.all_in(folder)
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name}"
    ]
