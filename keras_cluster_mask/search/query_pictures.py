"""Pictures to search for, whatever they come as."""

import io
import os

import keras
import numpy as np
from PIL import Image, ImageOps

from keras_cluster_mask.data import files
from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import NUM_DRAWS, Cutter, UnreadablePicture

# What a PNG file holds as it is.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def encode_picture(image):
    """A picture as a file's bytes, so that all are read in the same way.

    Args:
        image: The path of a picture, a `PIL.Image.Image`, or a `(H, W)` or `(H, W, C)`
            uint8 array.

    Returns:
        bytes.

    Raises:
        FileNotFoundError: If there is no picture at the path.
        UnreadablePicture: If the file cannot be read.
        ValueError: For anything else.
    """
    if isinstance(image, str | os.PathLike):
        path = os.path.expanduser(image)
        if not files.exists(path):
            raise FileNotFoundError(
                f"`images` must be pictures that are there. Received: {image}"
            )
        return read_image(path)
    if isinstance(image, np.ndarray) and image.dtype == "uint8" and image.size:
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[..., 0]
        if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)):
            image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        shape = getattr(image, "shape", None)
        raise ValueError(
            "`images` must be paths, PIL images or uint8 arrays of shape (H, W, C). "
            f"Received: {type(image).__name__}"
            + (f" of shape {shape}, {image.dtype}" if shape is not None else "")
        )
    file = io.BytesIO()
    # A file that was opened, but not turned upright, would lose the note to do so.
    image = ImageOps.exif_transpose(image)
    image = image if image.mode in PNG_MODES else image.convert("RGB")
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def cut_picture(image, image_size):
    """The middle of a picture, as evaluation cuts it.

    Args:
        image: As for `encode_picture`.
        image_size: `(height, width)`.

    Returns:
        uint8 array `(height, width, 3)`.

    Raises:
        FileNotFoundError: If there is no picture at a path.
        ValueError: For what cannot be read.
    """
    cut = Cutter(tuple(image_size), training=False)
    try:
        return cut(encode_picture(image), np.zeros(NUM_DRAWS))
    except UnreadablePicture as error:
        raise ValueError(
            f"`images` must be pictures that can be read ({error}). Received: {image}"
        ) from error


def as_model_input(images):
    """`(batch, height, width, 3)` images with channels where Keras has them."""
    if keras.config.image_data_format() == "channels_first":
        return np.moveaxis(images, -1, 1)
    return images
