"""Bicubic resizing of pictures, with antialiasing."""

import threading

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as simd
except ImportError:
    simd = None

_thread = threading.local()


def resize(image, size, box):
    """A part of a picture in another size.

    By vector instructions, which take a third of the time that Pillow needs. They add
    up rows and columns in another order: of a photograph one pixel in seven comes out
    another, by one level mostly. Without cykooz-resizer it is Pillow.

    Args:
        image: `PIL.Image.Image`, RGB or RGBA.
        size: pair of ints. Height and width to return.
        box: four floats: left, top, right and bottom of the part, in pixels.

    Returns:
        uint8 array `(height, width, channels)`.
    """
    if simd is None or image.mode != "RGB":
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box))
    left, top, right, bottom = box
    options = simd.ResizeOptions()
    # The kernel that is known as bicubic: a = -0.5.
    options.resize_alg = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
    options.crop_box = simd.CropBox(left, top, right - left, bottom - top)
    pixels = simd.PixelType.U8x3
    # Unlike pictures of Pillow's, these are resized without Python's lock.
    source = simd.ImageData(image.width, image.height, pixels, image.tobytes())
    target = simd.ImageData(size[1], size[0], pixels)
    if not hasattr(_thread, "resizer"):
        _thread.resizer = simd.Resizer()
    _thread.resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), "uint8").reshape(*size, 3)
