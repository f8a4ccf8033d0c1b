"""What is seen through the transparent parts of a picture."""

import numpy as np
from PIL import Image

WHITE = (255, 255, 255)


def check_background(background):
    """`background` as a list of `"random"` and triples of ints, checked."""
    choices = background if isinstance(background, list) else [background]
    checked = [WHITE if choice == "white" else choice for choice in choices]
    for choice in checked:
        if isinstance(choice, str) and choice == "random":
            continue
        colour = choice if isinstance(choice, tuple) else ()
        if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            checked = []
    if not checked:
        raise ValueError(
            '`background` must be "white", "random", a tuple of three ints from 0 to '
            "255 (red, green, blue), or a list of these. "
            f"Received: {background!r}"
        )
    return checked


def composite(picture, background="white", seed=0):
    """A picture with what is transparent laid over a background.

    A cut-out object over one plain colour teaches a model the colour; `"random"` puts
    each behind something else.

    Args:
        picture: uint8 array `(height, width, 4)`, the last channel alpha.
        background: `"white"`, a tuple of three ints from 0 to 255, or `"random"`: a
            plain colour, a soft gradient or a texture, each as likely. Of a list of
            these one is drawn, each as likely as the others.
        seed: int. Equal seeds give equal backgrounds.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    generator = np.random.default_rng(seed)
    choices = check_background(background)
    choice = choices[generator.integers(len(choices))]
    if choice == "random":
        back = random_background(picture.shape[:2], generator)
    else:
        back = np.array(choice, "float32")
    alpha = picture[..., 3:].astype("float32") / 255.0
    return np.round(alpha * picture[..., :3] + (1.0 - alpha) * back).astype("uint8")


def random_background(size, generator):
    """A plain colour, a soft gradient or a texture.

    Args:
        size: pair of ints. Height and width.
        generator: `np.random.Generator`.

    Returns:
        float32 array `(height, width, 3)`, from 0 to 255.
    """
    colour = generator.uniform(0.0, 255.0, 3).astype("float32")

    def noise(rows, columns):
        grid = generator.integers(0, 256, (rows, columns, 3), dtype="uint8")
        stretched = Image.fromarray(grid).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(stretched, "float32")

    kind = generator.integers(3)
    if kind == 0:
        return np.broadcast_to(colour, (*size, 3))
    if kind == 1:
        return noise(*generator.integers(2, 5, 2))
    # From 8 to 32 grains along each side, of anything between faint and full.
    grains = noise(*np.minimum(size, generator.integers(8, 33)))
    return colour + generator.uniform(0.2, 1.0) * (grains - colour)
