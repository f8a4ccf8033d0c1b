"""Bytes to pictures of one size, as people see them."""

import io

import numpy as np
from PIL import Image, ImageOps

from keras_cluster_mask.data.backgrounds import composite
from keras_cluster_mask.data.resizing import resize

# Four bytes each while a picture is decoded: 200 MB.
MAX_PIXELS = 50_000_000
# How many numbers from 0 to 1 a crop and a background take.
NUM_DRAWS = 6
RATIO = 3 / 4, 4 / 3
ORIENTATION = 0x0112


class UnreadablePicture(ValueError):
    """A picture that cannot be had; the message is one of few reasons."""


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


class Picture:
    """An encoded picture: opened, but not decoded before a part of it is asked for.

    JPEG, PNG, WebP, GIF and BMP of any kind of colours; of an animation the first
    picture. It is turned upright as its EXIF tag says.

    Args:
        content: bytes. The file.
        max_pixels: int. How many pixels are decoded at most.

    Raises:
        UnreadablePicture: if it is none.
    """

    def __init__(self, content, max_pixels=MAX_PIXELS):
        try:
            self._image = Image.open(io.BytesIO(content))
            self._orientation = _orientation(self._image)
        except Image.DecompressionBombError as error:
            raise UnreadablePicture("the image has too many pixels") from error
        # Decoders fail in many ways on files that are damaged.
        except Exception as error:
            raise UnreadablePicture("the image does not decode") from error
        self._max_pixels = max_pixels

    @property
    def size(self):
        """(height, width), upright."""
        width, height = self._image.size
        return (width, height) if self._orientation >= 5 else (height, width)

    @property
    def format(self):
        """str. What kind of file it is by its content, such as `"JPEG"`."""
        # A camera's JPEG with further pictures behind the first.
        return "JPEG" if self._image.format == "MPO" else self._image.format

    @property
    def mode(self):
        """str. Pillow's name for the kind of colours, such as `"RGB"`."""
        return self._image.mode

    def whole(self, size):
        """All of the picture in another size, quickly; see `part`."""
        return self.part((0, 0, *self.size), size)

    def part(self, box, size):
        """A part of the picture in another size, quickly.

        A JPEG that is much larger is decoded at 1/2, 1/4 or 1/8 of its size, no smaller
        than `size` asks for.

        Args:
            box: four floats: top, left, height and width of the part, in pixels.
            size: pair of ints. The height and width to return.

        Returns:
            uint8 array `(height, width, 3)`, or 4 with alpha.
        """
        full = self.size
        self._shrink([size[i] * full[i] / box[2 + i] for i in range(2)])
        image = self._decoded()
        scale = [now / before for now, before in zip(image.size[::-1], full)]
        top, left = box[0] * scale[0], box[1] * scale[1]
        # Rounding must not lead beyond the edge.
        bottom = min((box[0] + box[2]) * scale[0], image.size[1])
        right = min((box[1] + box[3]) * scale[1], image.size[0])
        return resize(image, size, (left, top, right, bottom))

    def middle(self, size):
        """The middle of the picture, as CLIP's evaluation cuts it, pixel for pixel.

        The picture is scaled until it just covers `size`, and as much is cut off on
        either side.

        Args:
            size: pair of ints. The height and width to return.

        Returns:
            uint8 array `(height, width, 3)`, or 4 with alpha.
        """
        return np.asarray(cut_middle(self._decoded(), size))

    def _decoded(self):
        """The picture, upright, as RGB or RGBA."""
        if self._image.size[0] * self._image.size[1] > self._max_pixels:
            raise UnreadablePicture("the image has too many pixels")
        try:
            image = _in_eight_bits(self._image)
            return ImageOps.exif_transpose(image) if self._orientation > 1 else image
        except Exception as error:
            raise UnreadablePicture("the image does not decode") from error

    def _shrink(self, wanted):
        if self._orientation >= 5:
            wanted = wanted[::-1]
        self._image.draft(None, (int(wanted[1]), int(wanted[0])))


def _orientation(image):
    """How a camera was held: the EXIF number 1 to 8, 1 for upright or unknown."""
    if "exif" not in image.info and "xmp" not in image.info:
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def _in_eight_bits(image):
    """An image as RGB, or as RGBA where it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits of grey. Pillow itself would cut all off that is above 255.
        levels = np.clip(np.asarray(image, "float32") / 257.0, 0.0, 255.0)
        grey = Image.fromarray(np.round(levels).astype("uint8"))
        grey.info.update({k: v for k, v in image.info.items() if k == "exif"})
        return grey.convert("RGB")
    clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    return image.convert("RGBA" if clear or "transparency" in image.info else "RGB")


def cut_middle(image, size):
    """The middle of an image that is decoded; see `Picture.middle`.

    Args:
        image: `PIL.Image.Image` of any kind of colours.
        size: pair of ints. The height and width to return.

    Returns:
        `PIL.Image.Image` of the same kind.
    """
    (width, height), (rows, columns) = image.size, size
    if height * columns >= width * rows:
        covered = columns * height // width, columns
    else:
        covered = rows, rows * width // height
    if covered[::-1] != image.size:
        image = image.resize(covered[::-1], Image.Resampling.BICUBIC)
    # Rounds halves to even numbers, as torchvision does.
    top, left = round((covered[0] - rows) / 2), round((covered[1] - columns) / 2)
    return image.crop((left, top, left + columns, top + rows))


def random_box(size, image_size, draws, scale=(0.4, 1.0), ratio=RATIO):
    """Where a random part of a picture lies.

    Area and aspect ratio are drawn first (the ratio's logarithm evenly), then the
    place. Where a part of this shape and area does not fit into the picture, the shape
    stays and the area gives way, so nothing is ever distorted beyond `ratio`.

    Args:
        size: pair of ints. Height and width of the picture.
        image_size: pair of ints. Height and width that the part will have.
        draws: four floats from 0 to 1.
        scale: pair of floats. The range of the part's area, in parts of the picture's.
        ratio: pair of floats. The range of the part's width / height, in parts of the
            ratio of `image_size`.

    Returns:
        tuple of top, left, height and width, whole numbers of pixels.
    """
    height, width = size
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
    shape = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
    shape *= image_size[1] / image_size[0]
    crop = (area / shape) ** 0.5, (area * shape) ** 0.5
    fit = min(1.0, height / crop[0], width / crop[1])
    crop = [
        min(max(round(side * fit), 1), whole)
        for side, whole in zip(crop, (height, width))
    ]
    # The places are counted from 0 to size - crop, each as likely as the others.
    top, left = (
        min(int(draw * (whole - side + 1)), whole - side)
        for draw, whole, side in zip(draws[2:4], (height, width), crop)
    )
    return top, left, *crop


class Cutter:
    """Encoded pictures to arrays of one size.

    Args:
        image_size: pair of ints. Height and width.
        training: bool. Whether to cut out a random part or the middle.
        crop_scale: pair of floats. See `random_box`.
        horizontal_flip: bool. Whether to mirror every second picture in training.
        background: See `composite`.
        max_pixels: int. See `Picture`.
    """

    def __init__(
        self,
        image_size,
        training,
        crop_scale=(0.4, 1.0),
        horizontal_flip=False,
        background="white",
        max_pixels=MAX_PIXELS,
    ):
        self.image_size = image_size
        self.training = training
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.background = background
        self.max_pixels = max_pixels

    def __call__(self, content, draws):
        """A picture.

        Args:
            content: bytes. The encoded picture.
            draws: `NUM_DRAWS` floats from 0 to 1: equal ones give equal pictures.

        Returns:
            uint8 array `(height, width, 3)`.

        Raises:
            UnreadablePicture: if it does not decode.
        """
        picture = Picture(content, self.max_pixels)
        if self.training:
            box = random_box(picture.size, self.image_size, draws, self.crop_scale)
            part = picture.part(box, self.image_size)
        else:
            part = picture.middle(self.image_size)
        if part.shape[2] == 4:
            part = composite(part, self.background, seed=int(draws[4] * 2**53))
        if self.training and self.horizontal_flip and draws[5] < 0.5:
            part = part[:, ::-1]
        return part
