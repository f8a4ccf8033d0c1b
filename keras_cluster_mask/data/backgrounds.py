"""Backgrounds for transparent images."""

import numpy as np
from PIL import Image

from keras_cluster_mask.checks import check_choice

CHOICES = "white", "random"


def check_background(background):
    """Checks `background`, and returns a list of `CHOICES`, for `composite`."""
    is_list = isinstance(background, list | tuple) and background
    choices = background if is_list else [background]
    for choice in choices:
        check_choice("background", choice, CHOICES)
    return choices


def composite(image, choices, seed=0):
    """Blends a transparent image with a background.

    With one plain color behind every cut-out object, a model may learn the color;
    `"random"` draws a different background for each image.

    Args:
        image: uint8 array `(height, width, 4)`. The last channel is alpha.
        choices: list of `"white"` and `"random"`, from which one is drawn with equal
            probability. `"random"` is a plain color, a gradient or a texture.
        seed: int. Equal seeds give equal backgrounds.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    generator = np.random.default_rng(seed)
    is_random = choices[generator.integers(len(choices))] == "random"
    back = random_background(image.shape[:2], generator) if is_random else 255.0
    alpha = image[..., 3:].astype("float32") / 255.0
    return np.round(alpha * image[..., :3] + (1.0 - alpha) * back).astype("uint8")


def random_background(size, generator):
    """Draws a plain color, a gradient or a texture.

    Args:
        size: Pair of ints. Height and width.
        generator: `np.random.Generator`.

    Returns:
        float32 array `(height, width, 3)`, from 0 to 255.
    """
    color = generator.uniform(0.0, 255.0, 3).astype("float32")

    def noise(rows, columns):
        grid = generator.integers(0, 256, (rows, columns, 3), dtype="uint8")
        stretched = Image.fromarray(grid).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(stretched, "float32")

    kind = generator.integers(3)
    if kind == 0:
        return np.broadcast_to(color, (*size, 3))
    if kind == 1:
        return noise(*generator.integers(2, 5, 2))
    # From 8 to 32 grains along each side, with a contrast of 0.2 to 1.
    grains = noise(*np.minimum(size, generator.integers(8, 33)))
    return color + generator.uniform(0.2, 1.0) * (grains - color)
