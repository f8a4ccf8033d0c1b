"""Computes which patches a masking keeps, and statistics of them in a dataset."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_cluster_mask.batches import num_images, read_images
from keras_cluster_mask.checks import sides_of
from keras_cluster_mask.distribution.processes import progress_bar
from keras_cluster_mask.masking.patch_grid import grid_shape
from keras_cluster_mask.masking.patch_masking import PatchMasking, pixels_of
from keras_cluster_mask.types import Tensor


def masking_statistics(
    masking: PatchMasking,
    data: Any,
    patch_size: int | tuple[int, int] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = 0,
    verbose: str | int = "auto",
) -> dict[str, np.ndarray]:
    """Measures how many patches a masking keeps in the images of a dataset, and where.

    The function reads the data once and stores only sums and one number per image. It
    does not change the masking or its random state. The noise comes from
    `np.random.default_rng(seed)`, `(images, N)` in the order of the images, so one seed
    gives the same masks for any batch size and, except for rounding, on every backend.
    If the masking is part of a `ContrastiveModel`, uint8 images are normalized as in
    the model. `kcm.visualization.plot_masking_statistics` draws the result.

    Example:

    ```python
    images = np.random.randint(0, 256, (32, 64, 64, 3)).astype("uint8")
    masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.3)
    masking.adapt(images)
    statistics = kcm.masking.masking_statistics(masking, images)
    statistics["keep_ratio"]  # (32,), around 0.5
    ```

    Args:
        masking: A `PatchMasking`.
        data: Images as an array, or an iterable of batches (a `tf.data.Dataset`, a
            `PyDataset`, a generator): arrays of images, dictionaries with the key
            `"images"`, or tuples that start with one of these. All images must have the
            same size.
        patch_size: Integer or tuple `(height, width)`, in pixels. Defaults to the patch
            size of the masking. Required for a masking without one, such as
            `RandomMasking`.
        embed: Function from a batch of images, a tensor, to its embedded tokens
            `(batch, prefix + N, dim)`. Required for a masking that uses tokens.
        seed: Integer, the random seed of the noise. `None` gives different noise every
            time.
        verbose: `"auto"`, 0 or 1. Whether to show progress.

    Returns:
        A dictionary of arrays: `"keep_ratio"`, `(images,)` float32, the fraction of
        patches kept in each image; and `"kept_by_position"`, `(rows, columns)` float64,
        the fraction of the images in which the patch at each position is kept. Patches
        kept as hidden padding do not count, because they have no effect.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that the masking
            needs are missing, if there are no images, or if images differ in size.
    """
    patch_size = patch_size_of([masking], patch_size)
    rng = np.random.default_rng(seed)
    progress = progress_bar(num_images(data), verbose, "image")
    count, first_grid, ratios = 0, None, []
    for images in read_images(data):
        grid = grid_shape(images.shape, patch_size, masking.data_format)
        noise = rng.random((len(images), math.prod(grid)), dtype="float32")
        if first_grid is None:
            first_grid, times_kept = grid, np.zeros(noise.shape[1], "int64")
        elif grid != first_grid:
            raise ValueError(
                "The images of `data` must all have one size. Received: batches of "
                f"{first_grid} and of {grid} patches (rows, columns)"
            )
        kept = keep_mask(masking, *masking_inputs(masking, images, embed), noise)
        ratios.append(kept.mean(axis=1, dtype="float32"))
        times_kept += kept.sum(axis=0)
        count += len(images)
        progress.update(count, [("keep_ratio", kept.mean())], finalize=False)
    progress.update(count, finalize=True)
    return {
        "keep_ratio": np.concatenate(ratios),
        "kept_by_position": (times_kept / count).reshape(first_grid),
    }


# === The patches that a masking keeps ===


def patch_size_of(maskings, patch_size):
    """Returns the common patch size of maskings: their own or, if given, `patch_size`.

    Raises:
        ValueError: If none of them has a patch size and none is given, or if they
            differ.
    """
    given = [patch_size, *(each.patch_size for each in maskings)]
    sizes = {sides_of("patch_size", size) for size in given if size is not None}
    if len(sizes) == 1:
        return sizes.pop()
    names = [type(each).__name__ for each in maskings]
    raise ValueError(
        "`patch_size` must be given if no masking has one, and must otherwise be None "
        f"or match every masking. Received: patch_size={patch_size}, "
        + ", ".join(f"{name}.patch_size={x}" for name, x in zip(names, given[1:]))
    )


def masking_inputs(masking, images, embed):
    """Returns the pixels and the tokens that a masking gets in training.

    Args:
        masking: A `PatchMasking`.
        images: Array of images.
        embed: Function from pixels to tokens. `None` returns `None` for tokens.
    """
    pixels = pixels_of(masking, images)
    return pixels, None if embed is None else embed(pixels)


def keep_mask(masking, pixels, tokens, noise):
    """Returns `(batch, N)` booleans, true for patches that are kept and visible."""
    indices, visible = map(ops.convert_to_numpy, masking.select(pixels, tokens, noise))
    kept = np.zeros(tuple(noise.shape), dtype=bool)
    np.put_along_axis(kept, indices, visible, axis=1)
    return kept
