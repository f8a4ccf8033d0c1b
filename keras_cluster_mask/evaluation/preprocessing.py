"""Preprocesses images and texts for evaluation."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from keras_cluster_mask.data.images import cut_middle, squash
from keras_cluster_mask.data.tokenizers import CLIPTokenizer


def resize_image(
    image: Image.Image, image_size: tuple[int, int], resize: str = "crop"
) -> np.ndarray:
    """Resizes an image as open_clip's evaluation transforms do.

    Interpolation is bicubic and antialiased.

    Args:
        image: `PIL.Image.Image` of any mode.
        image_size: `(height, width)`.
        resize: `"crop"`: the image is resized until it covers `image_size`, and its
            center is cropped, as for CLIP. `"squash"`: the whole image is resized to
            `image_size`, as for SigLIP.

    Returns:
        `(height, width, 3)` uint8 array.
    """
    fitted = (squash if resize == "squash" else cut_middle)(image, image_size)
    # Converted last, as in open_clip, which matters for palettes and transparency.
    return np.array(fitted.convert("RGB"))


def clip_tokenizer(context_length: int | None = None) -> Callable:
    """Returns CLIP's tokenizer, whose vocabulary is installed with open_clip.

    Args:
        context_length: Integer, the context length of the model's text encoder; `None`
            if it takes any.
    """
    return CLIPTokenizer.from_open_clip(context_length or 77)
