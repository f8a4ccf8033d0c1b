"""The embeddings of all photographs of a folder, kept in a file."""

import contextlib
import hashlib
import importlib.util
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import tqdm
from PIL import Image

from keras_cluster_mask.data.files import replacing
from keras_cluster_mask.data.images import NO_HEIC

CACHE = Path.home() / ".cache" / "keras_cluster_mask" / "search"
# Images that Pillow opens: no videos, tables or PostScript.
TYPES = {x: Image.MIME.get(y, "") for x, y in Image.registered_extensions().items()}
SUFFIXES = {suffix for suffix, kind in TYPES.items() if kind.startswith("image/")}
HEIC = {".heic", ".heif"}
AT_A_TIME = 32


class Index:
    """The photographs of a folder, and of all folders inside.

    Args:
        model: An object with `encode_image` and `encode_text`, such as a
            `ContrastiveModel` or an `ExportedModel`.
        version: String that changes with the model.
        folder: Path of the photographs.
        cache: Path of the folder to keep the embeddings in.

    Attributes:
        names: List of the names of all photographs, relative to the folder.
        embeddings: `(photographs, d)` float32 array.
        left_out: List of lines about files that are not searched.
        error: The error of the last photograph that could not be embedded, or `None`.
    """

    def __init__(self, model, version, folder, cache=CACHE):
        self.model, self.folder = model, folder.resolve()
        digest = hashlib.sha256(os.fsencode(self.folder) + version.encode())
        self.file = cache / f"{digest.hexdigest()[:16]}.npz"
        self.names, self.embeddings, self.left_out = [], np.zeros((0, 0)), []
        self.error = None

    def update(self):
        """Embeds photographs that are new or have changed, with a progress bar."""
        files = [x for x in self.folder.rglob("*") if not x.is_dir()]
        images = sorted(x for x in files if x.suffix.lower() in SUFFIXES | HEIC)
        versions = {str(x.relative_to(self.folder)): version_of(x) for x in images}
        known = {
            name: row
            for name, version, row in self._read()
            if version and version == versions.get(name)
        }
        new = [
            name for name, version in versions.items() if version and name not in known
        ]
        try:
            with tqdm.tqdm(total=len(new), unit=" photos", disable=not new) as progress:
                for start in range(0, len(new), AT_A_TIME):
                    names = new[start : start + AT_A_TIME]
                    known.update(self._embedded(names))
                    progress.update(len(names))
        finally:
            # An interrupted start keeps what it has embedded.
            self.names = [name for name in versions if name in known]
            self.embeddings = np.array([known[name] for name in self.names], "float32")
            if new:
                self._write([versions[name] for name in self.names])
        broken = [name for name in versions if name not in known]
        others = Counter(x.suffix.lower() for x in files) - Counter(
            x.suffix.lower() for x in images
        )
        self.left_out = [f"Cannot be read as an image: {name}" for name in broken]
        has_heic = any(x.lower().endswith(tuple(HEIC)) for x in broken)
        if has_heic and not importlib.util.find_spec("pillow_heif"):
            self.left_out.append(NO_HEIC)
        self.left_out += [
            f"Not images: {suffix or 'without extension'} ({count})"
            for suffix, count in others.items()
        ]

    def nearest(self, query, count):
        """Returns pairs of a name and a similarity, the most similar ones first."""
        scores = self.embeddings @ query
        best = np.argsort(-scores, kind="stable")[:count]
        return [(self.names[i], scores[i]) for i in best]

    def _embedded(self, names):
        """Returns pairs of a name and an embedding, of files that are images."""
        try:
            rows = self.model.encode_image([self.folder / name for name in names])
            return [*zip(names, rows, strict=True)]
        except (OSError, ValueError) as error:
            if len(names) == 1:
                self.error = error
                return []
            return [pair for name in names for pair in self._embedded([name])]

    def _read(self):
        """Returns the name, the version and the embedding of each known photograph."""
        # A file that is damaged is like none: NumPy raises many kinds of errors.
        with contextlib.suppress(Exception), np.load(self.file) as found:
            parts = (found[x] for x in ("names", "versions", "embeddings"))
            return [*zip(*(x.tolist() if x.ndim == 1 else x for x in parts))]
        return []

    def _write(self, versions):
        with replacing(self.file) as file:
            np.savez(
                file,
                names=np.array(self.names, str),
                versions=np.array(versions, str),
                embeddings=self.embeddings,
            )


def version_of(path):
    """Returns a text that changes with a file, "" unless there is one to read."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return f"{found.st_size} {found.st_mtime_ns}"
    return ""
