from typing import Any

import keras
from keras import ops

from keras_cluster_mask.checks import check_choice, check_range
from keras_cluster_mask.distribution.backends import in_full_precision
from keras_cluster_mask.distribution.replicas import take_rows
from keras_cluster_mask.masking.selection import (
    anchor_count,
    order_by_score,
    second_draw,
)
from keras_cluster_mask.masking.similarity import round_similarity
from keras_cluster_mask.masking.similarity_masking import SimilarityMasking
from keras_cluster_mask.types import Tensor

SINKHORN_ROUNDS = 50
SINKHORN_EPSILON = 1e-3


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class EdgeMasking(SimilarityMasking):
    """Leaves out patches that are similar to the patches with the weakest edges.

    Implements the masking of CLIP-PGS. In every training image, the patches with the
    weakest edges become seeds. A patch is a candidate if its similarity to a seed
    exceeds `threshold`. Exactly the fraction `mask_ratio` of the patches is left out:
    random candidates if there are too many, otherwise all candidates and random other
    patches.

    The edge map is the magnitude of a 3 x 3 Sobel filter on the mean gray levels of the
    patches, scaled to [0, 1]. The border is padded with the mean gray level of the
    image. Similarities are computed as in `ClusterMasking`. With `transport`, a doubly
    stochastic version of their non-negative part is added, computed by 50 rounds of
    Sinkhorn's algorithm, columns before rows.

    Example:

    ```python
    images = np.random.rand(16, 32, 32, 3)
    tokens = np.random.rand(16, 1 + 16, 64)  # a class token and 4 x 4 patches
    masking = kcm.EdgeMasking(patch_size=8, mask_ratio=0.5)
    kept = masking(tokens, images=images, training=True)  # (16, 1 + 8, 64)
    ```

    Args:
        mask_ratio: Float in `[0, 1)`. The fraction of the patches to leave out.
        patch_size: Integer or tuple `(height, width)`, in pixels. `None` infers the
            size of square patches from their number, which an encoder of
            `kcm.with_masking` knows.
        seed_ratio: Float in `[0, 1]`. The fraction of the patches that become seeds (at
            least one).
        threshold: Float in `[-1, 1]`. The similarity above which a patch is a
            candidate.
        edges: `"protect"`, `"released"` or `None`. How seeds are chosen. `"protect"`
            takes the patches with the weakest edges and breaks ties at random, so an
            image has nearly the same seeds in every step. `"released"` imitates the
            authors' released code. That code first subtracts the mean of each patch, so
            its edge map holds rounding errors, and the highest values become seeds.
            Here, seeds are drawn at random instead. `None` takes the patches with the
            smallest noise, as `ClusterMasking` does.
        transport: Boolean. Whether to add the doubly stochastic similarity.
        embedding_weight: Float in `[0, 1]`, or a
            `keras.optimizers.schedules.LearningRateSchedule` over training steps. The
            weight of the tokens' cosine similarity. The pixels' similarity gets 1 minus
            this weight. CLIP-PGS increases it linearly from 0 to 1.
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
        ValueError: If the images are missing or do not fit the patch size or
            the tokens.

    Reference:
        - [Seeing What Matters: Empowering CLIP with Patch Generation-to-Selection](
          https://arxiv.org/abs/2503.17080). The paper first draws candidates at random,
          and protects candidates with strong edges. Here, all patches are candidates.
        - [Official code](https://github.com/clip-pgs/CLIP-PGS). Its Sinkhorn iteration
          divides by both sums at once and also uses negative similarities, and its edge
          map is padded with 0.
    """

    _settings = (
        *SimilarityMasking._settings,
        "seed_ratio",
        "threshold",
        "edges",
        "transport",
    )

    def __init__(
        self,
        mask_ratio: float = 0.5,
        patch_size: int | tuple[int, int] | None = None,
        seed_ratio: float = 0.05,
        threshold: float = 0.5,
        edges: str | None = "protect",
        transport: bool = True,
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
        check_range("seed_ratio", seed_ratio, 0, 1)
        check_range("threshold", threshold, -1, 1)
        check_choice("edges", edges, ("protect", "released", None))
        check_choice("transport", transport, (True, False))
        self.seed_ratio = float(seed_ratio)
        self.threshold = float(threshold)
        self.edges = edges
        self.transport = bool(transport)

    @in_full_precision
    def score_images(
        self, noise: Tensor, images: Tensor, tokens: Tensor | None
    ) -> Tensor:
        patches = self.patches_of(images, noise.shape[1])
        grid = self.grid_shape(noise.shape[1], images)
        seeds = self.draw_seeds(noise, patches, grid)
        if self.transport:
            similarity = self.similarity_to_anchors(patches, None, tokens)
            to_seeds = take_rows(similarity, seeds)
            to_seeds = to_seeds + doubly_stochastic_rows(similarity, seeds)
        else:
            to_seeds = self.similarity_to_anchors(patches, seeds, tokens)
        above = round_similarity(ops.max(to_seeds, axis=1) - self.threshold)
        return ops.where(above > 0.0, -1.0, 0.0)

    def draw_seeds(
        self, noise: Tensor, patches: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Returns the `(batch, A)` indices of the seeds, in order of preference."""
        preferred = ops.zeros_like(noise)
        if self.edges == "released":
            preferred = second_draw(noise)
        elif self.edges == "protect":
            preferred = -edge_map(patches, grid)
        # Ties go to the smaller noise. If there are too many candidates, those with the
        # larger noise are kept, and a patch that is a seed only because of its noise is
        # left out.
        count = anchor_count(noise.shape[1], self.seed_ratio)
        return order_by_score(preferred, -noise)[:, :count]


def edge_map(patches, grid):
    """Computes the strength of edges between patches, from their mean gray levels.

    Args:
        patches: `(batch, N, n)` float32 tensor.
        grid: Tuple `(rows, columns)` of patches.

    Returns:
        `(batch, N)` float32 tensor of multiples of 2^-12 in `[0, 1]`.
    """
    gray = ops.mean(patches, axis=-1)
    gray = ops.reshape(gray - ops.mean(gray, axis=-1, keepdims=True), (-1, *grid))
    gray = ops.pad(gray, ((0, 0), (1, 1), (1, 1)))
    x = gray[:, :, 2:] - gray[:, :, :-2]
    y = gray[:, 2:] - gray[:, :-2]
    x = x[:, :-2] + 2.0 * x[:, 1:-1] + x[:, 2:]
    y = y[:, :, :-2] + 2.0 * y[:, :, 1:-1] + y[:, :, 2:]
    edges = ops.reshape(ops.sqrt(x * x + y * y), (-1, grid[0] * grid[1]))
    edges = edges - ops.min(edges, axis=-1, keepdims=True)
    # The floor is far above rounding errors, which would otherwise become the edges of
    # a uniformly gray image.
    floor = ops.maximum(0.01 * ops.max(ops.abs(patches), axis=(1, 2)), 1e-12)
    strongest = ops.maximum(ops.max(edges, axis=-1), floor)
    return round_similarity(edges / strongest[:, None])


def doubly_stochastic_rows(similarity, seeds):
    """Computes some rows of the similarities after Sinkhorn's algorithm.

    Args:
        similarity: `(batch, N, N)` float32 tensor. Negative values count as 0.
        seeds: `(batch, A)` int tensor, the indices of the rows.

    Returns:
        `(batch, A, N)` float32 tensor. In the matrix of all N rows, rows and columns
        sum to 1.
    """
    # Not 0: the factor of a patch without any similarity, even to itself, would
    # overflow.
    similarity = ops.maximum(similarity, 1e-12)

    # Update factors of rows and columns. Dividing the matrix would rewrite it each
    # time.
    def rescale(_, factors):
        row, column = factors
        sums = column * ops.einsum("bi,bij->bj", row, similarity)
        column = column / (sums + SINKHORN_EPSILON)
        sums = row * ops.einsum("bij,bj->bi", similarity, column)
        return row / (sums + SINKHORN_EPSILON), column

    ones = ops.ones_like(similarity[:, 0])
    row, column = ops.fori_loop(0, SINKHORN_ROUNDS, rescale, (ones, ones))
    scale = take_rows(row, seeds)[:, :, None] * column[:, None]
    return take_rows(similarity, seeds) * scale
