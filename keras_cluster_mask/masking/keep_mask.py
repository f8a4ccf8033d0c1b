"""Computes which patches a masking keeps, for statistics and plots."""

import math

import numpy as np
from keras import ops

from keras_cluster_mask.masking.patch_grid import standardize_patch_size


def patch_size_of(masking, patch_size):
    """Returns the patch size of the masking or, if it has none, the given one."""
    own = masking.patch_size
    if own is None and patch_size is None:
        raise ValueError(
            f"`patch_size` must be given for a {type(masking).__name__}, which has "
            "none of its own. Received: patch_size=None"
        )
    if own is None or patch_size is None:
        return standardize_patch_size(own or patch_size)
    patch_size = standardize_patch_size(patch_size)
    if patch_size != standardize_patch_size(own):
        raise ValueError(
            "`patch_size` must be that of the masking, or None. Received: "
            f"patch_size={patch_size}, masking.patch_size={own}"
        )
    return patch_size


def masking_inputs(masking, images, grid, embed):
    """Returns the pixels and the tokens that a masking gets in training.

    Args:
        masking: A `PatchMasking`.
        images: Array of images.
        grid: Tuple `(rows, columns)` of their patches.
        embed: Function from pixels to tokens. `None` uses zeros, which define only the
            number of tokens.

    Raises:
        ValueError: If the masking has another grid or needs `embed`, or if `embed`
            returns tokens of a wrong shape.
    """
    if masking.grid not in (None, grid):
        raise ValueError(
            f"`grid` of the {type(masking).__name__} must be that of the patches of "
            f"`images`, {grid}, or None. Received: grid={masking.grid}, "
            f"images.shape={images.shape}"
        )
    pixels = masking.prepare_pixels(ops.convert_to_tensor(images))
    num_patches = math.prod(grid)
    if embed is None:
        # A schedule may start at 0, where tokens have no influence yet.
        if getattr(masking, "embedding_weight", 0.0) != 0.0:
            _refuse_to_go_without_tokens(masking)
        num_tokens = (masking.num_prefix_tokens or 0) + num_patches
        return pixels, ops.zeros((len(images), num_tokens, 1))
    tokens = embed(pixels)
    if len(tokens.shape) != 3 or tokens.shape[1] < num_patches:
        raise ValueError(
            "`embed` must return tokens (batch, prefix + N, dim) with "
            f"N={num_patches} patches. Received: tokens.shape={tuple(tokens.shape)}"
        )
    return pixels, tokens


def check_tokens_do_not_matter(masking, pixels, tokens, noise):
    """Raises an error if the masking selects other patches for other tokens."""
    values = np.random.default_rng(0).normal(size=tokens.shape)
    other = ops.convert_to_tensor(values.astype("float32"))
    kept = [keep_mask(masking, pixels, each, noise) for each in (tokens, other)]
    if np.any(kept[0] != kept[1]):
        _refuse_to_go_without_tokens(masking)


def _refuse_to_go_without_tokens(masking):
    raise ValueError(
        f"`embed` must be given, as the {type(masking).__name__} looks at tokens. "
        "Received: embed=None"
    )


def keep_mask(masking, pixels, tokens, noise):
    """Returns `(batch, N)` booleans, true for patches that are kept and visible."""
    indices, visible = masking.select(pixels, tokens, noise)
    kept = np.zeros(tuple(noise.shape), dtype=bool)
    np.put_along_axis(
        kept, ops.convert_to_numpy(indices), ops.convert_to_numpy(visible), axis=1
    )
    return kept
