"""The grid of patches of an image: its rows and columns, and counts of patches."""

import math

import keras

from keras_cluster_mask.checks import sides_of


def is_channels_first(data_format: str | None = None) -> bool:
    """Returns whether images are `(..., C, H, W)`. Defaults to Keras's setting."""
    return (data_format or keras.config.image_data_format()) == "channels_first"


def height_and_width(shape: tuple, data_format: str | None = None) -> tuple:
    """Returns the height and width of a shape with or without the batch."""
    return shape[-2:] if is_channels_first(data_format) else shape[-3:-1]


def grid_shape(
    shape: tuple, patch_size: tuple[int, int], data_format: str | None = None
) -> tuple[int, int]:
    """Returns the rows and columns of patches of each image.

    Args:
        shape: The shape of a batch of images.
        patch_size: `(height, width)` in pixels.
        data_format: `"channels_last"`, `"channels_first"` or `None`.

    Raises:
        ValueError: If the shape does not have four axes, or a side is unknown or not
            divisible by the patch size.
    """
    sides, shape = _sides(shape, data_format), tuple(shape)
    for name, side, patch in zip(("height", "width"), sides, patch_size):
        if side is None or side % patch:
            raise ValueError(
                f"The {name} of `images` must be known and divisible by the patch "
                f"{name} {patch}. Received: {name}={side}, images.shape={shape}, "
                f"data_format={data_format or keras.config.image_data_format()!r}"
            )
    return sides[0] // patch_size[0], sides[1] // patch_size[1]


def grid_of_square_patches(
    num_patches: int, shape: tuple | None = None, data_format: str | None = None
) -> tuple[int, int]:
    """Infers the rows and columns of square patches from their number.

    Args:
        num_patches: Integer, the number of patches of an image.
        shape: The shape of a batch of images. `None` assumes square images.
        data_format: `"channels_last"`, `"channels_first"` or `None`.

    Raises:
        ValueError: If a side of the images is unknown, or if that number of square
            patches does not fill them.
    """
    height, width = (1, 1) if shape is None else _sides(shape, data_format)
    if None not in (height, width):
        rows = math.isqrt(num_patches * height // width)
        is_square = rows * rows * width == num_patches * height
        if rows and is_square and num_patches % rows == 0:
            return rows, num_patches // rows
    image = "a square image" if shape is None else f"{height} x {width} pixels"
    raise ValueError(
        "`grid` must be given as `(rows, columns)`, because it cannot be inferred from "
        f"{num_patches} square patches and {image}. Received: grid=None, "
        f"num_patches={num_patches}, images.shape={shape and tuple(shape)}"
    )


def _sides(shape, data_format):
    if len(shape) != 4:
        raise ValueError(
            "`images` must have rank 4, (batch, height, width, channels) or "
            f"channels first. Received: images.shape={tuple(shape)}"
        )
    return height_and_width(shape, data_format)


def standardize_grid(grid) -> tuple[int, int] | None:
    """Returns `(rows, columns)` of patches as a tuple, or `None`."""
    return None if grid is None else sides_of("grid", grid, "None, a positive integer")
