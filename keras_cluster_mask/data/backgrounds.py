"""What is seen through the transparent parts of an image, inside a TensorFlow graph."""

try:
    import tensorflow as tf
except ImportError:
    tf = None

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


def composite(image, background="white", seed=None):
    """Any image in three colours, what is transparent laid over a background.

    A cut-out object over one plain colour teaches a model the colour; `"random"` puts
    each behind something else.

    Args:
        image: uint8 tensor `(height, width, channels)` with 1 to 4 channels; the last
            of 2 or 4 is alpha.
        background: `"white"`, a tuple of three ints from 0 to 255, or `"random"`: a
            plain colour, a soft gradient or a texture, each as likely. Of a list of
            these one is drawn, each as likely as the others.
        seed: int tensor `(2,)`, for `"random"` and for lists. Equal seeds give equal
            backgrounds.

    Returns:
        uint8 tensor `(height, width, 3)`.
    """
    choices = check_background(background)
    if seed is None and (len(choices) > 1 or choices[0] == "random"):
        raise ValueError(
            '`seed` is needed for a background="random" and for a list of backgrounds. '
            "Received: None"
        )
    image = tf.convert_to_tensor(image)
    size, channels = tf.shape(image)[:2], tf.shape(image)[2]

    def colours(count):
        # Three from one, or three of however many there are.
        repeats = tf.where(count < 3, 3, 1)
        return tf.tile(image[..., : tf.minimum(count, 3)], [1, 1, repeats])

    def opaque():
        return colours(channels)

    def ground(choice):
        if choice == "random":
            return random_background(size, seed)
        return tf.broadcast_to(
            tf.constant(choice, "float32"), tf.concat([size, [3]], 0)
        )

    def blended():
        front = tf.cast(colours(channels - 1), "float32")
        alpha = tf.cast(image[..., -1:], "float32") / 255.0
        if len(choices) == 1:
            back = ground(choices[0])
        else:
            draw = tf.random.stateless_uniform(
                (), seed + [0, 3], 0, len(choices), "int32"
            )
            back = tf.switch_case(draw, [lambda c=c: ground(c) for c in choices])
        return tf.cast(tf.round(alpha * front + (1.0 - alpha) * back), "uint8")

    return tf.ensure_shape(tf.cond(channels % 2 == 0, blended, opaque), (None, None, 3))


def random_background(size, seed):
    """A plain colour, a soft gradient or a texture, float32 from 0 to 255.

    Args:
        size: int tensor `(2,)`. Height and width.
        seed: int tensor `(2,)`.

    Returns:
        float32 tensor `(height, width, 3)`.
    """
    draws = tf.random.stateless_uniform((3,), seed)
    colour = tf.random.stateless_uniform((3,), seed + [0, 1], maxval=255.0)

    def noise(cells):
        grid = tf.random.stateless_uniform(tf.concat([cells, [3]], 0), seed + [0, 2])
        return tf.image.resize(255.0 * grid, size, method="bilinear")

    def plain():
        return tf.broadcast_to(colour, tf.concat([size, [3]], 0))

    def gradient():
        return noise(2 + tf.cast(draws[1] * [3.0, 3.0], "int32"))

    def texture():
        # From 8 to 32 grains along each side, of anything between faint and full.
        grains = noise(tf.minimum(size, 8 + tf.cast(draws[1] * [25.0, 25.0], "int32")))
        strength = 0.2 + 0.8 * draws[2]
        return colour + strength * (grains - colour)

    kind = tf.cast(draws[0] * 3.0, "int32")
    return tf.switch_case(kind, [plain, gradient, texture])
