"""What evaluation does to one image, and to texts, before a model sees them."""

import functools
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.data.images import cut_middle, squash
from keras_cluster_mask.data.tokenizers import CLIPTokenizer
from keras_cluster_mask.data.tokenizing import tokenize


def resize_image(
    image: Image.Image, image_size: tuple[int, int], resize: str = "crop"
) -> np.ndarray:
    """Resizes an image as open_clip's evaluation transforms do.

    Bicubic, antialiased.

    Args:
        image: `PIL.Image.Image` of any mode.
        image_size: `(height, width)`.
        resize: `"crop"`: the image is resized until it covers `image_size`, and its
            center is cropped, as for CLIP. `"squash"`: the whole image is resized to
            `image_size`, as for SigLIP.

    Returns:
        `(height, width, 3)` uint8 array.

    Raises:
        ValueError: For another value of `resize`.
    """
    check_resize(resize)
    fitted = (squash if resize == "squash" else cut_middle)(image, image_size)
    # In this order, in which open_clip treats palettes and transparency too.
    return np.array(fitted.convert("RGB"))


def check_resize(resize: str) -> None:
    """Raises an error unless there is such a way to resize."""
    check_choice("resize", resize, ("crop", "squash"))


def load_tokenizer(
    tokenizer: Callable | str | os.PathLike | None = None,
    context_length: int | None = None,
) -> Callable:
    """What turns texts into the ids that a model takes.

    Args:
        tokenizer: A tokenizer; the path of a file that `CLIPTokenizer.save` wrote; or
            `None` for CLIP's own, whose vocabulary comes with open_clip.
        context_length: Integer, the length that the model's text encoder takes; `None`
            if it takes any.

    Returns:
        A function from a list of texts to a `(texts, T)` int32 array.
    """
    if tokenizer is None:
        tokenizer = CLIPTokenizer.from_open_clip(context_length or 77)
    elif isinstance(tokenizer, str | os.PathLike):
        tokenizer = CLIPTokenizer.from_file(tokenizer, context_length)
    return functools.partial(tokenize, tokenizer, context_length=context_length)
