"""Embeddings of pictures, with their names, in one file."""

import os
import typing

import numpy as np

from keras_cluster_mask.data import ImageTextBatches, files
from keras_cluster_mask.data.pictures import height_and_width
from keras_cluster_mask.evaluation.embedding import Embedder, embed
from keras_cluster_mask.models.loading import image_size_of
from keras_cluster_mask.search.checks import check_embeddings, check_queries
from keras_cluster_mask.search.fingerprint import Fingerprint
from keras_cluster_mask.search.index_file import check_place, read_index, write_index
from keras_cluster_mask.search.nearest import Cells, nearest


class Match(typing.NamedTuple):
    """A picture that was found.

    Attributes:
        key: str. Its name: of a picture in a folder the path within it.
        similarity: float from -1 to 1, the cosine of the angle to the query.
        row: int. Its row in the index.
        path: str. Its file; `None` if it lies inside a shard or that is not known.
    """

    key: str
    similarity: float
    row: int
    path: str | None = None


class ImageIndex:
    """Embeddings of pictures, to be searched.

    The index holds a row of numbers and a name a picture, not the picture: a million
    pictures at a width of 512 take 2 GB. To search it by words or pictures, put it into
    a `Searcher` beside the model it was built with.

    Example:

    ```python
    import pathlib
    from PIL import Image

    pathlib.Path("pictures").mkdir(exist_ok=True)
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 48), colour).save(f"pictures/{colour}.png")

    model = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=600)
    index = kcm.search.ImageIndex.build(model, "pictures")
    index.save("pictures.npz")
    index = kcm.search.ImageIndex.load("pictures.npz")
    index.search(index.embeddings[0], k=2)[0].key  # "blue.png", most like itself
    ```

    Args:
        embeddings: `(pictures, d)` array, L2-normalised.
        keys: Sequence of str or bytes, the name of each picture.
        paths: Sequence of str, path or `None`, the file of each, for showing it.
        fingerprint: `Fingerprint` of the model that embedded the pictures, by which
            `Searcher` refuses another. `None` if it is not known.

    Attributes:
        embeddings: `(pictures, d)` float32 array.
        keys: List of str.
        paths: List of str or `None`.
        num_skipped: Integer. How many pictures `build` could not read.

    Raises:
        ValueError: For embeddings that are NaN, infinite or not L2-normalised, or as
            many keys or paths as do not fit them.
    """

    def __init__(self, embeddings, keys, paths=None, fingerprint=None):
        self.keys = [_text(key) for key in keys]
        paths = [None] * len(self.keys) if paths is None else paths
        self.paths = [path and os.fsdecode(path) for path in paths]
        self.embeddings = check_embeddings(embeddings, self.keys)
        if len(self.paths) != len(self.keys):
            raise ValueError(
                "`paths` must be as many as `keys`. "
                f"Received: {len(self.paths)} paths and {len(self.keys)} keys"
            )
        self.fingerprint = fingerprint
        self.num_skipped = 0
        self._cells = None

    @classmethod
    def build(
        cls, model, source, image_size=None, batch_size=64, verbose="auto", **options
    ):
        """Embeds pictures, batch by batch, and makes an index of them.

        Pictures that cannot be read are left out: a warning names the first and sums
        them up, and the index counts them as `num_skipped`.

        Args:
            model: A `ContrastiveModel`, a keras_hub `CLIPBackbone` or
                `SigLIPBackbone`, or the path of one that was saved.
            source: str or path, or a list of them: a folder of pictures, picture files,
                shards, manifests, or patterns; see `kcm.data.list_shards`.
            image_size: Integer or `(height, width)`, of what is cut out of the middle
                of each picture. Defaults to what the model's image encoder takes.
            batch_size: Integer. How many pictures are embedded at a time.
            verbose: `"auto"`, 0 or 1. Whether to show progress.
            **options: Arguments of `kcm.data.ImageTextBatches`, such as `image_keys` or
                `on_error`.

        Returns:
            An `ImageIndex`, in the order of the files.

        Raises:
            FileNotFoundError: If the source is missing, or a folder holds no picture.
            ValueError: If no picture can be read, or the model says of no size that it
                takes and none is given.
        """
        embedder = Embedder.of(model)
        if image_size is None:
            image_size = image_size_of(embedder.model)
        if image_size == (None, None):
            raise ValueError(
                "`image_size` must be given for a model whose image encoder does not "
                f"say which images it takes. Received: image_size=None, model={model}"
            )
        batches = ImageTextBatches(
            source,
            None,
            image_size,
            batch_size,
            training=False,
            # All of it, whatever number of processes is training.
            **{"process": (0, 1), **options},
            include_keys=True,
            include_paths=True,
        )
        found = embed(embedder, _some(batches, source), verbose=verbose)
        index = cls(
            found["image_embeddings"],
            found["keys"],
            [_place(os.fsdecode(path)) if path else None for path in found["paths"]],
            Fingerprint.of(embedder, height_and_width(image_size)),
        )
        index.num_skipped = batches.skipped.count
        return index

    def search(self, embeddings, k=10, approximate=False):
        """Finds the pictures whose embeddings are most similar.

        Args:
            embeddings: `(d,)` or `(queries, d)` array, of any length but 0.
            k: Integer. How many pictures to find; all if there are fewer.
            approximate: Boolean. Whether to search by faiss, which compares a query
                with a part of the rows: for millions of pictures. It may miss some, and
                find fewer than `k` where `k` is large. The first such search sorts the
                rows into cells, for which it takes a copy of them in memory.

        Returns:
            A list of `Match`, the most similar first and equals in the order of rows,
            for a single query; a list of such lists for several.

        Raises:
            ImportError: For an approximate search without faiss.
            ValueError: For another width, NaN or zero queries, or a `k` below 1.
        """
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"`k` must be an integer of at least 1. Received: k={k}")
        queries = check_queries(embeddings, self.embeddings.shape[1])
        k = min(int(k), len(self))
        if approximate:
            self._cells = self._cells or Cells(self.embeddings)
            found = self._cells.nearest(queries, k)
        else:
            found = nearest(self.embeddings, queries, k)
        matches = [
            [
                Match(self.keys[row], similarity, row, self.paths[row])
                for row, similarity in zip(rows.tolist(), similarities.tolist())
            ]
            for rows, similarities in found
        ]
        return matches if np.ndim(embeddings) == 2 else matches[0]

    def save(self, path, dtype="float32"):
        """Writes the index, for `load`.

        Args:
            path: str or path that ends in `.npz`. The file is complete or not there.
                An older index there is replaced; any other file is an error.
            dtype: `"float32"`, or `"float16"` for half the size and similarities that
                are right to about three digits.
        """
        if dtype not in ("float32", "float16"):
            raise ValueError(
                f'`dtype` must be "float32" or "float16". Received: dtype={dtype!r}'
            )
        check_place(path)
        rows = self.embeddings.astype(dtype, copy=False)
        write_index(path, rows, self.keys, self.paths, self.fingerprint)

    @classmethod
    def load(cls, path):
        """Reads an index that `save` wrote. It runs nothing that a file may hold.

        Args:
            path: str or path.

        Returns:
            An `ImageIndex`.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If it is no index, damaged, or of another version.
        """
        return cls(*read_index(path))

    def __len__(self):
        return len(self.keys)

    def __repr__(self):
        return f"<ImageIndex of {len(self)} pictures, {self.embeddings.shape[1]} wide>"


def _some(batches, source):
    """The batches, of which there must be one."""
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise ValueError(
            "`source` must hold a picture that can be read. "
            f"Received: {source}, {batches.skipped}"
        )


def _text(key):
    """A key as str; batches hold bytes."""
    is_bytes = isinstance(key, bytes)
    return key.decode("utf-8", "surrogateescape") if is_bytes else str(key)


def _place(path):
    """A path that is found from any folder."""
    return path if files.is_address(path) else os.path.abspath(path)
