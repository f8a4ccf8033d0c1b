"""How much a masking keeps of the images of a dataset, and where."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.batches import num_images, read_images
from keras_cluster_mask.checks import check_choice, check_integer
from keras_cluster_mask.masking.keep_mask import (
    check_tokens_do_not_matter,
    keep_mask,
    masking_inputs,
    patch_size_of,
)
from keras_cluster_mask.masking.patch_grid import grid_shape
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.types import Tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskingStatistics:
    """What `masking_statistics` found; `print` it for a table.

    A patch that is kept as hidden padding does not count as kept, as it has no
    influence.

    Attributes:
        keep_ratio: `(images,)` float32 array. The share of the patches of each image
            that is kept.
        kept_by_position: `(rows, columns)` float64 array. The share of the images in
            which the patch at this place of the grid is kept.
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
    """Measures how much a masking keeps of the images of a dataset, and where.

    One pass over the data, which keeps only sums and a number per image. The masking
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
    statistics.keep_ratio  # (32,), around 0.5
    ```

    Args:
        masking: A `PatchMasking`.
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
    expected = num_images(data)
    if None not in (expected, max_images):
        expected = min(expected, max_images)
    progress = keras.utils.Progbar(
        expected,
        verbose=1 if verbose == "auto" else verbose,
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
            if embed is None:
                check_tokens_do_not_matter(masking, *inputs, noise)
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
