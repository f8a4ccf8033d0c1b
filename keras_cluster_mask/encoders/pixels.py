"""Checks of means and deviations of pixels."""

import warnings

import keras
import numpy as np

from keras_cluster_mask.encoders.surgery import image_shape_of, inputs_of
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
                f"`{name}` must be three finite numbers, which for `pixel_std` must be "
                f"greater than 0. Received: {name}={values}"
            )
    for images in inputs_of(encoder).values():
        if not keras.backend.is_float_dtype(images.dtype):
            raise ValueError(
                "`pixel_mean` must be None for an image encoder with integer inputs, "
                "because normalized pixels would be cast to integers. Received: "
                f"pixel_mean={mean}, an encoder of {images.dtype} images"
            )
    for layer in all_layers(encoder):
        if isinstance(layer, keras.layers.Normalization | keras.layers.Rescaling):
            shape = (layer.get_build_config() or {}).get("input_shape", ())
            if tuple(shape[1:]) == image_shape_of(encoder):
                warnings.warn(
                    "Images are normalized twice, by the model and by its image "
                    "encoder: pass `pixel_mean=None` if the encoder takes pixels from "
                    f"0 to 255. Received: pixel_mean={mean}, the encoder's layer "
                    f"{layer.name!r}",
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
