from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import in_full_precision
from keras_cluster_mask.distribution.replicas import take_rows
from keras_cluster_mask.masking.similarity import round_similarity
from keras_cluster_mask.masking.similarity_masking import SimilarityMasking
from keras_cluster_mask.types import Tensor

# The minimum squared length of a sum of patches. Below it, rounding errors determine
# the direction of the sum.
SHORTEST = 1e-4


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class KMeansMasking(SimilarityMasking):
    """Leaves out whole k-means clusters of every training image, in random order.

    The cluster masking paper compares random anchors with this alternative. Spherical
    k-means, initialized with random patches, clusters the patches of each image. Whole
    clusters are left out in random order until exactly the fraction `mask_ratio` of the
    patches is left out. Random patches of the last cluster are kept.

    Patches are compared as in `ClusterMasking`: without their means, and with a floor
    under their contrast, so that flat patches (paper, sky) are similar and share a
    cluster. With a plain cosine similarity, rounding errors would decide the clusters
    of flat patches.

    Example:

    ```python
    images = np.random.rand(16, 32, 32, 3)
    tokens = np.random.rand(16, 1 + 16, 64)  # a class token and 4 x 4 patches
    masking = kcm.KMeansMasking(patch_size=8, mask_ratio=0.5, num_clusters=4)
    kept = masking(tokens, images=images, training=True)  # (16, 1 + 8, 64)
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        patch_size: Integer or tuple `(height, width)`, in pixels. `None` infers the
            size of square patches from their number, which an encoder of
            `kcm.with_masking` knows.
        num_clusters: Integer. The number of clusters per image, at most the number of
            patches. A patch that is equally similar to several centers joins the
            cluster that is left out first, so some clusters may be empty.
        iterations: Integer. The number of times that the centers move to the mean of
            their patches. The center of an empty cluster stays where it is.
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

    Call arguments:
        tokens: `(batch, prefix + N, dim)` tensor, `N = (H / p) (W / p)`.
        images: `(batch, H, W, C)` tensor (or channels first) of any dtype and
            value range. H and W are multiples of the patch size.
        training: Python boolean. Tokens are left out only if it is true.
        noise: `(batch, N)` float32 tensor in `[0, 1)`. Drawn if not given.

    Returns:
        `(batch, prefix + K, dim)` tensor of the same dtype as `tokens`.

    Raises:
        ValueError: If the images are missing, do not fit the patch size or the tokens,
            or have fewer patches than there are clusters.

    Reference:
        - [Efficient Vision-Language Pre-training by Cluster Masking](
          https://arxiv.org/abs/2405.08815). Its code contains no k-means: the numbers
          of clusters and iterations, the first centers and the order of clusters are
          choices of this library.
    """

    _settings = (*SimilarityMasking._settings, "num_clusters", "iterations")

    def __init__(
        self,
        mask_ratio: float = 0.5,
        patch_size: int | tuple[int, int] | None = None,
        num_clusters: int = 8,
        iterations: int = 5,
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
        self.num_clusters = check_integer("num_clusters", num_clusters)
        self.iterations = check_integer("iterations", iterations)

    @in_full_precision
    def score_images(
        self, noise: Tensor, images: Tensor, tokens: Tensor | None
    ) -> Tensor:
        num_clusters, num_patches = self.num_clusters, noise.shape[1]
        if num_clusters > num_patches:
            raise ValueError(
                "`num_clusters` must not exceed the number of patches of an image: use "
                "fewer clusters, or smaller patches. Received: num_clusters="
                f"{num_clusters}, {num_patches} patches"
            )
        # K-means needs only the similarities of the patches, which are fewer numbers
        # than their pixels.
        patches = self.patches_of(images, num_patches)
        similarity = self.similarity_to_anchors(patches, None, tokens)
        first = ops.argsort(noise, axis=-1)[:, :num_clusters]

        def move(_, to_centers):
            nearest = ops.argmax(to_centers, axis=1)
            members = ops.one_hot(nearest, num_clusters, axis=1, dtype="float32")
            to_sums = ops.matmul(members, similarity)
            length = ops.sum(members * to_sums, axis=-1, keepdims=True)
            to_means = to_sums * ops.rsqrt(ops.maximum(length, SHORTEST))
            # A cluster has no mean if it is empty or its patches cancel out.
            return ops.where(length > SHORTEST, round_similarity(to_means), to_centers)

        to_centers = round_similarity(take_rows(similarity, first))
        to_centers = ops.fori_loop(0, self.iterations, move, to_centers)
        # Clusters are in the order of their first centers' noise, which is random.
        return ops.cast(ops.argmax(to_centers, axis=1), "float32")
