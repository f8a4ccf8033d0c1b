"""Which samples an epoch trains on, by clusters of similar images.

A sampler knows samples by the hashes of their keys, which the index holds. So it reads
no sample to choose those of an epoch, and chooses the same in each process.
"""

import functools
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from keras_cluster_mask.checks import check_fraction, check_integer, check_range
from keras_cluster_mask.data import files
from keras_cluster_mask.data.parts import hash_of

# DynamiCS has about so many images in a cluster, before clusters are merged.
PER_CLUSTER, MIN_CLUSTERS = 4000, 16
# More embeddings than these do not make the centers better.
PER_CENTER = 1000
# The rows that are computed together.
ROWS = 2**18


class ClusterSampling:
    """Trains on fewer samples of large clusters, new ones in each epoch (DynamiCS).

    A cluster of `n` samples gives `r = T * n**alpha / sum(n**alpha)` samples to an
    epoch, of which it has `T = share * (number of samples)`. So large clusters are
    thinned most, and remain larger than small ones. Each sample is drawn by itself with
    the probability `r / n`, from a hash of its key, the epoch and `seed`: the same
    samples in all processes, and after a resume.

    In a small cluster, `r` can exceed `n`. As in the official code, each of its samples
    then occurs once, and the epoch is shorter than `T`. With `repeat`, samples occur
    several times, and the mean length of an epoch is `T`. Epochs differ in length by
    chance: `len` of a dataset is the number of batches of the epoch at its start, and
    `steps_per_epoch` that of an epoch of the mean length. `ContrastiveModel.fit` trains
    for the latter number of steps in each epoch, and no sample is lost between epochs.

    A sampler holds 12 bytes for each key; a dataset with it, in each process and worker
    process, 12 bytes for each sample and 8 for each of the samples of two epochs.

    Example:

    ```python
    keys = [f"{i:03}" for i in range(1000)]
    clusters = {key: 0 if i < 900 else 1 for i, key in enumerate(keys)}
    sampling = kcm.data.ClusterSampling(clusters)
    print(sampling.probability("000"), sampling.probability("999"))  # 0.338..., 1.0
    print([sampling.copies("000", epoch) for epoch in range(5)])
    # dataset = kcm.data.image_text_dataset(..., training=True, sampling=sampling)
    ```

    Args:
        clusters: dict from the key of each sample to the number of its cluster. Keys
            are as in `dataset.keys` and, with `include_keys`, in batches; str or bytes.
            Samples that are not in the dataset count, too. Or a pair of the keys and
            the numbers; or the path of a file, local or at a URL, of `save` or of
            `np.savez(path, keys=keys, clusters=clusters)`.
        alpha: float from 0 to 1. With 0 all clusters give as many samples, with 1 all
            give the same share. Defaults to `0.2`.
        share: float, above 0 to 1. The length of an epoch, as a share of all samples.
            Defaults to `0.5`.
        repeat: bool. Whether samples of small clusters occur several times in an epoch.
            Defaults to `False`.
        seed: int. Defaults to `0`.

    Raises:
        ValueError: If an argument is invalid, or, in `image_text_dataset`, if the
            cluster of a sample is not known.

    Reference:

    - [Dynamic Cluster Data Sampling for Efficient and Long-Tail-Aware Vision-Language
      Pre-training](https://arxiv.org/abs/2604.27932)
    """

    def __init__(
        self,
        clusters: Any,
        alpha: float = 0.2,
        share: float = 0.5,
        repeat: bool = False,
        seed: int = 0,
    ):
        check_range("alpha", alpha, 0, 1)
        check_fraction("share", share)
        self.alpha, self.share, self.repeat = alpha, share, bool(repeat)
        self.seed = check_integer("seed", seed, 0)
        keys, clusters = _keys_and_clusters(clusters)
        self._hashes, order = sorted_hashes(keys)
        # The number of a cluster, the place of each sample's cluster, and their sizes.
        self._names, places, counts = np.unique(
            clusters[order], return_inverse=True, return_counts=True
        )
        self._clusters = places.astype("int32")
        sizes = counts**alpha
        copies = share * len(keys) * sizes / sizes.sum() / counts
        self._copies = copies if repeat else np.minimum(copies, 1.0)

    @classmethod
    def from_embeddings(
        cls,
        embeddings: np.ndarray,
        keys: Sequence[str | bytes] | np.ndarray,
        num_clusters: int | None = None,
        iterations: int = 10,
        merge_threshold: float = 0.7,
        *,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """Clusters embeddings by spherical k-means, with faiss.

        Centers are then visited in order. A center is dropped if its cosine similarity
        to a kept center is at least `merge_threshold`. Each sample joins the cluster of
        the nearest kept center. Save the result: clusters that each process computes
        on its own may differ.

        Example:

        ```python
        generator = np.random.default_rng(0)
        centers = generator.normal(size=(3, 32))
        embeddings = np.repeat(centers, [900, 90, 10], axis=0)
        embeddings += 0.1 * generator.normal(size=embeddings.shape)
        keys = [f"{i:03}" for i in range(1000)]
        sampling = kcm.data.ClusterSampling.from_embeddings(embeddings, keys)
        sampling.save("clusters.npz")
        sampling = kcm.data.ClusterSampling("clusters.npz")
        ```

        Args:
            embeddings: float array `(num_samples, dim)`, which may be a `np.memmap`; of
                images by DINOv2 in the paper. Rows need not be normalized.
            keys: Sequence of str or bytes. The keys of the samples.
            num_clusters: int, before similar ones are merged. Defaults to `None`: one
                for each 4,000 samples, as in the paper, and at least 16.
            iterations: int, of k-means. Defaults to `10`.
            merge_threshold: float from 0 to 1. Defaults to `0.7`.
            seed: int, also of k-means. Defaults to `0`.
            **options: `alpha`, `share` and `repeat`; see the class.

        Returns:
            `ClusterSampling`.

        Raises:
            ImportError: If faiss is not installed.
            ValueError: If an argument is invalid.
        """
        # A list; arrays, which may be files, are read in pieces.
        if not hasattr(embeddings, "shape"):
            embeddings = np.asarray(embeddings)
        shape = embeddings.shape
        if len(shape) != 2 or len(keys) != shape[0] or 0 in shape:
            raise ValueError(
                "`embeddings` must have the shape `(num_samples, dim)`, with a row for "
                f"each of `keys`. Received: {len(keys)} keys, shape {shape}"
            )
        if num_clusters is None:
            num_clusters = min(max(shape[0] // PER_CLUSTER, MIN_CLUSTERS), shape[0])
        num_clusters = check_integer("num_clusters", num_clusters, 1)
        if num_clusters > shape[0]:
            raise ValueError(
                "`num_clusters` must not exceed the number of samples. Received: "
                f"num_clusters={num_clusters}, {shape[0]} samples"
            )
        iterations = check_integer("iterations", iterations, 1)
        check_fraction("merge_threshold", merge_threshold)
        # What is wrong with the others shows before a long computation.
        cls((keys, np.zeros(len(keys), int)), seed=seed, **options)
        clusters = cluster_embeddings(
            embeddings, num_clusters, iterations, merge_threshold, seed
        )
        return cls((keys, clusters), seed=seed, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the clusters for `ClusterSampling(path)`.

        Args:
            path: str or path, local or a URL, such as `"clusters.npz"`. The file holds
                hashes of the keys, in 16 bytes per sample. It is written under a
                temporary name and renamed when it is complete.
        """
        with files.replacing(path) as file:
            np.savez(file, keys=self._hashes, clusters=self._names[self._clusters])

    def probability(self, key: str | bytes) -> float:
        """The mean number of times that a sample occurs in an epoch.

        Args:
            key: str or bytes. The key of the sample.

        Returns:
            float, above 0; without `repeat` at most 1.
        """
        return float(self._copies[self._cluster(_hashes_of([key]), key)][0])

    def copies(self, key: str | bytes, epoch: int) -> int:
        """The number of times that a sample occurs in an epoch.

        Args:
            key: str or bytes. The key of the sample.
            epoch: int, from 0.

        Returns:
            int.
        """
        epoch, hashes = check_integer("epoch", epoch, 0), _hashes_of([key])
        cluster = self._cluster(hashes, key)
        return len(_draw(hashes, cluster, self._copies, self.seed, 1, epoch))

    def of_index(self, index: Any) -> Callable[[int, int], np.ndarray]:
        """The function of an epoch that chooses samples of an `Index`."""
        hashes = index.key_hashes()
        clusters = self._clusters[places_of(index, hashes, self._hashes, "clusters")]
        draw = functools.partial(_draw, hashes, clusters, self._copies, self.seed)
        draw.mean_length = float(self._copies[clusters].sum())
        return draw

    def _cluster(self, hashes, key):
        places = _search(self._hashes, hashes)
        if places[0] < 0:
            raise ValueError(
                "`key` must be the key of a sample in `clusters`. Received: "
                f"key={key!r}"
            )
        return self._clusters[places]


def cluster_embeddings(embeddings, num_clusters, iterations, merge_threshold, seed):
    """The cluster of each embedding; see `ClusterSampling.from_embeddings`.

    Returns:
        NumPy int array `(num_samples,)`, from 0.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "`ClusterSampling.from_embeddings` needs faiss: `pip install faiss-cpu`."
        ) from error
    count, dim = embeddings.shape
    examples = slice(None)
    if count > PER_CENTER * num_clusters:
        size = PER_CENTER * num_clusters
        chosen = np.random.default_rng(seed).choice(count, size, replace=False)
        # A file is read in its order.
        examples = np.sort(chosen)
    kmeans = faiss.Kmeans(
        dim,
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=PER_CENTER,
    )
    kmeans.train(_normalized(embeddings[examples]))
    nearest = faiss.IndexFlatIP(dim)
    nearest.add(merge_centers(_normalized(kmeans.centroids), merge_threshold))
    return np.concatenate(
        [
            nearest.search(_normalized(embeddings[first : first + ROWS]), 1)[1][:, 0]
            for first in range(0, count, ROWS)
        ]
    )


def _normalized(embeddings):
    embeddings = np.asarray(embeddings, "float32")
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    wrong = lengths[~(np.isfinite(lengths) & (lengths > 0))]
    if wrong.size:
        raise ValueError(
            "`embeddings` must be finite, and no row all zeros. Received: a row of the "
            f"length {wrong[0]}"
        )
    return embeddings / lengths


def merge_centers(centers, threshold):
    """The unit vectors that are not similar to one before them that stays.

    Args:
        centers: float array `(num_centers, dim)` of unit vectors.
        threshold: float. A cosine similarity.
    """
    kept, number = np.empty_like(centers), 0
    for center in centers:
        if not number or np.max(kept[:number] @ center) < threshold:
            kept[number] = center
            number += 1
    return kept[:number]


def _draw(hashes, clusters, copies, seed, num_samples, epoch):
    """The numbers of the samples of an epoch, copies included."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, "u8")
    chosen = []
    for first in range(0, num_samples, ROWS):
        # SplitMix64, which makes independent numbers of each seed and epoch.
        bits = hashes[first : first + ROWS] ^ key
        bits = (bits ^ (bits >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> 27)) * np.uint64(0x94D049BB133111EB)
        uniform = ((bits ^ (bits >> 31)) >> 11) * 2.0**-53
        times = np.floor(copies[clusters[first : first + ROWS]] + uniform)
        several = np.repeat(np.arange(len(times)), times.astype("int64"))
        chosen.append(first + several)
    return np.concatenate(chosen)


def _keys_and_clusters(clusters):
    """Keys, and the numbers of clusters as an array."""
    received = clusters
    if isinstance(clusters, str | os.PathLike):
        system, name = files.file_system(clusters, "clusters")
        with system.open(name, "rb") as file:
            try:
                content = np.load(file)
                clusters = content["keys"], content["clusters"]
            except (ValueError, LookupError, EOFError, zipfile.BadZipFile):
                clusters = None
    elif isinstance(clusters, Mapping):
        clusters = list(clusters), list(clusters.values())
    if not isinstance(clusters, tuple) or len(clusters) != 2:
        raise ValueError(
            "`clusters` must be a dict from keys to numbers, a pair of both, or a file "
            "of `save` or `np.savez(path, keys=keys, clusters=clusters)`. "
            f"Received: clusters={received!r}"
        )
    keys, clusters = clusters[0], np.asarray(clusters[1])
    has_one_each = clusters.size and clusters.shape == (len(keys),)
    if not has_one_each or clusters.dtype.kind not in "iu":
        raise ValueError(
            "`clusters` must have an int for each key, the number of its cluster, and "
            f"at least one. Received: {len(keys)} keys, and clusters of the type "
            f"{clusters.dtype} and the shape {clusters.shape}"
        )
    return keys, clusters


def _hashes_of(keys):
    """The hashes of keys, uint64; those that are hashes are returned."""
    if isinstance(keys, np.ndarray) and keys.dtype == np.uint64:
        return keys

    def text(key):
        if not isinstance(key, str | bytes):
            raise ValueError(
                "`keys` must be str or bytes, the keys of samples. Received: "
                f"{key!r} of type {type(key).__name__}"
            )
        if isinstance(key, bytes):
            return key.decode("utf-8", "surrogateescape")
        return key

    return np.fromiter(map(hash_of, map(text, keys)), "u8", len(keys))


def sorted_hashes(keys):
    """The hashes of keys in ascending order, and the places of the keys by it."""
    hashes = _hashes_of(keys)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    twice = np.flatnonzero(hashes[1:] == hashes[:-1])
    if twice.size:
        raise ValueError(
            "`keys` must differ from one another, also between shards. Received: "
            f"{keys[order[twice[0]]]!r} twice"
        )
    return hashes, order


def _search(table, hashes):
    """The places of hashes in an ascending table, -1 for those that it lacks."""
    # Millions are found much faster in order.
    order, places = np.argsort(hashes), np.empty(len(hashes), "int64")
    places[order] = np.searchsorted(table, hashes[order])
    places[places == len(table)] = 0
    places[table[places] != hashes] = -1
    return places


def places_of(index, hashes, table, argument):
    """The places of the samples of an index in a table."""

    def key_of(number):
        return next(iter(index.read([int(number)], with_images=False))).key

    places = _search(table, hashes)
    missing = np.flatnonzero(places < 0)
    if missing.size:
        raise ValueError(
            f"`{argument}` must hold all samples of `source`: add those that are "
            f"missing. Received: no {argument[:-1]} for {len(missing)} of "
            f"{len(hashes)} samples, such as the one with the key "
            f"{key_of(missing[0])!r}"
        )
    twice = np.flatnonzero(np.bincount(places) > 1)
    if twice.size:
        key = key_of(np.flatnonzero(places == twice[0])[0])
        raise ValueError(
            "`source` must have other keys in each shard for this `sampling`, which "
            "knows samples by their keys: write the shards with longer keys. Received: "
            f"the key {key!r} twice"
        )
    return places
