"""Bicubic resizing of images, with antialiasing."""

import threading

import cykooz_resizer as simd
import numpy as np
from PIL import Image

_thread = threading.local()


def resize(image, size, box):
    """Resizes a part of an image.

    RGB images are resized by cykooz-resizer, whose vector instructions take a third of
    Pillow's time. It sums rows and columns in a different order: one pixel in seven of
    a photograph differs, mostly by one level.

    Args:
        image: `PIL.Image.Image`, RGB or RGBA.
        size: Pair of ints. Height and width of the result.
        box: Four floats: left, top, right and bottom of the part, in pixels.

    Returns:
        uint8 array `(height, width, channels)`.
    """
    if image.mode != "RGB":
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box))
    left, top, right, bottom = box
    options = simd.ResizeOptions()
    # The bicubic kernel with a = -0.5, as in Pillow.
    options.resize_alg = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
    options.crop_box = simd.CropBox(left, top, right - left, bottom - top)
    pixels = simd.PixelType.U8x3
    # Unlike Pillow's images, these are resized without holding the GIL.
    source = simd.ImageData(image.width, image.height, pixels, image.tobytes())
    target = simd.ImageData(size[1], size[0], pixels)
    if not hasattr(_thread, "resizer"):
        _thread.resizer = simd.Resizer()
    _thread.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), "uint8").reshape(*size, 3)
