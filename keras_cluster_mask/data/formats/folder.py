"""Folders of images without a table, and single images."""

import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import ERROR, FILE, KEY, BrokenSample, digest_of
from keras_cluster_mask.data.sources import Source

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"),
    *(".heic", ".heif", ".gif", ".bmp", ".tif", ".tiff"),
)


class Folder(Source):
    """Images in folders and their subfolders, or single images, a source.

    The key of a sample is the path of the image within the folder. Its fields are
    `path`, `folder`, the name of the image's folder, which may be a class, and `txt`,
    the text of the file `KEY.txt` next to `KEY.jpg`.

    Args:
        stamps: Dictionary from each path to a string that changes with it.

    Attributes:
        stamps: The argument.
        folders: Set of strings. The names of the folders with images.
        fingerprint: String. A hash of the names of the files.
    """

    def __init__(self, stamps, image_keys=()):
        self.stamps = stamps
        found = {path: images_in(path) for path in stamps}
        self._images = [(path, *x) for path in found for x in found[path].items()]
        self.folders = {os.path.dirname(name) for _, name, _ in self._images} - {""}
        self.fingerprint = digest_of([image[1:] for image in self._images])

    def __len__(self):
        return len(self._images)

    def __getitems__(self, numbers):
        images = [self._images[number] for number in numbers]
        named = [files.beside(path, text) for path, _, text in images if text]
        texts = iter(files.read_ranges([(name, 0, None) for name in named]))
        items = []
        for path, name, text in images:
            item = {"path": name, "folder": os.path.dirname(name)}
            item["txt"] = next(texts) if text else b""
            if isinstance(item["txt"], Exception):
                reason = "the caption cannot be read", f"{text}: {item['txt']}"
                item = {ERROR: BrokenSample(*reason)}
            items.append({KEY: name, FILE: path, **item})
        return items


def images_in(path):
    """Lists the images of a folder and its subfolders, without hidden files.

    Args:
        path: String. A folder, which ends with a slash, or an image.

    Returns:
        Dictionary, sorted, from the name of each image to the name of the file of its
        caption, or an empty string.
    """
    if not path.endswith("/"):
        return {os.path.basename(path): ""}
    system, folder = files.file_system(path)
    within = len(folder.rstrip("/")) + 1
    if files.is_address(path):
        found = system.find(folder)
    else:
        found, seen = [], set()
        # Unlike fsspec, it follows links to folders.
        for top, folders, names in os.walk(folder, followlinks=True):
            # A link may point at a folder above.
            if (real := os.path.realpath(top)) in seen:
                folders.clear()
                continue
            seen.add(real)
            found += [os.path.join(top, name) for name in names]
    found = {name[within:] for name in found}
    texts = {name: f"{os.path.splitext(name)[0]}.txt" for name in sorted(found)}
    images = {
        name: text if text in found else ""
        for name, text in texts.items()
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name}"
    }
    if not images:
        raise FileNotFoundError(
            f"`source` must name shards, such as {os.path.join(path, '*.tar')!r}, a "
            "folder with images, or a table with one row per image. Received: a folder "
            "without images: " + path
        )
    return images
