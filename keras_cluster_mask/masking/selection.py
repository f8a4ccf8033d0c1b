"""How scores, noise and ratios select patches: functions that strategies share."""

import numpy as np
from keras import ops


def order_by_score(score, noise):
    """Patch indices from the highest score to the lowest.

    Args:
        score: `(batch, N)` float32 tensor.
        noise: `(batch, N)` float32 tensor. Of equal scores the one with the
            larger noise comes first.

    Returns:
        `(batch, N)` int32 tensor of indices.
    """
    # `argsort` is stable on all backends (`top_k` is not on torch), so two
    # sorts, the lesser criterion first, order by both.
    by_noise = ops.argsort(-noise, axis=-1)
    by_score = ops.argsort(-ops.take_along_axis(score, by_noise, axis=1), axis=-1)
    return ops.cast(ops.take_along_axis(by_noise, by_score, axis=1), "int32")


def second_draw(noise):
    """A second draw from the noise: its lower bits, independent of the upper ones.

    Args:
        noise: `(batch, N)` float32 tensor in `[0, 1)`.

    Returns:
        `(batch, N)` float32 tensor in `[0, 1)`, independent of the first 12 bits of
        the noise.
    """
    # Exact, as 4096 is a power of two: all backends get the same.
    scaled = noise * 4096.0
    return scaled - ops.floor(scaled)


def anchor_count(num_patches, ratio):
    """How many of `num_patches` a share of `ratio` is, rounded up, at least 1."""
    return max(1, num_patches - int(num_patches * (1.0 - ratio) + 1e-6))


def kept_count(num_patches, ratio):
    """How many of `num_patches` stay if `ratio` of them goes, at least 1."""
    # 1e-6 mends products such as 10 * (1 - 0.9) = 0.99999...
    return max(1, int(num_patches * (1.0 - ratio) + 1e-6))


def check_noise(noise, batch_size, num_patches):
    """Raises unless `noise` has one value for each patch of each image, or view."""
    shape = tuple(noise.shape)
    fits = len(shape) in (2, 3) and shape[-1] == num_patches and 0 not in shape[1:]
    if not fits or (None not in (shape[0], batch_size) and shape[0] != batch_size):
        raise ValueError(
            f"`noise` must have shape ({batch_size or 'batch'}, {num_patches}), one "
            f"value a patch, or ({batch_size or 'batch'}, views, {num_patches}). "
            f"Received: noise.shape={shape}"
        )


def probe_pixels(prepare_pixels):
    """What a function makes of a few uint8 pixels, which distinguishes it."""
    pixels = np.arange(27, dtype="uint8").reshape(1, 3, 3, 3)
    return ops.convert_to_numpy(prepare_pixels(ops.convert_to_tensor(pixels)))
