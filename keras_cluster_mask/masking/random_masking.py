import keras

from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class RandomMasking(PatchMasking):
    """Leaves out random patches of every training image.

    This is the masking of FLIP, and the baseline for every other strategy. Each image
    keeps a uniformly random subset of its patches, of fixed size.

    Example:

    ```python
    tokens = np.random.rand(2, 1 + 16, 8)  # a class token and 4 x 4 patches
    masking = kcm.RandomMasking(mask_ratio=0.5, num_prefix_tokens=1)
    kept = masking(tokens, training=True)  # (2, 1 + 8, 8)
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept: 1 for a class token. With `None`, `kcm.with_masking` sets
            it. Required in your own model.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Reference:
        - [Scaling Language-Image Pre-training via Masking](
          https://arxiv.org/abs/2212.00794)
    """

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        return noise
