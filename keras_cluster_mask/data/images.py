"""Bytes to pictures of one size, inside a TensorFlow graph."""

import struct

try:
    import tensorflow as tf
except ImportError:
    tf = None


def height_and_width(image_size):
    """`image_size`, one int for a square or two, as a checked pair."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = tuple(size) if isinstance(size, tuple | list) else ()
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            "`image_size` must be a positive int, or a pair of them (height, width). "
            f"Received: {image_size}"
        )
    return size


def decode(content):
    """Decodes a JPEG, PNG, WebP, GIF or BMP of any number of channels.

    Args:
        content: scalar string tensor. The file's bytes.

    Returns:
        uint8 tensor `(height, width, channels)`; 1 channel is grey, 2 grey and alpha,
        3 colour, 4 colour and alpha. Of an animation it is the first picture.
    """
    image = tf.cond(
        tf.io.is_jpeg(content),
        # The exact transform costs nothing; the default is off by up to ten levels.
        lambda: tf.io.decode_jpeg(content, channels=0, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(content, channels=0, expand_animations=False),
    )
    return tf.ensure_shape(image, (None, None, None))


def exif_orientation(content):
    """How a camera says it was held: the EXIF number 1 to 8, 1 for upright or unknown.

    Args:
        content: bytes. The file. Only JPEG files are looked into.

    Returns:
        int.
    """
    start = content.find(b"Exif\0\0", 0, 65536) if content[:2] == b"\xff\xd8" else -1
    if start < 0:
        return 1
    tags = content[start + 6 : start + 6 + 65536]
    order = "<" if tags[:2] == b"II" else ">"
    try:
        (position,) = struct.unpack_from(order + "I", tags, 4)
        (count,) = struct.unpack_from(order + "H", tags, position)
        for entry in range(position + 2, position + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tags, entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def upright(image, orientation):
    """Turns an image as its EXIF orientation, a scalar int tensor, asks for."""

    def turned():
        turn = tf.where(orientation >= 5, [1, 0, 2], [0, 1, 2])
        mirror_rows = tf.reduce_any(orientation == [3, 4, 7, 8])
        mirror_columns = tf.reduce_any(orientation == [2, 3, 6, 7])
        steps = tf.where(tf.stack([mirror_rows, mirror_columns]), -1, 1)
        return tf.transpose(image, turn)[:: steps[0], :: steps[1]]

    return tf.cond(orientation > 1, turned, lambda: image)


def random_resized_crop(
    image, image_size, seed, scale=(0.4, 1.0), ratio=(3 / 4, 4 / 3), flip=False
):
    """A random part of an image, resized.

    Area and aspect ratio are drawn first (the ratio's logarithm evenly), then the
    place. Where a part of this shape and area does not fit into the image, the shape
    stays and the area gives way, so nothing is ever distorted beyond `ratio`.

    Args:
        image: uint8 tensor `(height, width, channels)`.
        image_size: int or `(height, width)`. The size to return.
        seed: int tensor `(2,)`. Equal seeds give equal crops.
        scale: pair of floats. The range of the part's area, in parts of the image's.
        ratio: pair of floats. The range of the part's width / height, in parts of the
            ratio of `image_size`.
        flip: bool. Whether to mirror every second image left to right. Captions may
            say left or right. Defaults to `False`.

    Returns:
        uint8 tensor `(image_size[0], image_size[1], channels)`.
    """
    height, width = height_and_width(image_size)
    size = tf.cast(tf.shape(image)[:2], "float32")
    area, shape, top, left, side = tf.unstack(tf.random.stateless_uniform((5,), seed))
    area = size[0] * size[1] * (scale[0] + area * (scale[1] - scale[0]))
    shape = ratio[0] * (ratio[1] / ratio[0]) ** shape * (width / height)
    crop = tf.sqrt(tf.stack([area / shape, area * shape]))
    crop = crop * tf.minimum(1.0, tf.reduce_min(size / crop))
    crop = tf.clip_by_value(tf.round(crop), 1.0, size)
    # The places are counted from 0 to size - crop, each as likely as the others.
    place = tf.floor(tf.stack([top, left]) * (size - crop + 1.0))
    place = tf.minimum(place, size - crop)
    place, crop = tf.cast(place, "int32"), tf.cast(crop, "int32")
    part = tf.slice(image, [place[0], place[1], 0], [crop[0], crop[1], -1])
    part = _resize(part, (height, width))
    if flip:
        part = tf.where(side < 0.5, part[:, ::-1], part)
    return part


def center_crop(image, image_size):
    """The middle of an image, resized so that it just covers `image_size`.

    The same as CLIP's evaluation transform: bicubic with antialiasing.

    Args:
        image: uint8 tensor `(height, width, channels)`.
        image_size: int or `(height, width)`. The size to return.

    Returns:
        uint8 tensor `(image_size[0], image_size[1], channels)`.
    """
    height, width = height_and_width(image_size)
    shape = tf.cast(tf.shape(image), "int64")
    covered = tf.cond(
        shape[0] * width >= shape[1] * height,
        lambda: tf.stack([width * shape[0] // shape[1], width]),
        lambda: tf.stack([height, height * shape[1] // shape[0]]),
    )
    covered = tf.cast(covered, "int32")
    image = _resize(image, covered)
    # Rounds halves to even numbers, as torchvision does.
    place = tf.round(tf.cast(covered - [height, width], "float32") / 2.0)
    place = tf.cast(place, "int32")
    return tf.slice(image, [place[0], place[1], 0], [height, width, -1])


def _resize(image, size):
    image = tf.image.resize(image, size, method="bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), "uint8")
