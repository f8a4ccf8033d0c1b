"""Folders of images without a table, and single images."""

import json
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.base import Entry, Format

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


class Folder(Format):
    """Images in a folder and its subfolders, or a single image.

    The key of a sample is the path of the image within the folder. Its fields are
    `path`, and `folder`, the name of the image's folder, which may be a class.
    """

    in_index = True
    names_files = True

    def scan(self, path):
        offset = 0
        for name in images_in(path):
            content = json.dumps(name).encode()
            _, fields = self.parse(content, 0, None)
            yield Entry(name, offset, len(content), fields, None, content)
            offset += len(content)

    def parse(self, content, number, context):
        name = json.loads(content)
        return name, {"path": name, "folder": os.path.dirname(name)}


def images_in(path):
    """Lists the images of a folder and its subfolders, sorted, without hidden files.

    Args:
        path: str. A folder, which ends with a slash, or an image.
    """
    if not path.endswith("/"):
        return [os.path.basename(path)]
    system, folder = files.file_system(path)
    within = len(folder.rstrip("/")) + 1
    names = (found[within:] for found in system.find(folder))
    return sorted(
        name
        for name in names
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name}"
    )
