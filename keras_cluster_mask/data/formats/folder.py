"""Folders of images without a table, and single images."""

import json
import os

from keras_cluster_mask.data import files
from keras_cluster_mask.data.samples import Entry, Format

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"),
    *(".gif", ".bmp", ".tif", ".tiff"),
)


class Folder(Format):
    """Images in a folder and its subfolders, or a single image.

    The key of a sample is the path of the image within the folder. Its fields are
    `path`, `folder`, the name of the image's folder, which may be a class, and `txt`,
    the text of the file `KEY.txt` beside `KEY.jpg`.
    """

    names_files = True

    def context(self, path):
        """Returns the names of the folders with images."""
        return sorted({*map(os.path.dirname, images_in(path))} - {""})

    def scan(self, path):
        """Also yields the content of each sample, which the index stores."""
        offset, images = 0, images_in(path)
        named = [name for name in images if images[name]]
        places = [(files.beside(path, _text_of(name)), 0, None) for name in named]
        texts = dict(zip(named, files.read_ranges(places)))
        for name in images:
            text = texts.get(name, b"")
            if isinstance(text, Exception):
                raise text
            # Without a loss of bytes that are not UTF-8.
            text = text.decode(errors="surrogateescape")
            content = json.dumps([name, text]).encode()
            place = offset, len(content)
            _, fields = self.parse(content, 0, None)
            yield Entry(name, place, fields, None, content)
            offset += len(content)

    def read(self, places):
        return [part.content(place) for part, place in places]

    def parse(self, content, number, context):
        name, text = json.loads(content)
        fields = {"path": name, "folder": os.path.dirname(name)}
        if text:
            fields["txt"] = text.encode(errors="surrogateescape")
        return name, fields


def images_in(path):
    """Lists the images of a folder and its subfolders, without hidden files.

    Args:
        path: String. A folder, which ends with a slash, or an image.

    Returns:
        Dictionary, sorted, from the name of each image to the information on the file
        of its caption, or `None`.
    """
    if not path.endswith("/"):
        return {os.path.basename(path): None}
    system, folder = files.file_system(path)
    within = len(folder.rstrip("/")) + 1
    if files.is_address(path):
        found = system.find(folder, detail=True)
    else:
        found, seen = {}, set()
        for top, _, names in os.walk(folder, followlinks=True):
            # A link to a folder above would be followed again and again.
            if (real := os.path.realpath(top)) in seen:
                raise ValueError(
                    f"`source` must not hold a folder twice, by links. Received: {top}"
                )
            seen.add(real)
            for path in (os.path.join(top, name) for name in names):
                # A linked caption changes with its target.
                is_text = path.endswith(".txt") and os.path.exists(path)
                found[path] = system.info(os.path.realpath(path)) if is_text else None
    return {
        name[within:]: found.get(_text_of(name))
        for name in sorted(found)
        if name.lower().endswith(ENDINGS) and "/." not in f"/{name[within:]}"
    }


def _text_of(name):
    return f"{os.path.splitext(name)[0]}.txt"
