"""What a masking does to the images of a dataset, in numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import num_images, read_images
from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.masking.cluster_masking import ClusterMasking
from keras_cluster_mask.masking.context import prefix_tokens
from keras_cluster_mask.masking.patch_grid import grid_shape, standardize_patch_size
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.similarity import round_similarity
from keras_cluster_mask.masking.similarity_masking import SimilarityMasking
from keras_cluster_mask.types import Tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskingStatistics:
    """What `masking_statistics` found; `print` it for a table.

    An image has N patches, and K of them are kept as tokens. A patch is *masked* if
    it has no influence: if it is not kept, or kept as hidden padding. A patch is in
    the *cluster* of the anchor that it is most similar to, the one of smallest noise
    if several are equally similar. Every anchor is in its own cluster, so the
    clusters are a partition of the N patches. An anchor *takes* the masked patches of
    its cluster, itself included; in threshold mode only those more similar than the
    threshold, as the others are left out at random.

    Attributes:
        num_images: Integer.
        num_kept: Integer, K, the patch tokens of an image in training.
        mask_ratio: `(images,)` float32 array. The share of the patches of each
            image that is masked.
        masked_by_position: `(rows, columns)` float64 array. The share of the
            images in which the patch at this place of the grid is masked.
        fill_in: Float. The patches that the threshold masks and that are kept to
            fill up the K, as a share of the N, mean over images: hidden padding,
            or with `hide_padding=False` patches that take part again. 0 in budget
            mode.
        surplus: Float. The patches that the threshold keeps and that are left out
            at random because they are more than K, as a share of the N, mean over
            images. 0 in budget mode.
        similarity_at_cut: `(images,)` float32 array. The lowest similarity to the
            nearest anchor of all patches that are taken: in budget mode the
            threshold that the budget amounts to. NaN if none is taken.
        cluster_sizes: `(N + 1,)` int64 array. How many clusters have 0, 1, ... N
            patches.
        patches_taken: `(N + 1,)` int64 array. How many anchors take 0, 1, ... N
            patches.
        patches_taken_by_rank: `(anchors,)` float64 array. The anchors of each image are
            ranked by how many patches they take, most first. Each entry is the number
            of patches taken at that rank, averaged over images.

    The last four, and `surplus`, are `None` for a masking without clusters.
    """

    num_images: int
    num_kept: int
    mask_ratio: np.ndarray
    masked_by_position: np.ndarray
    fill_in: float
    surplus: float | None = None
    similarity_at_cut: np.ndarray | None = None
    cluster_sizes: np.ndarray | None = None
    patches_taken: np.ndarray | None = None
    patches_taken_by_rank: np.ndarray | None = None

    @property
    def num_patches(self) -> int:
        """N, the number of patches of an image."""
        return self.masked_by_position.size

    @property
    def lone_anchors(self) -> float | None:
        """The share of the anchors that take at most themselves, or `None`."""
        if self.patches_taken is None:
            return None
        return float(self.patches_taken[:2].sum() / self.patches_taken.sum())

    def summary(self) -> str:
        """The statistics as a text table.

        Returns:
            A string of several lines.
        """
        rows, columns = self.masked_by_position.shape
        title = (
            f"{self.num_images:,} images of {rows} x {columns} patches, "
            f"{self.num_kept} of {self.num_patches} kept as tokens"
        )
        head = "".join(f"{name:>9}" for name in _COLUMNS)
        spreads = [
            _spread_line("mask ratio of an image", self.mask_ratio),
            _spread_line("how often a position is masked", self.masked_by_position),
        ]
        shares = [("kept to fill up, of all patches", self.fill_in)]
        if self.cluster_sizes is not None:
            sizes = np.arange(self.num_patches + 1)
            spreads += [
                _spread_line("similarity at the cut", self.similarity_at_cut),
                _spread_line("patches in a cluster", sizes, self.cluster_sizes),
                _spread_line("patches an anchor takes", sizes, self.patches_taken),
            ]
            shares += [
                ("surplus gone at random, of all patches", self.surplus),
                ("anchors that take at most themselves", self.lone_anchors),
            ]
        shares = [f"{name:<38}{value:9.3f}" for name, value in shares]
        return "\n".join([title, "", " " * 30 + head, *spreads, "", *shares])

    def __str__(self):
        return self.summary()

    def __repr__(self):
        return (
            f"MaskingStatistics(num_images={self.num_images}, "
            f"num_patches={self.num_patches}, num_kept={self.num_kept}, "
            f"mean mask_ratio={self.mask_ratio.mean():.4f})"
        )


def masking_statistics(
    masking: PatchMasking,
    data: Any,
    patch_size: int | tuple[int, int] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    max_images: int | None = None,
    seed: int | None = 0,
    verbose: str | int = "auto",
) -> MaskingStatistics:
    """Measures what a masking does to the images of a dataset.

    One pass over the data, which keeps only sums and two numbers per image. The masking
    does not change, its random state included: the noise is
    `np.random.default_rng(seed)`'s, `(images, N)` in the order of the images. So one
    seed gives the same masks in batches of any size and, except for rounding, on every
    backend. Within a `ContrastiveModel` uint8 images are normalized as the model does.
    `kcm.visualization.plot_masking_statistics` draws the result.

    Example:

    ```python
    images = np.random.randint(0, 256, (32, 64, 64, 3)).astype("uint8")
    masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.3)
    masking.adapt(images)
    statistics = kcm.masking.masking_statistics(masking, images)
    print(statistics)
    statistics.mask_ratio  # (32,), around 0.5
    ```

    Args:
        masking: A `PatchMasking`. For a `ClusterMasking`, clusters and anchors are
            measured as well as masked patches.
        data: Images as an array, or an iterable of batches (a `tf.data.Dataset`, a
            `PyDataset`, a generator): arrays of images, dictionaries with the key
            `"images"`, or tuples whose first entry is one of these. All images
            have one size.
        patch_size: Integer or tuple `(height, width)`, in pixels. `None` takes
            that of the masking; a masking without one, as `RandomMasking`, needs
            it.
        embed: Function from a batch of images, a tensor, to its embedded tokens
            `(batch, prefix + N, dim)`. Needed by a masking that looks at tokens.
        max_images: Integer. Stop reading after this many images; `None` reads all.
        seed: Integer, for the noise, or `None` for noise that differs every time.
        verbose: `"auto"`, 0, 1 or 2. 0 is silent, 1 a progress bar, 2 one line at
            the end; `"auto"` is 1.

    Returns:
        A `MaskingStatistics`.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that the masking
            needs are missing, or if there are no images or not all of one size.
    """
    check_choice("verbose", verbose, ("auto", 0, 1, 2))
    check_integer("max_images", max_images, or_none=True)
    patch_size = patch_size_of(masking, patch_size)
    masking.check_ready()
    rng = np.random.default_rng(seed)
    progress = keras.utils.Progbar(
        _count_ahead(data, max_images),
        verbose=1 if verbose == "auto" else verbose,
        stateful_metrics=["mask_ratio"],
        unit_name="image",
    )
    sums = None
    for images in read_images(data, max_images):
        images = masking.prepare_pixels(ops.convert_to_tensor(images))
        grid = grid_shape(images.shape, patch_size, masking.data_format)
        tokens = tokens_of(images, masking, grid, embed)
        if sums is None:
            sums = _Sums(masking, grid)
            if tokens is not None and embed is None:
                check_tokens_do_not_matter(masking, images, tokens, grid)
        elif grid != sums.grid:
            raise ValueError(
                "The images of `data` must all have one size. Received: batches of "
                f"{sums.grid} and of {grid} patches (rows, columns)"
            )
        sums.add(images, tokens, rng)
        progress.update(
            sums.num_images, [("mask_ratio", sums.mean_mask_ratio)], finalize=False
        )
    progress.update(
        sums.num_images, [("mask_ratio", sums.mean_mask_ratio)], finalize=True
    )
    return sums.result()


class _Sums:
    """What is added up over the batches."""

    def __init__(self, masking, grid):
        self.masking, self.grid = masking, grid
        self.num_patches = grid[0] * grid[1]
        self.num_kept = masking.num_kept(self.num_patches)
        self.num_images = 0
        self.masked = np.zeros(self.num_patches, "int64")
        self.fill_in = self.surplus = 0
        self.mask_ratios, self.cuts = [], []
        self.has_clusters = isinstance(masking, ClusterMasking)
        if self.has_clusters:
            self.sizes = np.zeros(self.num_patches + 1, "int64")
            self.taken = np.zeros(self.num_patches + 1, "int64")
            num_anchors = masking.num_anchors(self.num_patches)
            self.taken_by_rank = np.zeros(num_anchors, "int64")

    @property
    def mean_mask_ratio(self):
        return self.masked.sum() / (self.num_images * self.num_patches)

    def add(self, images, tokens, rng):
        noise = rng.random((images.shape[0], self.num_patches), dtype="float32")
        noise = ops.convert_to_tensor(noise)
        indices, visible = map(
            ops.convert_to_numpy, select_patches(self.masking, images, tokens, noise)
        )
        masked = np.ones(noise.shape, bool)
        np.put_along_axis(masked, indices, ~visible, axis=1)
        self.num_images += len(masked)
        self.masked += masked.sum(axis=0)
        self.mask_ratios.append(masked.mean(axis=1, dtype="float32"))
        self.fill_in += np.sum(~visible)
        if self.has_clusters:
            self._add_clusters(masked, images, tokens, noise)

    def _add_clusters(self, masked, images, tokens, noise):
        nearest, similarity = _clusters(self.masking, images, tokens, noise)
        taken = masked
        if self.masking.threshold is not None:
            alike = similarity > ops.convert_to_numpy(self.masking.threshold)
            # The patch least alike is always visible.
            left = np.maximum((~alike).sum(axis=1), 1)
            self.surplus += np.maximum(left - self.num_kept, 0).sum()
            if not self.masking.hides_tokens:
                self.fill_in += np.maximum(self.num_kept - left, 0).sum()
            taken = masked & alike
        lowest = np.where(taken, similarity, np.inf).min(axis=1)
        self.cuts.append(np.where(taken.any(axis=1), lowest, np.nan).astype("float32"))

        num_anchors = len(self.taken_by_rank)
        by_anchor = _count_by_anchor(nearest, taken, num_anchors)
        sizes = _count_by_anchor(nearest, np.ones_like(taken), num_anchors)
        self.sizes += np.bincount(sizes.ravel(), minlength=len(self.sizes))
        self.taken += np.bincount(by_anchor.ravel(), minlength=len(self.taken))
        self.taken_by_rank += np.sort(by_anchor, axis=1)[:, ::-1].sum(axis=0)

    def result(self):
        clusters = {}
        total = self.num_images * self.num_patches
        if self.has_clusters:
            clusters = {
                "surplus": float(self.surplus / total),
                "similarity_at_cut": np.concatenate(self.cuts),
                "cluster_sizes": self.sizes,
                "patches_taken": self.taken,
                "patches_taken_by_rank": self.taken_by_rank / self.num_images,
            }
        return MaskingStatistics(
            num_images=self.num_images,
            num_kept=self.num_kept,
            mask_ratio=np.concatenate(self.mask_ratios),
            masked_by_position=(self.masked / self.num_images).reshape(self.grid),
            fill_in=float(self.fill_in / total),
            **clusters,
        )


def _clusters(masking, images, tokens, noise):
    """The nearest anchor of each patch, from 0 to A - 1, and its similarity."""
    anchors = masking.draw_anchors(noise)
    similarity = masking.similarity_to_anchors(images, anchors, tokens)
    similarity = ops.convert_to_numpy(round_similarity(similarity))
    anchors = ops.convert_to_numpy(anchors)
    nearest = similarity.argmax(axis=1)
    # An anchor that another one resembles entirely would else be in its cluster.
    np.put_along_axis(nearest, anchors, np.arange(anchors.shape[1])[None], axis=1)
    return nearest, similarity.max(axis=1)


def _count_by_anchor(nearest, which, num_anchors):
    """`(batch, A)` counts of the patches in `which`, by their nearest anchor."""
    batch = len(nearest)
    of_all_images = nearest + num_anchors * np.arange(batch)[:, None]
    counts = np.bincount(of_all_images[which], minlength=batch * num_anchors)
    return counts.reshape(batch, num_anchors)


# === Arguments ===


def patch_size_of(masking, patch_size):
    """The sides of a patch: the masking's own or, if it has none, the given ones."""
    own = masking.patch_size
    if own is None and patch_size is None:
        raise ValueError(
            f"`patch_size` must be given for a {type(masking).__name__}, which has "
            "none of its own. Received: patch_size=None"
        )
    if patch_size is None:
        return standardize_patch_size(own)
    patch_size = standardize_patch_size(patch_size)
    if own is not None and patch_size != standardize_patch_size(own):
        raise ValueError(
            "`patch_size` must be that of the masking, or None. Received: "
            f"patch_size={patch_size}, masking.patch_size={own}"
        )
    return patch_size


def tokens_of(images, masking, grid, embed):
    """The tokens that the masking is called with, or `None`."""
    num_patches = grid[0] * grid[1]
    if embed is None:
        if not isinstance(masking, SimilarityMasking):
            # For their number, which some maskings cannot tell from the images.
            num_tokens = (masking.num_prefix_tokens or 0) + num_patches
            return ops.zeros((images.shape[0], num_tokens, 1))
        if masking.embedding_weight != 0.0:
            raise ValueError(
                "`embed` must be given if the masking looks at tokens. Received: "
                f"embed=None, masking.embedding_weight={masking.embedding_weight}"
            )
        return None
    tokens = embed(images)
    if len(tokens.shape) != 3 or tokens.shape[1] < num_patches:
        raise ValueError(
            "`embed` must return tokens (batch, prefix + N, dim) with "
            f"N={num_patches} patches. Received: tokens.shape={tuple(tokens.shape)}"
        )
    return tokens


def select_patches(masking, images, tokens, noise):
    """As `masking.select`, where the noise says how many tokens are patches."""
    prefix = None if tokens is None else tokens.shape[1] - noise.shape[1]
    with prefix_tokens(prefix):
        return masking.select(images, tokens, noise)


def check_tokens_do_not_matter(masking, images, tokens, grid):
    """Raises if the masking chooses other patches for other tokens."""
    num_patches = grid[0] * grid[1]
    rng = np.random.default_rng(0)
    noise = rng.random((images.shape[0], num_patches), dtype="float32")
    other = ops.convert_to_tensor(rng.normal(size=tokens.shape).astype("float32"))
    indices, _ = select_patches(masking, images, tokens, noise)
    other_indices, _ = select_patches(masking, images, other, noise)
    if np.any(ops.convert_to_numpy(indices) != ops.convert_to_numpy(other_indices)):
        raise ValueError(
            f"`embed` must be given, as the {type(masking).__name__} looks at tokens. "
            "Received: embed=None"
        )


def _count_ahead(data, max_images):
    """How many images there will be, or `None` if only reading them can tell."""
    count = num_images(data)
    return count if None in (count, max_images) else min(count, max_images)


# === The table ===

_COLUMNS = ("mean", "std", "min", "median", "max")


def _spread_line(name, values, counts=None):
    """A line of the table: how values spread that occur so many times each."""
    values = np.ravel(values)
    counts = np.ones(len(values), "int64") if counts is None else counts
    occur = (counts > 0) & ~np.isnan(values)
    values, counts = values[occur].astype("float64"), counts[occur]
    if not len(values):
        return f"{name:<30}" + f"{'-':>9}" * len(_COLUMNS)
    mean = np.average(values, weights=counts)
    deviation = np.sqrt(np.average((values - mean) ** 2, weights=counts))
    order = np.argsort(values)
    rank = np.cumsum(counts[order])
    median = values[order][np.searchsorted(rank, rank[-1] / 2)]
    spread = (mean, deviation, values.min(), median, values.max())
    return f"{name:<30}" + "".join(f"{value:9.3f}" for value in spread)
