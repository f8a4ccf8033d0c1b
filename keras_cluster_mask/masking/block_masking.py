import math
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.masking.patch_grid import standardize_grid
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.selection import second_draw
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class BlockMasking(PatchMasking):
    """Keeps one square block of patches of every training image.

    Implements the block masking of CLIPA. The block is the smallest square that holds
    the patches to keep. All positions in the image are equally likely, and everything
    outside the block is left out. If the block holds more patches than needed, random
    ones are left out. If a side of the grid is too short for the square, the block
    spans this whole side and is only as long as needed on the other.

    Example:

    ```python
    tokens = np.random.rand(2, 1 + 16, 8)  # a class token and 4 x 4 patches
    masking = kcm.BlockMasking(mask_ratio=0.75, num_prefix_tokens=1)
    kept = masking(tokens, training=True)  # (2, 1 + 4, 8), of 2 x 2 patches
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        grid: Integer or tuple `(rows, columns)` of patches. `None` infers it from the
            number of patches and the size of the images, assuming square patches. If
            the layer is called without images, the grid is square. Channels-first
            images require `grid`, unless Keras's `image_data_format()` is channels
            first.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept: 1 for a class token. With `None`, `kcm.with_masking` sets
            it. Required in your own model.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: When called, if the grid cannot be inferred.

    Reference:
        - [An Inverse Scaling Law for CLIP Training](https://arxiv.org/abs/2305.07017)
        - [Official code](https://github.com/UCSC-VLAA/CLIPA), which describes this
          masking (a single block is kept, the rest is removed) but does not implement
          it. It does not specify the shape and position of the block.
    """

    _settings = (*PatchMasking._settings, "grid")

    def __init__(
        self,
        mask_ratio: float = 0.5,
        grid: int | tuple[int, int] | None = None,
        num_prefix_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(mask_ratio, num_prefix_tokens, seed, **kwargs)
        self.grid = standardize_grid(grid)

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        rows, columns = self.grid_shape(noise.shape[1], images)
        height, width = _block_sides(rows, columns, self.num_kept(rows * columns))

        places_across = columns - width + 1
        num_places = (rows - height + 1) * places_across
        place = ops.cast(noise[:, :1] * num_places, "int32")
        # Noise just below 1 can round up to the number of places.
        place = ops.minimum(place, num_places - 1)
        top, left = place // places_across, place % places_across

        patches = ops.arange(rows * columns, dtype="int32")
        y, x = patches // columns, patches % columns
        is_inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        # Do not use the noise itself. The noise of the first patch selects the place,
        # so it is always small if the block contains that patch.
        return ops.where(is_inside, second_draw(noise), -1.0)


def _block_sides(rows, columns, num_kept):
    """Returns the height and width of the block, in patches."""
    side = math.isqrt(num_kept - 1) + 1
    if side > rows:
        return rows, math.ceil(num_kept / rows)
    if side > columns:
        return math.ceil(num_kept / columns), columns
    return side, side
