"""Pure functions that compute the similarity of image patches, and its threshold.

Similarities are float32 under any dtype policy. They are rounded to multiples of 1 /
STEPS, so that rounding errors, which differ between backends, do not change a mask.
"""

import bisect

import numpy as np
from keras import ops

from keras_cluster_mask.distribution.backends import in_full_precision
from keras_cluster_mask.distribution.replicas import take_rows
from keras_cluster_mask.masking.patch_grid import grid_shape, is_channels_first

STEPS = 2**12
# The largest error of a mask ratio that a threshold may have.
TOLERANCE = 0.01


def extract_patches(images, patch_size, data_format):
    """Cuts images into patches.

    Args:
        images: `(batch, H, W, C)` tensor, or `(batch, C, H, W)` for
            `"channels_first"`, of any dtype.
        patch_size: Tuple `(height, width)` in pixels, which divides H and W.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        `(batch, N, n)` float32 tensor: N patches in row-major order with n
        pixel values each.
    """
    rows, columns = grid_shape(images.shape, patch_size, data_format)
    p, q = patch_size
    if is_channels_first(data_format):
        images = ops.transpose(images, (0, 2, 3, 1))
    channels = images.shape[-1]
    # The batch size may be unknown while tracing, so this axis is -1.
    x = ops.reshape(ops.cast(images, "float32"), (-1, rows, p, columns, q, channels))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, rows * columns, p * q * channels))


@in_full_precision
def pixel_similarity(patches, anchors=None):
    """Computes the similarity of every patch to the anchor patches of its image.

    Patches are compared without their means, in units of the image's contrast. A floor
    under the contrast makes flat patches (paper, sky) similar to one another and not to
    textured ones, and prevents NaN.

    Args:
        patches: `(batch, N, n)` float32 tensor.
        anchors: `(batch, A)` int tensor of patch indices. `None` takes all N.

    Returns:
        `(batch, A, N)` float32 tensor in `[-1, 1]`, not yet rounded.

    Reference:
        - [Efficient Vision-Language Pre-training by Cluster Masking](
          https://arxiv.org/abs/2405.08815)
    """
    # Every pass that writes all pixels costs more than all products with the anchors.
    # So the pixels are written only once, when the mean of each patch is subtracted.
    size = patches.shape[-1]
    means = ops.mean(patches, axis=-1, keepdims=True)
    centered = patches - means
    # The mean of hundreds of pixels has a rounding error, which would exceed the floor
    # below on a flat patch. The centered pixels are small, so their mean is exact
    # enough to correct it: in the anchors, and so in the products, and in the energies.
    rest = ops.mean(centered, axis=-1, keepdims=True)
    energy = ops.einsum("bnk,bnk->bn", centered, centered)
    energy = ops.maximum(energy - size * ops.square(rest[:, :, 0]), 0.0)
    anchor_patches = _rows(centered, anchors)
    anchor_patches = anchor_patches - ops.mean(anchor_patches, axis=-1, keepdims=True)
    products = ops.matmul(centered, ops.transpose(anchor_patches, (0, 2, 1)))
    products = ops.transpose(products, (0, 2, 1))

    # The image's variance: within its patches and between their means.
    between = ops.var(means[:, :, 0], axis=-1, keepdims=True)
    variance = ops.mean(energy, axis=-1, keepdims=True) / size + between
    largest = ops.maximum(
        ops.max(patches, axis=(1, 2)), -ops.min(patches, axis=(1, 2))
    )[:, None]
    contrast = ops.maximum(ops.maximum(ops.sqrt(variance), 0.01 * largest), 1e-12)
    # The floor e = 1e-3 sqrt(n) of a patch in units of the contrast, squared and scaled
    # back to pixel units. This avoids dividing every pixel.
    floor = 1e-6 * size * ops.square(contrast)

    inverse_norm = ops.rsqrt(energy + floor)
    # Multiply by one factor at a time: their product can underflow in a black image.
    similarity = (products + floor[:, :, None]) * inverse_norm[:, None, :]
    return similarity * _rows(inverse_norm[:, :, None], anchors)


@in_full_precision
def token_similarity(tokens, anchors=None):
    """Computes the cosine similarity of every patch token to the anchors' tokens.

    Args:
        tokens: `(batch, N, dim)` tensor of patch tokens, without prefix. No
            gradient flows into them.
        anchors: `(batch, A)` int tensor of patch indices. `None` takes all N.

    Returns:
        `(batch, A, N)` float32 tensor in `[-1, 1]`, 0 for a zero token.
    """
    tokens = ops.stop_gradient(ops.cast(tokens, "float32"))
    tokens = ops.normalize(tokens, epsilon=1e-6)
    return ops.matmul(_rows(tokens, anchors), ops.transpose(tokens, (0, 2, 1)))


def _rows(values, anchors):
    """Returns the rows `(batch, A, ...)` of the anchors, or all rows."""
    return values if anchors is None else take_rows(values, anchors)


def round_similarity(similarity):
    """Rounds to multiples of 1 / STEPS, at most 1."""
    # Convert to integers and back, because a sort may distinguish -0.0 from 0.0.
    steps = ops.cast(ops.round(similarity * STEPS), "int32")
    return ops.cast(ops.minimum(steps, STEPS), "float32") / STEPS


def find_threshold(similarities, mask_ratio, max_visible):
    """Finds the threshold with the mean mask ratio nearest to the given one.

    Similarities are multiples of `1 / STEPS`, so there are `2 STEPS + 1` different
    thresholds, half a step above each multiple. The mask ratio falls as the threshold
    rises, so a bisection tests at most 14 of them.

    Args:
        similarities: `(images, N)` array.
        mask_ratio: Float, the fraction of patches to leave out on average.
        max_visible: Integer. The maximum number of patches that are kept per image.

    Returns:
        The threshold, a float.

    Raises:
        ValueError: If no threshold comes within `TOLERANCE`.
    """

    def threshold(step):
        return (step + 0.5) / STEPS

    def ratio(step):
        visible = np.sum(similarities <= threshold(step), axis=1)
        return 1 - np.mean(np.clip(visible, 1, max_visible)) / similarities.shape[1]

    # The first step that leaves out less than `mask_ratio`, and the one before.
    steps = range(-STEPS, STEPS)
    first = bisect.bisect(steps, False, key=lambda step: ratio(step) < mask_ratio)
    low, high = first - STEPS - 1, first - STEPS
    best = min(low, high, key=lambda step: abs(ratio(step) - mask_ratio))
    if abs(ratio(best) - mask_ratio) > TOLERANCE:
        raise ValueError(
            "`mask_ratio` cannot be reached on average with these images. The nearest "
            f"ratios that a threshold can reach are {ratio(low):.3f} and "
            f"{ratio(high):.3f}: pass one of them, pass more images, or set "
            f"`threshold` yourself. Received: mask_ratio={mask_ratio}, "
            f"{len(similarities)} images with {similarities.shape[1]} patches"
        )
    return min(max(threshold(best), -1.0), 1.0)
