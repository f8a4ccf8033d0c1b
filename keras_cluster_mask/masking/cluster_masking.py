import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import read_images
from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.masking.selection import (
    add_state,
    anchor_count,
    order_by_score,
    rest_count,
)
from keras_cluster_mask.masking.similarity import (
    find_threshold,
    pixel_similarity,
    round_similarity,
)
from keras_cluster_mask.masking.similarity_masking import SimilarityMasking
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class ClusterMasking(SimilarityMasking):
    """Leaves out clusters of similar patches of every training image.

    A few random patches become anchors. The patches most similar to an anchor
    form its cluster and are left out with it. Whole objects or surfaces are left
    out rather than scattered squares, so an image-text model has to infer the
    missing words from context.

    There are two modes:

    - **Exact budget** (the default): clusters grow until exactly the fraction
      `mask_ratio` of the patches is left out. Every image costs the same, shapes
      are static, no attention mask is needed, and any encoder works.
    - **Threshold** (`min_mask_ratio=beta`, the paper's): a patch is left out if its
      similarity to an anchor exceeds `threshold`, so the fraction differs between
      images. At least `beta` of the patches are left out, which fixes the cost. Set the
      threshold yourself or let `adapt` find it. If an image loses more than `beta`,
      some of its left-out patches are kept as padding. A Keras mask on the output hides
      the padding, so that no query attends to it.

    Example:

    ```python
    images = np.random.rand(16, 32, 32, 3)
    tokens = np.random.rand(16, 1 + 16, 64)  # a class token and 4 x 4 patches
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5, seed=0)
    kept = masking(tokens, images=images, training=True)  # (16, 1 + 8, 64)

    masking = kcm.ClusterMasking(patch_size=8, min_mask_ratio=0.3, seed=0)
    masking.adapt(images)
    kept = masking(tokens, images=images, training=True)  # (16, 1 + 11, 64)
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out:
            exactly in budget mode, on average in threshold mode. 0 keeps all patches in
            both modes.
        patch_size: Integer or tuple `(height, width)`, in pixels. `None` infers the
            size of square patches from their number, which an encoder of
            `kcm.with_masking` knows.
        min_mask_ratio: Float in `[0, 1)` or `None`. The minimum fraction of the patches
            to leave out of every image in threshold mode; `None` selects budget mode.
        threshold: Float. The similarity above which a patch joins a cluster, in
            threshold mode. If it is `None`, call `adapt`.
        anchor_ratio: Float in `[0, 1]`. The fraction of the patches that become anchors
            (at least one). At `mask_ratio` or above, the mask is random.
        softness: Float >= 0. In budget mode, adds this much Gumbel noise to the
            similarities: 0 leaves out pure clusters, infinity leaves out random
            patches.
        hide_padding: Boolean. In threshold mode, whether the padding is hidden. If
            false, the padding consists of random left-out patches and stays visible,
            without an attention mask. The authors' released code has this effect. A
            Keras mask marks hidden padding: in your own encoder, add residuals with
            `keras.layers.Add`, because `+` drops the mask.
        embedding_weight: Float in `[0, 1]`, or a
            `keras.optimizers.schedules.LearningRateSchedule` over training steps. The
            weight of the tokens' cosine similarity. The pixels' similarity gets 1 minus
            this weight. In threshold mode with a weight other than 0, every training
            step moves the threshold by 0.05 times the difference between the fraction
            of patches above it and `mask_ratio`, because the effect of a threshold
            depends on the weight.
        num_prefix_tokens: Integer. The number of tokens before the patch tokens, which
            are always kept. `None` infers it from the number of patches.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        seed: Integer. The random seed of the noise.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: `(batch, prefix + N, dim)` tensor, `N = (H / p) (W / p)`.
        images: `(batch, H, W, C)` tensor (or channels first) of any dtype and
            value range. H and W are multiples of the patch size.
        training: Python boolean. Tokens are left out only if it is true.
        noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.

    Returns:
        `(batch, prefix + K, dim)` tensor of the same dtype as `tokens`.

    Raises:
        ValueError: If the images are missing or do not fit the patch size or the
            tokens, or, in `fit` and in a training call of the layer, if the threshold
            is not set in threshold mode. In a step of an own loop, results are NaN.

    Reference:
        - [Efficient Vision-Language Pre-training by Cluster Masking](
          https://arxiv.org/abs/2405.08815)
    """

    _settings = (
        *SimilarityMasking._settings,
        "min_mask_ratio",
        "anchor_ratio",
        "softness",
        "hide_padding",
    )

    def __init__(
        self,
        mask_ratio: float = 0.5,
        patch_size: int | tuple[int, int] | None = None,
        min_mask_ratio: float | None = None,
        threshold: float | None = None,
        anchor_ratio: float = 0.03,
        softness: float = 0.0,
        hide_padding: bool = True,
        embedding_weight: float | keras.optimizers.schedules.LearningRateSchedule = 0.0,
        num_prefix_tokens: int | None = None,
        data_format: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            patch_size=patch_size,
            mask_ratio=mask_ratio,
            embedding_weight=embedding_weight,
            num_prefix_tokens=num_prefix_tokens,
            data_format=data_format,
            seed=seed,
            **kwargs,
        )
        check_range("anchor_ratio", anchor_ratio, 0, 1)
        _check_mode(min_mask_ratio, threshold, softness, hide_padding)

        # === Config ===
        self.min_mask_ratio = min_mask_ratio
        self.anchor_ratio = float(anchor_ratio)
        self.softness = float(softness)
        self.hide_padding = bool(hide_padding)

        # === State ===
        self.threshold = self.share_above = None
        self._given_threshold = threshold
        if min_mask_ratio is not None:
            # Infinite if it is not set: JAX takes no NaN from several processes.
            value = math.inf if threshold is None else float(threshold)
            self.threshold = add_state(self, "threshold", value)
            if self.embedding_weight != 0.0:
                if self.mask_ratio:
                    _check_reachable(self.mask_ratio, min_mask_ratio)
                self.share_above = add_state(self, "share_above", 0.0)

    # === The strategy ===

    def score_images(
        self, noise: Tensor, images: Tensor, tokens: Tensor | None
    ) -> Tensor:
        patches, anchors = (
            self.patches_of(images, noise.shape[1]),
            self.draw_anchors(noise),
        )
        similarity = self._highest_similarity(patches, anchors, tokens)
        if self.min_mask_ratio is None:
            if not self.softness:
                return -similarity
            gumbel = -ops.log(-ops.log(ops.maximum(noise, 1e-12)))
            if math.isinf(self.softness):
                return gumbel
            return -similarity + self.softness * gumbel

        least_alike = order_by_score(-similarity, noise)[:, :1]
        is_least_alike = ops.arange(noise.shape[1], dtype="int32") == least_alike
        # All patches up to the threshold tie, and so do all others, so noise selects
        # among them. If all are above the threshold, the least similar patch stays
        # visible.
        above = ops.where(is_least_alike, -1.0, -math.inf)
        score = ops.where(similarity <= self.threshold, 0.0, above)
        # NaN if the threshold is not set.
        return score + 0.0 * self.threshold

    def draw_anchors(self, noise: Tensor) -> Tensor:
        """Returns the anchors: `(batch, A)` indices of patches with smallest noise."""
        return ops.argsort(noise, axis=-1)[:, : self.num_anchors(noise.shape[1])]

    def num_anchors(self, num_patches: int) -> int:
        """Returns how many of `num_patches` become anchors, at least 1."""
        return anchor_count(num_patches, self.anchor_ratio)

    def similarity(
        self, images: Tensor, anchors: Tensor, tokens: Tensor | None = None
    ) -> Tensor:
        """Computes the highest similarity of each patch to any of the anchors.

        Args:
            images: `(batch, H, W, C)` tensor, or channels first.
            anchors: `(batch, A)` int tensor of patch indices.
            tokens: `(batch, prefix + N, dim)` tensor. Needed if
                `embedding_weight` is not 0.

        Returns:
            `(batch, N)` float32 tensor in `[-1, 1]`, of multiples of 2^-12.
        """
        return self._highest_similarity(self.patches_of(images), anchors, tokens)

    def _highest_similarity(self, patches, anchors, tokens):
        to_anchors = self.similarity_to_anchors(patches, anchors, tokens)
        return round_similarity(ops.max(to_anchors, axis=1))

    def adapt(
        self, data: Any, max_images: int = 10_000, model: keras.Model | None = None
    ) -> None:
        """Sets `threshold` so that the average mask ratio over data is `mask_ratio`.

        The pixels' similarity to newly drawn anchors is computed once per image. A
        bisection then finds the threshold with the nearest mask ratio.

        Args:
            data: Images as an array, or an iterable of batches (a `tf.data.Dataset`, a
                `PyDataset`, a generator): arrays of images, dictionaries with the key
                `"images"`, or tuples that start with one of these.
            max_images: Integer. Stop reading after this many images.
            model: The `ContrastiveModel` that trains with this masking. It normalizes
                uint8 images as in training, and knows the patch size. Without it,
                images must be as the masking sees them in training.

        Raises:
            ValueError: In budget mode, for data without images, or if no threshold
                comes within 0.01 of `mask_ratio`. This happens if `mask_ratio` is not
                greater than `min_mask_ratio`, or if all images are alike.
        """
        if self.threshold is None:
            raise ValueError(
                "`adapt` is for threshold mode: in budget mode, exactly `mask_ratio` "
                "of the patches of each image are masked. Pass `min_mask_ratio` to "
                "select threshold mode. Received: min_mask_ratio=None"
            )
        check_integer("max_images", max_images, or_none=True)
        _check_reachable(self.mask_ratio, self.min_mask_ratio)

        similarities = []
        for images in read_images(data, max_images):
            num_patches = None
            if model is not None:
                images = model.image_tower.prepare(images)
                # A masking in an own encoder knows the size of patches.
                if self.patch_size is None:
                    num_patches = model.image_encoder.num_patches(images)
            patches = self.patches_of(ops.convert_to_tensor(images), num_patches)
            anchors = self.draw_anchors(self.draw(*patches.shape[:2]))
            highest = ops.max(pixel_similarity(patches, anchors), axis=1)
            similarities.append(ops.convert_to_numpy(round_similarity(highest)))
        similarities = np.concatenate(similarities)
        max_visible = self.num_kept(similarities.shape[1])
        threshold = find_threshold(similarities, self.mask_ratio, max_visible)
        self.threshold.assign(threshold)

    # === Overrides of the base class ===

    def num_kept(self, num_patches: int) -> int:
        if self.min_mask_ratio is None or not self.mask_ratio:
            return super().num_kept(num_patches)
        return max(1, rest_count(num_patches, self.min_mask_ratio))

    @property
    def hides_tokens(self) -> bool:
        return self.min_mask_ratio is not None and self.hide_padding

    def observe(self, score: Tensor) -> None:
        if self.share_above is not None:
            # Measured before left-out patches are added as padding.
            self.share_above.assign(ops.mean(ops.cast(score < 0.0, "float32")))

    def advance(self) -> None:
        # On whole images, the share is that of an earlier step.
        if self.share_above is not None and self.mask_ratio:
            moved = self.threshold + 0.05 * (self.share_above - self.mask_ratio)
            self.threshold.assign(ops.clip(moved, -1.0, 1.0))
        super().advance()

    def check_ready(self) -> None:
        super().check_ready()
        threshold = self.threshold if self.mask_ratio else None
        if threshold is not None and math.isinf(ops.convert_to_numpy(threshold)):
            raise ValueError(
                f"The threshold of `{self.name}` is not set. Pass `threshold`, or "
                "call `adapt(images)` before training. Received: threshold=None"
            )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "threshold": self._given_threshold,
        }


def _check_mode(min_mask_ratio, threshold, softness, hide_padding):
    """Checks the options of budget mode, and of threshold mode."""
    check_range("softness", softness, 0, math.inf)
    check_choice("hide_padding", hide_padding, (True, False))
    if threshold is not None:
        check_range("threshold", threshold, -1, 1)
    if min_mask_ratio is not None:
        check_range("min_mask_ratio", min_mask_ratio, 0, 1, "[)")
    mode = "budget" if min_mask_ratio is None else "threshold"
    for name, value, default, its_mode in (
        ("softness", softness, 0, "budget"),
        ("threshold", threshold, None, "threshold"),
        ("hide_padding", hide_padding, True, "threshold"),
    ):
        if value != default and its_mode != mode:
            raise ValueError(
                f"`{name}` is for {its_mode} mode, but `min_mask_ratio` selects {mode} "
                f"mode. Received: {name}={value}, min_mask_ratio={min_mask_ratio}"
            )


def _check_reachable(mask_ratio, min_mask_ratio):
    if mask_ratio <= min_mask_ratio:
        raise ValueError(
            "`mask_ratio` must be greater than `min_mask_ratio`, the fraction that is "
            "masked in every image at any threshold: lower `min_mask_ratio`. Received: "
            f"mask_ratio={mask_ratio}, min_mask_ratio={min_mask_ratio}"
        )
