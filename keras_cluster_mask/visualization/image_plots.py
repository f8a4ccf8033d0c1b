"""Plots of masked images and of retrieval results."""

import math
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.checks import sides_of
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.patch_grid import (
    grid_of_square_patches,
    grid_shape,
    height_and_width,
    is_channels_first,
)

LEFT_OUT = 0.88  # The gray level of left-out patches, in [0, 1].


def plot_masks(
    images: np.ndarray,
    masking: PatchMasking | Mapping[str, PatchMasking],
    noise: np.ndarray | None = None,
    seed: int | None = 0,
    patch_size: int | tuple[int, int] | None = None,
    model: keras.Model | None = None,
) -> Figure:
    """Plots which patches a masking leaves out, or compares several maskings.

    Each row has an image and the patches of it that each masking keeps. All maskings
    get the same noise. The random state of a masking does not change.

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
        patch_size: Integer or tuple `(height, width)`, in pixels. Defaults to the patch
            size of the maskings, which must be the same for all, or of `model`.
            Required if none has one.
        model: The `ContrastiveModel` that trains with the masking. It normalizes uint8
            images as in training, and embeds the tokens for a masking that uses them.

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
    data_format = next(filter(None, (each.data_format for each in maskings)), None)
    sizes = [patch_size, *(each.patch_size for each in maskings)]
    if model is not None and not any(sizes):
        count = model.image_encoder.num_patches(images)
        grid = grid_of_square_patches(count, images.shape, data_format)
        sides = height_and_width(images.shape, data_format)
        sizes[0] = tuple(side // number for side, number in zip(sides, grid))
    patch_size = _common(sizes, maskings)
    grid = grid_shape(images.shape, patch_size, data_format)
    if noise is None:
        noise = np.random.default_rng(seed).random((len(images), math.prod(grid)))
    noise = ops.convert_to_tensor(noise, dtype="float32")

    shown = _for_display(images, data_format)
    figure, axes = _axes(len(images), len(named) + 1, ("image", *named))
    for axis, image in zip(axes[:, 0], shown):
        axis.imshow(image)
    for column, each in zip(axes.T[1:], maskings):
        for axis, image, kept in zip(column, shown, _kept(each, images, model, noise)):
            # From values of patches to values of pixels.
            kept = kept.reshape(grid).repeat(patch_size[0], 0).repeat(patch_size[1], 1)
            axis.imshow(np.where(kept[..., None], image, LEFT_OUT))
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
    similarity = as_array(similarity)
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


def _common(sizes, maskings):
    """Returns the patch size: the given one, the first, or that of all maskings."""
    found = {sides_of("patch_size", size) for size in sizes if size is not None}
    if len(found) == 1:
        return found.pop()
    names = [type(each).__name__ for each in maskings]
    raise ValueError(
        "`patch_size` must be given if no masking has one, and must otherwise be None "
        f"or match every masking. Received: patch_size={sizes[0]}, "
        + ", ".join(f"{name}.patch_size={x}" for name, x in zip(names, sizes[1:]))
    )


def _kept(masking, images, model, noise):
    """Returns `(batch, N)` booleans, true for patches that are kept and visible."""
    tokens = None
    if model is not None:
        # A model takes pixels only as integers.
        if images.dtype != "uint8":
            scale = 1 if np.max(images, initial=0) > 50 else 255
            images = np.clip(np.round(scale * images), 0, 255).astype("uint8")
        images = model.image_tower.prepare(images)
        tokens = model.image_encoder.embed_patches(images)
    indices, visible = map(ops.convert_to_numpy, masking.select(images, tokens, noise))
    kept = np.zeros(tuple(noise.shape), dtype=bool)
    np.put_along_axis(kept, indices, visible, axis=1)
    return kept


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
