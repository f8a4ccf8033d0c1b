"""Computes which patches a masking keeps, and statistics of them in a dataset."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import num_images, read_images
from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.distribution.processes import verbosity
from keras_cluster_mask.masking.patch_grid import grid_shape, sides_of
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.types import Tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskingStatistics:
    """The result of `masking_statistics`. Use `print` to show it as a table.

    A patch that is kept as hidden padding does not count, because it has no influence.

    Attributes:
        keep_ratio: `(images,)` float32 array. The fraction of the patches that is kept,
            for each image.
        kept_by_position: `(rows, columns)` float64 array. The fraction of the images in
            which the patch at each grid position is kept.
    """

    keep_ratio: np.ndarray
    kept_by_position: np.ndarray

    def __repr__(self):
        rows, columns = self.kept_by_position.shape
        columns_of_table = ("mean", "std", "min", "max")
        lines = [
            f"{len(self.keep_ratio):,} images of {rows} x {columns} patches",
            " " * 30 + "".join(f"{name:>9}" for name in columns_of_table),
        ]
        for name, values in (
            ("keep ratio of an image", self.keep_ratio),
            ("how often a position is kept", self.kept_by_position),
        ):
            spread = (getattr(values, column)() for column in columns_of_table)
            lines.append(f"{name:<30}" + "".join(f"{value:9.3f}" for value in spread))
        return "\n".join(lines)


def masking_statistics(
    masking: PatchMasking,
    data: Any,
    patch_size: int | tuple[int, int] | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    max_images: int | None = None,
    seed: int | None = 0,
    verbose: str | int = "auto",
) -> MaskingStatistics:
    """Measures how many patches a masking keeps in the images of a dataset, and where.

    The function reads the data once and stores only sums and one number per image. It
    does not change the masking or its random state: the noise comes from
    `np.random.default_rng(seed)`, `(images, N)` in the order of the images. So one seed
    gives the same masks for any batch size and, except for rounding, on every backend.
    If the masking is part of a `ContrastiveModel`, uint8 images are normalized as in
    the model. `kcm.visualization.plot_masking_statistics` draws the result.

    Example:

    ```python
    images = np.random.randint(0, 256, (32, 64, 64, 3)).astype("uint8")
    masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.3)
    masking.adapt(images)
    statistics = kcm.masking.masking_statistics(masking, images)
    print(statistics)
    statistics.keep_ratio  # (32,), around 0.5
    ```

    Args:
        masking: A `PatchMasking`.
        data: Images as an array, or an iterable of batches (a `tf.data.Dataset`, a
            `PyDataset`, a generator): arrays of images, dictionaries with the key
            `"images"`, or tuples whose first entry is one of these. All images must
            have the same size.
        patch_size: Integer or tuple `(height, width)`, in pixels. `None` uses that of
            the masking. Required for a masking without one, such as `RandomMasking`.
        embed: Function from a batch of images, a tensor, to its embedded tokens
            `(batch, prefix + N, dim)`. Required for a masking that uses tokens.
        max_images: Integer. Stop reading after this many images; `None` reads all.
        seed: Integer, the random seed of the noise. `None` gives different noise every
            time.
        verbose: `"auto"`, 0, 1 or 2. 0 is silent, 1 a progress bar, 2 one line at
            the end; `"auto"` is 1.

    Returns:
        A `MaskingStatistics`.

    Raises:
        ValueError: If the patch size, the tokens or the threshold that the masking
            needs are missing, if there are no images, or if images differ in size.
    """
    check_choice("verbose", verbose, ("auto", 0, 1, 2))
    check_integer("max_images", max_images, or_none=True)
    patch_size = patch_size_of([masking], patch_size)
    masking.check_ready()
    rng = np.random.default_rng(seed)
    expected = num_images(data)
    if None not in (expected, max_images):
        expected = min(expected, max_images)
    progress = keras.utils.Progbar(
        expected,
        verbose=verbosity(1 if verbose == "auto" else verbose),
        stateful_metrics=["keep_ratio"],
        unit_name="image",
    )
    count, first_grid, ratios = 0, None, []
    for images in read_images(data, max_images):
        grid = grid_shape(images.shape, patch_size, masking.data_format)
        inputs = masking_inputs(masking, images, grid, embed)
        noise = rng.random((len(images), math.prod(grid)), dtype="float32")
        if first_grid is None:
            first_grid, times_kept = grid, np.zeros(noise.shape[1], "int64")
        elif grid != first_grid:
            raise ValueError(
                "The images of `data` must all have one size. Received: batches of "
                f"{first_grid} and of {grid} patches (rows, columns)"
            )
        kept = keep_mask(masking, *inputs, noise)
        ratios.append(kept.mean(axis=1, dtype="float32"))
        times_kept += kept.sum(axis=0)
        count += len(images)
        metrics = [("keep_ratio", times_kept.mean() / count)]
        progress.update(count, metrics, finalize=False)
    progress.update(count, metrics, finalize=True)
    return MaskingStatistics(
        keep_ratio=np.concatenate(ratios),
        kept_by_position=(times_kept / count).reshape(first_grid),
    )


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
        f"or that of every masking. Received: patch_size={patch_size}, "
        + ", ".join(f"{name}.patch_size={x}" for name, x in zip(names, given[1:]))
    )


def masking_inputs(masking, images, grid, embed):
    """Returns the pixels and the tokens that a masking gets in training.

    Args:
        masking: A `PatchMasking`.
        images: Array of images.
        grid: Tuple `(rows, columns)` of their patches.
        embed: Function from pixels to tokens. `None` returns `None` for tokens.

    Raises:
        ValueError: If the masking has another grid, or if `embed` returns tokens of a
            wrong shape.
    """
    if masking.grid not in (None, grid):
        raise ValueError(
            f"`grid` of the {type(masking).__name__} must be that of the patches of "
            f"`images`, {grid}, or None. Received: grid={masking.grid}, "
            f"images.shape={images.shape}"
        )
    pixels = masking.prepare_pixels(ops.convert_to_tensor(images))
    num_patches = math.prod(grid)
    if embed is None:
        return pixels, None
    tokens = embed(pixels)
    if len(tokens.shape) != 3 or tokens.shape[1] < num_patches:
        raise ValueError(
            "`embed` must return tokens (batch, prefix + N, dim) with "
            f"N={num_patches} patches. Received: tokens.shape={tuple(tokens.shape)}"
        )
    return pixels, tokens


def keep_mask(masking, pixels, tokens, noise):
    """Returns `(batch, N)` booleans, true for patches that are kept and visible."""
    # A schedule may start at 0, where tokens have no influence yet.
    uses_tokens, cause = getattr(masking, "embedding_weight", 0.0) != 0.0, None
    try:
        if tokens is not None or not uses_tokens:
            indices, visible = masking.select(pixels, tokens, noise)
    except (AttributeError, TypeError) as error:
        if tokens is not None:
            raise
        # Of a masking that takes `None` for an array.
        uses_tokens, cause = True, error
    if tokens is None and uses_tokens:
        raise ValueError(
            f"`embed` must be given, as the {type(masking).__name__} uses tokens. "
            "Received: embed=None"
        ) from cause
    kept = np.zeros(tuple(noise.shape), dtype=bool)
    np.put_along_axis(
        kept, ops.convert_to_numpy(indices), ops.convert_to_numpy(visible), axis=1
    )
    return kept
