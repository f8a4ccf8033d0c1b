"""Normalization of pixels, and checks of means and deviations."""

import warnings

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.surgery import image_shape_of
from keras_cluster_mask.masking.patch_grid import is_channels_first
from keras_cluster_mask.training.input_rules import is_float
from keras_cluster_mask.training.layers import all_layers


def check_statistics(mean, std, encoder):
    """Raises an error unless a mean and a standard deviation can normalize pixels.

    Warns of an image encoder that normalizes its images again, where it is known.
    """
    if mean is None:
        return
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        values = np.array(values, "float64")
        is_valid = np.isfinite(values) & ((values > 0) | (name == "pixel_mean"))
        if values.shape != (3,) or not np.all(is_valid):
            raise ValueError(
                f"`{name}` must be three finite numbers, and `pixel_std` greater than "
                f"0. Received: {name}={values}"
            )
    given = tree.flatten(getattr(encoder, "input", None))[0]
    if given is not None and not keras.backend.is_float_dtype(given.dtype):
        raise ValueError(
            "`pixel_mean` must be None for an image encoder of integer images, because "
            "normalized pixels would be cast to integers. "
            f"Received: pixel_mean={mean}, an image encoder of {given.dtype} images"
        )
    for layer in all_layers(encoder):
        if isinstance(layer, keras.layers.Normalization | keras.layers.Rescaling):
            shape = (layer.get_build_config() or {}).get("input_shape", ())
            if tuple(shape[1:]) == image_shape_of(encoder):
                warnings.warn(
                    "The model normalizes images, and so does its image encoder: pass "
                    "`pixel_mean=None` for one that takes pixels from 0 to 255. "
                    f"Received: pixel_mean={mean}, the encoder's layer {layer.name!r}",
                    stacklevel=6,
                )


def pixel_range(mean, std):
    """Returns the values of a black and a white pixel after normalization.

    Returns:
        Two floats, the lowest and the highest of all channels; `None` without a mean.
    """
    if mean is None:
        return None
    mean, std = np.array(mean), np.array(std)
    return float(np.min(-mean / std)), float(np.max((1.0 - mean) / std))


def normalize_pixels(images, mean=CLIP_MEAN, std=CLIP_STD, data_format=None):
    """Scales and normalizes uint8 images, and returns float images unchanged.

    This runs on the device, in the compiled step, because uint8 takes a quarter of the
    memory and of the transfer of float32.

    Args:
        images: `(batch, H, W, C)` tensor, or channels first.
        mean: Three floats, one per channel. Their average is used if there are not
            three channels. `None` returns all images unchanged.
        std: Three floats, one per channel, averaged like `mean`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.

    Returns:
        A float32 tensor for uint8 images; any other tensor unchanged.

    Raises:
        ValueError: For integers other than uint8, whose range is not known.
    """
    images = ops.convert_to_tensor(images)
    dtype = keras.backend.standardize_dtype(images.dtype)
    # `is_float` raises an error for other integers.
    if mean is None or (dtype != "uint8" and is_float(images)):
        return images
    axis, shape = (1, (-1, 1, 1)) if is_channels_first(data_format) else (-1, -1)
    if images.shape[axis] != 3:
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    # Tensors of Python numbers: torch compiles and exports no NumPy arrays.
    mean, std = (
        ops.reshape(ops.convert_to_tensor(x, "float32"), shape) for x in (mean, std)
    )
    return (ops.cast(images, "float32") / 255.0 - mean) / std
