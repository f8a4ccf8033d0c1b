from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.masking.patch_grid import standardize_grid
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class GridMasking(PatchMasking):
    """Keeps one random patch of every window of patches.

    Implements the grid masking of CLIPA. Windows of `window` x `window` patches tile
    every training image, and each keeps exactly one patch. With the default of 2 x 2, a
    quarter of the patches is kept, and every part of the image is seen.

    Example:

    ```python
    tokens = np.random.rand(2, 1 + 16, 8)  # a class token and 4 x 4 patches
    masking = kcm.GridMasking(window=2, num_prefix_tokens=1)
    kept = masking(tokens, training=True)  # (2, 1 + 4, 8)
    ```

    Args:
        window: Integer. The side of a window in patches. It sets the fraction of the
            patches to leave out, `1 - 1 / window**2`, so there is no `mask_ratio`. The
            attribute `mask_ratio` can be set to 0 to train on whole images. It is not
            saved.
        grid: Integer or tuple `(rows, columns)` of patches, multiples of `window`.
            `None` infers it from the number of patches and the size of the images,
            assuming square patches. If the layer is called without images, the grid is
            square. Channels-first images require `grid`, unless Keras's
            `image_data_format()` is channels first.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept: 1 for a class token. With `None`, `kcm.with_masking` sets
            it. Required in your own model.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ValueError: When called, if the grid cannot be inferred, or if `window` does not
            divide it.

    Reference:
        - [An Inverse Scaling Law for CLIP Training](https://arxiv.org/abs/2305.07017)
        - [Official code](https://github.com/UCSC-VLAA/CLIPA), which describes this
          masking but does not implement it. It does not specify whether all windows
          keep the same position. Here, each window draws its own.
    """

    _settings = ("window", "grid", "num_prefix_tokens", "seed")

    def __init__(
        self,
        window: int = 2,
        grid: int | tuple[int, int] | None = None,
        num_prefix_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        window = check_integer("window", window)
        super().__init__(1 - 1 / window**2, num_prefix_tokens, seed, **kwargs)
        self.window = window
        self.grid = standardize_grid(grid)

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        rows, columns = self.grid_shape(noise.shape[1], images)
        side = self.window
        if rows % side or columns % side:
            raise ValueError(
                "`window` must divide the numbers of rows and columns of the patch "
                f"grid. Received: window={side}, rows={rows}, columns={columns}"
            )
        sizes = {"h": rows // side, "p": side, "w": columns // side, "q": side}
        windows = ops.rearrange(noise, "b (h p w q) -> b h w (p q)", **sizes)
        # Select by index, not by value: equal noise would keep two patches of a window.
        is_kept = ops.one_hot(ops.argmax(windows, axis=-1), side * side)
        return ops.rearrange(is_kept, "b h w (p q) -> b (h p w q)", **sizes)
