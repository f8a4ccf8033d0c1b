"""Where the axes of images are, and how many patches they have."""

import keras


def is_channels_first(data_format: str | None = None) -> bool:
    """Whether images are `(..., C, H, W)`; by default as Keras is configured."""
    return (data_format or keras.config.image_data_format()) == "channels_first"


def height_and_width(shape: tuple, data_format: str | None = None) -> tuple:
    """The sides of images, from a shape with or without the batch."""
    return shape[-2:] if is_channels_first(data_format) else shape[-3:-1]


def grid_shape(
    shape: tuple, patch_size: tuple[int, int], data_format: str | None = None
) -> tuple[int, int]:
    """The rows and columns of patches of each image.

    Args:
        shape: The shape of a batch of images.
        patch_size: `(height, width)` in pixels.
        data_format: `"channels_last"`, `"channels_first"` or `None`.

    Raises:
        ValueError: If the shape has no four axes, or a side is not known or not
            divisible by that of a patch.
    """
    shape = tuple(shape)
    if len(shape) != 4:
        raise ValueError(
            "`images` must have rank 4, (batch, height, width, channels) or "
            f"channels first. Received: images.shape={shape}"
        )
    sides = height_and_width(shape, data_format)
    for name, side, patch in zip(("height", "width"), sides, patch_size):
        if side is None or side % patch:
            raise ValueError(
                f"The {name} of `images` must be known and divisible by the patch "
                f"{name} {patch}. Received: {name}={side}, images.shape={shape}, "
                f"data_format={data_format or keras.config.image_data_format()!r}"
            )
    return sides[0] // patch_size[0], sides[1] // patch_size[1]


def standardize_patch_size(patch_size) -> tuple[int, int]:
    """The sides of a patch, `(height, width)`, from one integer or two."""
    sides = (patch_size,) * 2 if isinstance(patch_size, int) else patch_size
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(
            "`patch_size` must be a positive integer or a tuple of two. "
            f"Received: patch_size={patch_size}"
        )
    return tuple(sides)
