"""Loads encoders by the names, folders and addresses of their presets."""

import os

import keras

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.backends import import_keras_hub, preset_of
from keras_cluster_mask.encoders.resizing import patch_size_for, with_image_size

# Encoders with a position embedding for one number of patches.
OF_ONE_SIZE = ("ViTBackbone", "DeiTBackbone")


def image_encoder_of(
    image: keras.Model | str | os.PathLike, image_size: int | None
) -> keras.Model:
    """Returns an image encoder: itself, or one that is loaded from a preset.

    Args:
        image: A keras_hub backbone, or the name, folder or address of a preset.
        image_size: Integer, the side of the images in pixels, for a preset.
    """
    if not isinstance(image, str | os.PathLike):
        if image_size is not None:
            raise ValueError(
                "`image_size` must be None unless `image` is the name of a preset. To "
                "change the size of an encoder, use `kcm.models.with_image_size`. "
                f"Received: image_size={image_size}, image of type "
                f"{type(image).__name__}"
            )
        return image
    size = check_integer("image_size", 224 if image_size is None else image_size)
    load, preset = import_keras_hub().models.Backbone.from_preset, preset_of(image)
    kind = type(load(preset, load_weights=False)).__name__
    if kind not in OF_ONE_SIZE:
        encoder = load(preset, image_shape=_shape(size))
        # Convolutions have no patches.
        if hasattr(encoder, "patch_size"):
            patch_size_for(size, encoder)
        return encoder
    encoder = load(preset)
    return (
        encoder
        if encoder.image_shape == _shape(size)
        else with_image_size(encoder, size)
    )


def text_encoder_of(text: keras.Model | str | os.PathLike) -> keras.Model:
    """Returns a text encoder: itself, or a `TextEmbedder` of a preset."""
    if not isinstance(text, str | os.PathLike):
        return text
    return import_keras_hub().models.TextEmbedder.from_preset(preset_of(text))


def _shape(size):
    is_first = keras.config.image_data_format() == "channels_first"
    return (3, size, size) if is_first else (size, size, 3)
