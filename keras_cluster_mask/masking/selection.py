"""Functions, shared by strategies, that select patches by scores, noise and ratios."""

import numpy as np
from keras import ops


def order_by_score(score, noise):
    """Returns patch indices from the highest score to the lowest.

    Args:
        score: `(batch, N)` float32 tensor.
        noise: `(batch, N)` float32 tensor. Among equal scores, the larger noise comes
            first.

    Returns:
        `(batch, N)` int32 tensor of indices.
    """
    # `argsort` is stable on all backends (`top_k` is not on torch), so sorting by noise
    # and then by score orders by both.
    by_noise = ops.argsort(-noise, axis=-1)
    by_score = ops.argsort(-ops.take_along_axis(score, by_noise, axis=1), axis=-1)
    return ops.cast(ops.take_along_axis(by_noise, by_score, axis=1), "int32")


def second_draw(noise):
    """Takes a second draw from the lower bits of the noise.

    Args:
        noise: `(batch, N)` float32 tensor in `[0, 1)`.

    Returns:
        `(batch, N)` float32 tensor in `[0, 1)`, independent of the first 12 bits of
        the noise.
    """
    # Exact, so equal on all backends, because 4096 is a power of two.
    scaled = noise * 4096.0
    return scaled - ops.floor(scaled)


def anchor_count(num_patches, ratio):
    """Returns the fraction `ratio` of `num_patches`, rounded up, at least 1."""
    return max(1, num_patches - int(num_patches * (1.0 - ratio) + 1e-6))


def kept_count(num_patches, ratio):
    """Returns how many of `num_patches` are kept if `ratio` is left out, at least 1."""
    # 1e-6 corrects products such as 10 * (1 - 0.9) = 0.99999...
    return max(1, int(num_patches * (1.0 - ratio) + 1e-6))


def check_noise(noise, batch_size, num_patches):
    """Raises an error unless `noise` has one value per patch of each image or view."""
    shape = tuple(noise.shape)
    fits = len(shape) in (2, 3) and shape[-1] == num_patches and 0 not in shape[1:]
    if not fits or (None not in (shape[0], batch_size) and shape[0] != batch_size):
        raise ValueError(
            f"`noise` must have shape ({batch_size or 'batch'}, {num_patches}), one "
            f"value a patch, or ({batch_size or 'batch'}, views, {num_patches}). "
            f"Received: noise.shape={shape}"
        )


def probe_pixels(prepare_pixels):
    """Applies a function to a few uint8 pixels, to compare it with other functions."""
    pixels = np.arange(27, dtype="uint8").reshape(1, 3, 3, 3)
    return ops.convert_to_numpy(prepare_pixels(ops.convert_to_tensor(pixels)))
