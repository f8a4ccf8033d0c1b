"""The file of an index: an npz archive of rows, and of JSON that describes them."""

import json
import os
import zipfile

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.search.fingerprint import Fingerprint

FILE_FORMAT = "keras_cluster_mask.ImageIndex"
VERSION = 1


def write_index(path, embeddings, keys, paths, fingerprint):
    """Writes the content of an index, all or nothing.

    Args:
        path: str or path.
        embeddings: `(pictures, d)` array.
        keys: List of str.
        paths: List of str or `None`.
        fingerprint: `Fingerprint`, or `None`.
    """
    description = {
        "format": FILE_FORMAT,
        "version": VERSION,
        "keys": keys,
        "paths": paths,
        "fingerprint": fingerprint and fingerprint.as_dict(),
    }
    # JSON escapes what UTF-8 has no bytes for, such as odd names of files.
    text = np.frombuffer(json.dumps(description).encode(), "uint8")
    with files.replacing(path) as file:
        np.savez(file, description=text, embeddings=embeddings)


def check_place(path):
    """Raises an error for a path at which no index should be written.

    Args:
        path: str or path.
    """
    name = os.fspath(path)
    if not name.lower().endswith(".npz"):
        raise ValueError(f"`path` must end in .npz. Received: path={name}")
    if files.exists(name):
        # Only an index is replaced by another.
        read_index(name)


def read_index(path):
    """Reads what `write_index` wrote. It runs nothing that a file may hold.

    Args:
        path: str or path.

    Returns:
        Tuple of embeddings, keys, paths and fingerprint.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is no index, damaged, or of another version.
    """
    with files.open_file(path) as file:
        try:
            # A file of a single array is no such archive.
            with np.load(file, allow_pickle=False) as content:
                description = json.loads(content["description"].tobytes())
                if description["format"] != FILE_FORMAT:
                    raise ValueError(f"its format is {description['format']!r}")
                version = description["version"]
                if version == VERSION:
                    return _content(description, content["embeddings"])
        except (
            *(ValueError, KeyError, TypeError, AttributeError),
            *(EOFError, OSError, NotImplementedError, zipfile.BadZipFile),
        ) as error:
            raise ValueError(
                "`path` must be a file that `ImageIndex.save` wrote; this one is "
                f"damaged or something else ({error}). Received: path={path}"
            ) from error
    raise ValueError(
        f"`path` must be an index of version {VERSION}, which this release reads: "
        f"build it anew. Received: version {version!r} in {path}"
    )


def _content(description, embeddings):
    mark = description["fingerprint"]
    fingerprint = None if mark is None else Fingerprint(**mark)
    return embeddings, description["keys"], description["paths"], fingerprint
