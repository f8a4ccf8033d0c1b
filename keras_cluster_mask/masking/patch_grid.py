"""What a masking is called with outside of a model: a patch grid, and tokens."""

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.masking.cluster_masking import (
    ClusterMasking,
    standardize_patch_size,
)


def patch_size_of(masking, patch_size):
    """The sides of a patch, of a masking or, if it has none of its own, as given."""
    own = getattr(masking, "patch_size", None)
    if own is None and patch_size is None:
        raise ValueError(
            f"`patch_size` must be given for a {type(masking).__name__}, which has "
            "none of its own. Received: patch_size=None"
        )
    if patch_size is None:
        return standardize_patch_size(own)
    patch_size = standardize_patch_size(patch_size)
    if own is not None and patch_size != standardize_patch_size(own):
        raise ValueError(
            "`patch_size` must be that of the masking, or None. Received: "
            f"patch_size={patch_size}, masking.patch_size={own}"
        )
    return patch_size


def grid_of(images, masking, patch_size):
    """The rows and columns of patches of each image."""
    shape = tuple(images.shape)
    data_format = getattr(masking, "data_format", keras.config.image_data_format())
    sides = shape[1:3] if data_format == "channels_last" else shape[2:4]
    if len(shape) != 4 or sides[0] % patch_size[0] or sides[1] % patch_size[1]:
        raise ValueError(
            "Images must have rank 4 and sides that `patch_size` "
            f"divides. Received: images.shape={shape}, patch_size={patch_size}, "
            f"data_format='{data_format}'"
        )
    return sides[0] // patch_size[0], sides[1] // patch_size[1]


def tokens_of(images, masking, grid, embed):
    """The tokens that the masking is called with, or `None`."""
    num_patches = grid[0] * grid[1]
    if embed is None:
        if not isinstance(masking, ClusterMasking):
            # To count only: many a masking cannot tell the number from the images.
            num_tokens = (masking.num_prefix_tokens or 0) + num_patches
            return ops.zeros((images.shape[0], num_tokens, 1))
        if masking.embedding_weight != 0.0:
            raise ValueError(
                "`embed` must be given if the masking looks at tokens. Received: "
                f"embed=None, masking.embedding_weight={masking.embedding_weight}"
            )
        return None
    tokens = embed(images)
    if len(tokens.shape) != 3 or tokens.shape[1] < num_patches:
        raise ValueError(
            "`embed` must return tokens (batch, prefix + N, dim) with "
            f"N={num_patches} patches. Received: tokens.shape={tuple(tokens.shape)}"
        )
    return tokens


def check_tokens_do_not_matter(masking, images, tokens):
    """Raises if the masking chooses other patches for other tokens."""
    num_patches = masking.count_patches(images, tokens)
    rng = np.random.default_rng(0)
    noise = rng.random((images.shape[0], num_patches), dtype="float32")
    other = ops.convert_to_tensor(rng.normal(size=tokens.shape).astype("float32"))
    indices, _ = masking.select(images, tokens, noise)
    other_indices, _ = masking.select(images, other, noise)
    if np.any(ops.convert_to_numpy(indices) != ops.convert_to_numpy(other_indices)):
        raise ValueError(
            f"`embed` must be given, as the {type(masking).__name__} looks at tokens. "
            "Received: embed=None"
        )
