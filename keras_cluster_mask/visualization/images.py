"""Plots of masked images and of retrieval results."""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keras_cluster_mask.masking import ClusterMasking, PatchMasking, RandomMasking
from keras_cluster_mask.masking.patch_grid import grid_shape, is_channels_first
from keras_cluster_mask.masking.statistics import (
    keep_mask,
    masking_inputs,
    patch_size_of,
)
from keras_cluster_mask.types import Tensor

LEFT_OUT = 0.88  # The gray level of left-out patches, in [0, 1].


def plot_masks(
    images: np.ndarray,
    masking: PatchMasking | Mapping[str, PatchMasking],
    noise: np.ndarray | None = None,
    seed: int | None = 0,
    patch_size: int | tuple[int, int] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> Figure:
    """Plots which patches a masking leaves out, or compares several maskings.

    For one cluster masking, each row has five plots: the image; random masking at the
    same budget; cluster masking; the clusters, colored by anchor; and the similarity of
    each patch to the nearest anchor. Anchors are outlined. For any other masking, or
    for several, each row has the image and the patches that each masking keeps.

    All maskings get the same noise. If a masking is part of a `ContrastiveModel`, uint8
    images are normalized as in the model, so the masks match its training. The random
    state of a masking does not change.

    Example:

    ```python
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5)
    images = np.random.randint(0, 256, (2, 64, 64, 3)).astype("uint8")
    figure = kcm.visualization.plot_masks(images, masking)

    maskings = {"random": kcm.RandomMasking(0.5), "by cluster": masking}
    figure = kcm.visualization.plot_masks(images, maskings)
    ```

    Args:
        images: `(batch, H, W, C)` array, uint8, or floats in `[0, 1]`. Each is a row of
            the figure.
        masking: A `PatchMasking`. Or a dictionary from titles, of one or more lines, to
            maskings, each a column of the figure.
        noise: `(batch, N)` float32 array in `[0, 1)`. Drawn if not given.
        seed: Integer, the random seed of the noise.
        patch_size: As in `kcm.masking.masking_statistics`: required if no masking has
            one, such as `RandomMasking`. All maskings must have the same patch size.
        embed: As in `kcm.masking.masking_statistics`: required if a masking uses
            tokens, for example `embed_patches` of the model that `kcm.with_masking`
            returns.

    Returns:
        A `matplotlib.figure.Figure`; save it with `figure.savefig(path)`.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that a masking
            needs are missing, if the images do not fit the patch size, or if maskings
            differ in patch size.
    """
    named = masking
    if not isinstance(masking, Mapping):
        named = {type(masking).__name__: masking}
    images, maskings = np.asarray(images), [*named.values()]
    patch_size = patch_size_of(maskings, patch_size)
    data_format = next(filter(None, (each.data_format for each in maskings)), None)
    grid = _Grid(grid_shape(images.shape, patch_size, data_format), patch_size)
    if noise is None:
        noise = np.random.default_rng(seed).random((len(images), grid.num_patches))
    noise = ops.convert_to_tensor(noise, dtype="float32")
    kept = []
    for each in maskings:
        inputs = masking_inputs(each, images, embed)
        kept.append(keep_mask(each, *inputs, noise))

    shown = _for_display(images, data_format)
    if isinstance(masking, ClusterMasking):
        return _plot_clusters(shown, grid, kept[0], masking, *inputs, noise)
    figure, axes = _axes(len(images), len(named) + 1, ("image", *named))
    for index, row in enumerate(axes):
        row[0].imshow(shown[index])
        for axis, stays in zip(row[1:], kept):
            axis.imshow(grid.leave_out(shown[index], stays[index]))
    return figure


def _plot_clusters(shown, grid, kept, masking, pixels, tokens, noise):
    at_random = RandomMasking(1 - masking.num_kept(grid.num_patches) / grid.num_patches)
    random_kept = keep_mask(at_random, pixels, tokens, noise)
    anchors = masking.draw_anchors(noise)
    to_anchors = masking.similarity_to_anchors(pixels, anchors, tokens)
    anchors, to_anchors = map(ops.convert_to_numpy, (anchors, to_anchors))

    titles = ("image", "random masking", "cluster masking", "clusters", "similarity")
    figure, axes = _axes(len(shown), len(titles), titles)
    for index, (row, image) in enumerate(zip(axes, shown)):
        nearest = to_anchors[index].argmax(axis=0)
        colors = matplotlib.colormaps["tab10"](nearest % 10)[:, :3]
        colors[kept[index]] = np.nan
        row[0].imshow(image)
        row[1].imshow(grid.leave_out(image, random_kept[index]))
        row[2].imshow(grid.leave_out(image, kept[index]))
        row[3].imshow(grid.tint(image, colors))
        row[4].imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        heat = row[4].imshow(
            grid.spread(to_anchors[index].max(axis=0)),
            cmap="inferno", vmin=-0.2, vmax=1, alpha=0.75,
        )  # fmt: skip
        for axis in row[2:]:
            for anchor in anchors[index]:
                axis.add_patch(grid.outline(anchor))
    figure.colorbar(heat, ax=axes[:, -1].tolist(), shrink=0.85, pad=0.03)
    return figure


def plot_retrieval(
    queries: Sequence[str], images: np.ndarray, similarity: np.ndarray, k: int = 5
) -> Figure:
    """Plots the best images for text queries.

    Example:

    ```python
    images = np.random.randint(0, 256, (3, 32, 32, 3)).astype("uint8")
    similarity = np.random.rand(2, 3)
    figure = kcm.visualization.plot_retrieval(["dog", "boat"], images, similarity, k=2)
    ```

    Args:
        queries: List of strings, each a row of the figure.
        images: `(images, H, W, C)` array, uint8, or floats in `[0, 1]`.
        similarity: `(queries, images)` array.
        k: Integer. The number of images to show per query.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If `similarity` has a wrong shape.
    """
    similarity = np.asarray(similarity)
    if similarity.shape != (len(queries), len(images)):
        raise ValueError(
            "`similarity` must have shape (queries, images), "
            f"({len(queries)}, {len(images)}). "
            f"Received: similarity.shape={similarity.shape}"
        )
    shown = _for_display(np.asarray(images))
    figure, axes = _axes(len(queries), k, size=1.15, left=2.6)
    for row, query, scores in zip(axes, queries, similarity):
        row[0].text(
            -0.12, 0.5, query, transform=row[0].transAxes, ha="right", va="center",
            fontsize=10, parse_math=False,
        )  # fmt: skip
        for axis, index in zip(row, np.argsort(-scores, kind="stable")[:k]):
            axis.imshow(shown[index])
            axis.set_title(f"{scores[index]:.2f}", fontsize=7, pad=2)
    return figure


class _Grid:
    """The patch grid of an image, with methods to draw on it."""

    def __init__(self, shape, patch_size):
        self.shape, self.patch_size = shape, patch_size
        self.num_patches = math.prod(shape)

    def spread(self, values):
        """Turns `(N, ...)` values per patch into values per pixel."""
        values = values.reshape(*self.shape, *values.shape[1:])
        return values.repeat(self.patch_size[0], 0).repeat(self.patch_size[1], 1)

    def leave_out(self, image, kept):
        return np.where(self.spread(kept)[..., None], image, LEFT_OUT)

    def tint(self, image, colors):
        """Colors the patches with a color that is not NaN, and lightens the others."""
        colors = self.spread(colors)
        tinted = 0.35 * image.mean(axis=-1, keepdims=True) + 0.65 * colors
        return np.where(np.isnan(colors), 0.5 + 0.5 * image, tinted)

    def outline(self, patch):
        height, width = self.patch_size
        row, column = divmod(patch, self.shape[1])
        return Rectangle(
            (column * width - 0.5, row * height - 0.5), width, height,
            fill=False, edgecolor="red", linewidth=1.6,
        )  # fmt: skip


def _for_display(images, data_format=None):
    """Converts images to floats in `[0, 1]` with three channels, channels last."""
    if is_channels_first(data_format):
        images = np.moveaxis(images, 1, -1)
    # Keras loads images as floats up to 255. Normalized ones are far below 50.
    if images.dtype == np.uint8 or np.max(images, initial=0) > 50:
        images = images / 255.0
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    return np.clip(images[..., :3].astype("float32"), 0, 1)


def _axes(rows, columns, titles=(), size=2.1, left=0.0):
    """Makes a figure with axes for images and titles of the columns."""
    figsize = left + columns * size + 0.2, rows * size + 0.3
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    return figure, axes
