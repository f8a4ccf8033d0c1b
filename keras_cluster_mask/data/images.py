"""Decodes, crops and resizes images."""

import contextlib
import dataclasses
import io
import math
import threading
from collections.abc import Callable

import cykooz_resizer as simd
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keras_cluster_mask.checks import check_choice, sides_of

CROP_SCALE = 0.4, 1.0
# The range of the aspect ratio of a crop, width / height, relative to the resized crop.
RATIO = 3 / 4, 4 / 3
ORIENTATION = 0x0112
CHANNELS_FIRST = "channels_first"
TOO_LARGE = "the image has too many pixels"
NO_LEVELS = "the gray levels are not integers from 0 to 255"
NO_HEIC = "HEIC needs the package pillow-heif: pip install pillow-heif"
# How HEIC files start, after the size of their first box.
HEIC = tuple(
    b"ftyp" + brand
    for brand in (
        *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
        *(b"mif1", b"msf1"),
    )
)
_thread = threading.local()


class UnreadableImage(ValueError):
    """An image that cannot be read. The message is one of a few fixed reasons."""


class EncodedImage:
    """An encoded image, decoded when a part of it is read.

    Supports JPEG, PNG, WebP, GIF and BMP in any color mode, HEIC with the package
    pillow-heif, and the first frame of animations. The EXIF orientation is applied.

    Args:
        content: Bytes of the file, or a `PIL.Image.Image`, which may change.
        max_pixels: Integer. The largest number of pixels that is decoded. `None` is no
            limit.

    Attributes:
        size: Pair of integers. Height and width, with the EXIF orientation applied.

    Raises:
        UnreadableImage: If the bytes are not an image, or a PNG does not decode.
    """

    def __init__(self, content, max_pixels):
        self._image = content
        self._max_pixels = math.inf if max_pixels is None else max_pixels
        with decoding():
            if not isinstance(content, Image.Image):
                try:
                    self._image = Image.open(io.BytesIO(content))
                except UnidentifiedImageError:
                    if content[4:12] not in HEIC:
                        raise
                    self._image = open_heic(content)
            # The orientation of a PNG may come after its pixels.
            if self._image.format == "PNG":
                self.check_pixels()
                self._image.load()
            self._orientation = 1
            # Pillow decodes an image without EXIF data in search of it.
            if "exif" in self._image.info or "xmp" in self._image.info:
                with contextlib.suppress(Exception):
                    value = self._image.getexif().get(ORIENTATION)
                    self._orientation = value if value in range(1, 9) else 1
            width, height = self._image.size
            is_upright = self._orientation < 5
            self.size = (height, width) if is_upright else (width, height)

    def check_pixels(self):
        """Raises `UnreadableImage` if the image has too many pixels."""
        if math.prod(self._image.size) > self._max_pixels:
            raise UnreadableImage(TOO_LARGE)

    def part(self, box, size):
        """Returns a part of the image, resized.

        A JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its
        size, which is faster.

        Args:
            box: Four floats: top, left, height and width of the part, in pixels.
            size: Pair of integers. The height and width of the result.

        Returns:
            uint8 array `(height, width, 3)`.
        """
        wanted = [int(size[i] * self.size[i] / box[2 + i]) for i in range(2)]
        # In place of a HEIC, its thumbnail would be decoded, with more artifacts.
        if self._image.format != "HEIF":
            # Pillow expects (width, height), before the orientation is applied.
            self._image.draft(None, wanted if self._orientation >= 5 else wanted[::-1])
        image = self.decoded()
        scale = [now / before for now, before in zip(image.size[::-1], self.size)]
        top, left = box[0] * scale[0], box[1] * scale[1]
        # Rounding must not move the box past the edge.
        bottom = min((box[0] + box[2]) * scale[0], image.size[1])
        right = min((box[1] + box[3]) * scale[1], image.size[0])
        return resize(image, size, (left, top, right, bottom))

    def decoded(self):
        """Returns a `PIL.Image.Image` in RGB, with the orientation applied.

        Transparent pixels become white.
        """
        with decoding():
            self.check_pixels()
            self._image.load()
            image = self._image
            if self._orientation > 1:
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                values = np.asarray(image)
                # Pillow would clip the values of 16 bits to 255.
                is_16_bit = image.mode.startswith("I;16")
                levels = np.round(values / 257.0) if is_16_bit else values
                gray = np.clip(np.nan_to_num(levels), 0, 255).astype("uint8")
                is_exact = np.array_equal(gray, levels)
                # Floats up to 1 would become black.
                if not is_exact or (image.mode == "F" and gray.max() < 2):
                    raise UnreadableImage(NO_LEVELS)
                image = Image.fromarray(gray)
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGB", image.size, "white")
                white.paste(image, mask=image)
                image = white
            # A conversion to the same mode would copy the image.
            return image if image.mode == "RGB" else image.convert("RGB")


def open_heic(content):
    """Opens a HEIC with the package pillow-heif, imported for the first one.

    The package turns images upright itself, and sets their EXIF orientation to 1.

    Args:
        content: Bytes of the file.

    Raises:
        UnreadableImage: If the package is not installed.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise UnreadableImage(NO_HEIC) from error
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(content))


@contextlib.contextmanager
def decoding():
    """Raises `UnreadableImage` for the many kinds of errors that decoders raise."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(TOO_LARGE) from error
    except Exception as error:
        raise UnreadableImage("the image cannot be decoded") from error


def resize(image, size, box):
    """Resizes a part of an image by bicubic interpolation with antialiasing.

    The SIMD instructions of cykooz-resizer take a third of Pillow's time. It sums rows
    and columns in a different order, so one pixel in seven of a photograph differs,
    mostly by one level.

    Args:
        image: `PIL.Image.Image` in RGB.
        size: Pair of integers. Height and width of the result.
        box: Four floats: left, top, right and bottom of the part, in pixels.

    Returns:
        uint8 array `(height, width, 3)`.
    """
    left, top, right, bottom = box
    options = simd.ResizeOptions(
        # The bicubic kernel with a = -0.5, as in Pillow.
        resize_alg=simd.ResizeAlg.convolution(simd.FilterType.catmull_rom),
        crop_box=simd.CropBox(left, top, right - left, bottom - top),
    )
    pixels = simd.PixelType.U8x3
    # Unlike Pillow's images, these are resized without holding the GIL.
    source = simd.ImageData(image.width, image.height, pixels, image.tobytes())
    target = simd.ImageData(size[1], size[0], pixels)
    if not hasattr(_thread, "resizer"):
        _thread.resizer = simd.Resizer()
    _thread.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), "uint8").reshape(*size, 3)


def fitted(image, size, resize):
    """Resizes an image as CLIP's or SigLIP's evaluation does, identical in every pixel.

    For CLIP, the shorter side of the image is resized to fit `size`, and the longer
    side is cropped equally at both ends. For SigLIP, the whole image is resized;
    `EncodedImage.part` is faster and differs by rounding.

    Args:
        image: `PIL.Image.Image` in any color mode.
        size: Pair of integers. The height and width of the result.
        resize: `"crop"`, or `"squash"` for SigLIP.

    Returns:
        `PIL.Image.Image` in the same mode.
    """
    if resize == "squash":
        return image.resize(size[::-1], Image.Resampling.BICUBIC)
    (width, height), (rows, columns) = image.size, size
    if height * columns >= width * rows:
        covered = columns * height // width, columns
    else:
        covered = rows, rows * width // height
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(covered) > limit:
        raise UnreadableImage("the image is too narrow")
    if covered[::-1] != image.size:
        image = image.resize(covered[::-1], Image.Resampling.BICUBIC)
    # Halves are rounded to even numbers, as in torchvision.
    top, left = round((covered[0] - rows) / 2), round((covered[1] - columns) / 2)
    return image.crop((left, top, left + columns, top + rows))


def random_box(size, image_size, draws, scale=CROP_SCALE):
    """Draws the box of a random crop.

    The area and the aspect ratio are drawn first (the ratio log-uniformly), then the
    position. If the crop does not fit into the image, its area is reduced and its
    aspect ratio is kept, so that no crop is distorted beyond `RATIO`.

    Args:
        size: Pair of integers. Height and width of the image.
        image_size: Pair of integers. Height and width of the resized crop.
        draws: Four floats from 0 to 1.
        scale: Pair of floats. The range of the crop's area, as a fraction of the
            image's area.

    Returns:
        Tuple of integers: top, left, height and width, in pixels.
    """
    height, width = size
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
    shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** draws[1]
    shape *= image_size[1] / image_size[0]
    crop = (area / shape) ** 0.5, (area * shape) ** 0.5
    fit = min(1.0, height / crop[0], width / crop[1])
    crop = [min(max(round(side * fit), 1), whole) for side, whole in zip(crop, size)]
    # The positions from 0 to size - crop are equally likely.
    top, left = (
        min(int(draw * (whole - side + 1)), whole - side)
        for draw, whole, side in zip(draws[2:4], size, crop)
    )
    return top, left, *crop


@dataclasses.dataclass
class Images:
    """Turns encoded images into arrays of one size. See `image_text_dataset`.

    Args:
        image_size: Integer, or pair of integers. Height and width; a pair as an
            attribute.
        training: Boolean. Whether crops are random.
        resize: `"crop"`, a random crop in training and a center crop in evaluation; or
            `"squash"`, the whole image.
        crop_scale: Pair of floats. See `random_box`.
        image_transform: Function of an image and a `np.random.Generator` for training,
            or `None`.
        data_format: `"channels_last"` or `"channels_first"`, for batches.

    Attributes:
        shape: The shape of an image in a batch.
        max_pixels: Integer, or `None`. `PIL.Image.MAX_IMAGE_PIXELS` when the object was
            made, also in a worker process.
    """

    image_size: int | tuple
    training: bool
    resize: str = "crop"
    crop_scale: tuple | None = None
    image_transform: Callable | None = None
    data_format: str = "channels_last"

    def __post_init__(self):
        self.image_size = sides_of("image_size", self.image_size)
        check_choice("resize", self.resize, ("crop", "squash"))
        self.max_pixels = Image.MAX_IMAGE_PIXELS
        is_first = self.data_format == CHANNELS_FIRST
        self.shape = (3, *self.image_size) if is_first else (*self.image_size, 3)
        if self.image_transform is not None and not self.training:
            raise ValueError(
                "`image_transform` must be None in evaluation, where images are not "
                f"augmented. Received: image_transform={self.image_transform}, "
                "training=False"
            )
        if self.resize == "squash" or not self.training:
            if self.crop_scale is not None:
                raise ValueError(
                    "`crop_scale` must be None with `resize='squash'` and in "
                    "evaluation, because no random crops are taken. Received: "
                    f"crop_scale={self.crop_scale}, resize={self.resize!r}, "
                    f"training={self.training}"
                )
            return
        if self.crop_scale is None:
            self.crop_scale = CROP_SCALE
        low, high = self.crop_scale if np.size(self.crop_scale) == 2 else (0, 0)
        if not 0 < low <= high <= 1:
            raise ValueError(
                "`crop_scale` must be two floats (low, high) with 0 < low <= high <= "
                f"1. Received: crop_scale={self.crop_scale}"
            )

    def __call__(self, content, generator):
        """Decodes and crops an image.

        Args:
            content: Bytes of the encoded image, or a `PIL.Image.Image`.
            generator: `np.random.Generator`. Equal states give equal crops.

        Returns:
            uint8 array `shape`.

        Raises:
            UnreadableImage: If the image cannot be decoded.
        """
        image = EncodedImage(content, self.max_pixels)
        if not self.training:
            part = np.asarray(fitted(image.decoded(), self.image_size, self.resize))
        else:
            box = (0, 0, *image.size)
            if self.resize == "crop":
                draws = generator.random(4)
                box = random_box(image.size, self.image_size, draws, self.crop_scale)
            part = image.part(box, self.image_size)
        if self.image_transform is not None and self.training:
            # A part may be read-only.
            part = np.array(part)
            shape, dtype = part.shape, part.dtype
            part = np.asarray(self.image_transform(part, generator))
            if part.shape != shape or part.dtype != dtype:
                raise ValueError(
                    "`image_transform` must return an image of the same shape and "
                    f"dtype as its input, uint8 {shape}. Received: {part.dtype} "
                    f"{part.shape}"
                )
        return part.transpose(2, 0, 1) if self.data_format == CHANNELS_FIRST else part
