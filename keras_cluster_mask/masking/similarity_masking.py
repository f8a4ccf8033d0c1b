import math
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_choice, check_range, sides_of
from keras_cluster_mask.distribution.chunks import map_rows
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.masking.patch_masking import PatchMasking
from keras_cluster_mask.masking.selection import add_state
from keras_cluster_mask.masking.similarity import (
    extract_patches,
    pixel_similarity,
    token_similarity,
)
from keras_cluster_mask.types import Tensor

# The number of pixels, or similarities, in memory at a time on torch: 256 MiB, and a
# few copies. That is 445 images of 224 x 224 pixels.
MAX_VALUES = 2**26


class SimilarityMasking(PatchMasking):
    """Base class of strategies that compare the patches of an image with one another.

    Patches are compared by their pixels, by their tokens, or by a mix of both. A
    strategy defines `score_images`, which gets a few images at a time on torch.

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        patch_size: Integer or tuple `(height, width)`, in pixels, or `None`.
        embedding_weight: Float in `[0, 1]`, or a
            `keras.optimizers.schedules.LearningRateSchedule` over training steps. The
            weight of the tokens' cosine similarity. The pixels' similarity gets 1 minus
            this weight.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept. `None` infers it from the number of patches.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        mask_ratio: float,
        patch_size: int | tuple[int, int] | None,
        embedding_weight: float | keras.optimizers.schedules.LearningRateSchedule,
        num_prefix_tokens: int | None,
        data_format: str | None,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(
            mask_ratio=mask_ratio,
            num_prefix_tokens=num_prefix_tokens,
            seed=seed,
            **kwargs,
        )
        if patch_size is not None:
            self.patch_size = sides_of("patch_size", patch_size)
        self.data_format = data_format or keras.config.image_data_format()
        formats = "channels_last", "channels_first"
        check_choice("data_format", self.data_format, formats)
        if isinstance(embedding_weight, dict):
            embedding_weight = keras.saving.deserialize_keras_object(embedding_weight)
        self.step = None
        if isinstance(
            embedding_weight, keras.optimizers.schedules.LearningRateSchedule
        ):
            self.step = add_state(self, "step", 0, "int32")
        else:
            check_range("embedding_weight", embedding_weight, 0, 1)
            embedding_weight = float(embedding_weight)
        self.embedding_weight = embedding_weight

    def score(
        self, noise: Tensor, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        if images is None:
            raise ValueError(
                f"`{self.name}` needs the images that the tokens were made from: call "
                "it as `masking(tokens, images=images)`. Received: images=None"
            )
        # Images do not depend on one another.
        values = max(math.prod(images.shape[1:]), noise.shape[1] ** 2)
        max_rows = max(1, MAX_VALUES // values)
        return map_rows(self.score_images, max_rows, [noise, images, tokens])

    def score_images(
        self, noise: Tensor, images: Tensor, tokens: Tensor | None
    ) -> Tensor:
        """Scores the patches of images, as `score` does.

        Args:
            noise: `(batch, N)` float32 tensor in `[0, 1)`.
            images: Images.
            tokens: `(batch, prefix + N, dim)` tensor, or `None`.

        Returns:
            `(batch, N)` float32 tensor.
        """
        raise NotImplementedError

    def patches_of(self, images: Tensor, num_patches: int | None = None) -> Tensor:
        """Cuts images into patches.

        Args:
            images: `(batch, H, W, C)` tensor, or channels first.
            num_patches: Integer, N, from which the size of square patches follows if
                the masking has no `patch_size`.

        Returns:
            `(batch, N, n)` float32 tensor of the n values of each patch.
        """
        if self.patch_size is None and num_patches is None:
            raise ValueError(
                f"`patch_size` must be given to `{self.name}`, unless the number of "
                "patches is known. Received: patch_size=None"
            )
        grid = self.grid_shape(num_patches, images)
        sides = height_and_width(images.shape, self.data_format)
        patch_size = tuple(side // count for side, count in zip(sides, grid))
        return extract_patches(images, patch_size, self.data_format)

    def similarity_to_anchors(
        self, patches: Tensor, anchors: Tensor | None, tokens: Tensor | None = None
    ) -> Tensor:
        """Computes the similarity of each patch to each anchor.

        Args:
            patches: `(batch, N, n)` tensor, from `patches_of`.
            anchors: `(batch, A)` int tensor of patch indices, or `None` for all N.
            tokens: `(batch, prefix + N, dim)` tensor. Needed if
                `embedding_weight` is not 0.

        Returns:
            `(batch, A, N)` float32 tensor in `[-1, 1]`, not yet rounded.
        """
        if anchors is not None:
            anchors = ops.convert_to_tensor(anchors, dtype="int32")
        similarity = pixel_similarity(patches, anchors)
        if self.embedding_weight != 0.0:
            if tokens is None:
                raise ValueError(
                    "`tokens` must be given if `embedding_weight` is not 0. "
                    "Received: tokens=None"
                )
            weight = self.embedding_weight
            if self.step is not None:
                weight = ops.clip(ops.cast(weight(self.step), "float32"), 0.0, 1.0)
            tokens = tokens[:, tokens.shape[1] - patches.shape[1] :]
            alike = token_similarity(tokens, anchors)
            similarity = (1.0 - weight) * similarity + weight * alike
        return similarity

    def advance(self) -> None:
        if self.step is not None:
            self.step.assign_add(1)

    def get_config(self) -> dict[str, Any]:
        weight = keras.saving.serialize_keras_object(self.embedding_weight)
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "embedding_weight": weight,
            "data_format": self.data_format,
        }
