"""What evaluation does to one image, and to texts, before a model sees them."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from keras_cluster_mask.data import tokenizing
from keras_cluster_mask.data.arguments import check_choice
from keras_cluster_mask.data.images import cut_middle, squash
from keras_cluster_mask.data.tokenizers import CLIPTokenizer


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
    """The tokenizer of a model.

    Args:
        tokenizer: A tokenizer; the path of a file that `CLIPTokenizer.save` wrote; or
            `None` for CLIP's own, whose vocabulary comes with open_clip.
        context_length: Integer, the length that the model's text encoder takes; `None`
            if it takes any.

    Returns:
        A function from a list of texts to ids.
    """
    if tokenizer is None:
        return CLIPTokenizer.from_open_clip(context_length or 77)
    if isinstance(tokenizer, str | os.PathLike):
        return CLIPTokenizer.from_file(tokenizer, context_length)
    return tokenizer


def tokenize(
    tokenizer: Any,
    texts: Sequence[str | bytes],
    context_length: int | None = None,
    vocabulary_size: int | None = None,
) -> np.ndarray:
    """Turns texts into ids, and checks that they fit a model.

    Args:
        tokenizer: A function from a list of texts to `(texts, T)` ids, or a Keras
            layer.
        texts: List of str or bytes.
        context_length: Integer, the T of the model; `None` if it takes any.
        vocabulary_size: Integer, the number of ids that the model knows, or `None`.

    Returns:
        `(texts, T)` int32 array.

    Raises:
        ValueError: If the ids do not fit the model.
    """
    ids = tokenizing.tokenize(tokenizer, texts, context_length)
    if context_length is not None and ids.shape[1] != context_length:
        raise ValueError(
            "`tokenizer` must return ids of the length that the model's text encoder "
            f"takes, {context_length}. Received: ids of shape {ids.shape}"
        )
    if vocabulary_size is not None and ids.size:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= vocabulary_size:
            raise ValueError(
                "`tokenizer` must be the one that the model was trained with, whose "
                f"text encoder knows the ids 0 to {vocabulary_size - 1}. "
                f"Received: ids from {low} to {high}"
            )
    return ids
