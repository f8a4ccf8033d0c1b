"""uint8 images are scaled and normalized, others come as they are."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD
from keras_cluster_mask.encoders.towers import normalize_pixels
from tests.helpers import (
    assert_close,
    assert_same_values,
    random_pairs,
    text_bag,
    to_numpy,
)


def bytes_of_images(channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, size=(2, 4, 4, channels)).astype("uint8")


@pytest.mark.any_backend
def test_the_statistics_are_those_clip_was_trained_with():
    constants = pytest.importorskip("open_clip.constants")
    assert constants.OPENAI_DATASET_MEAN == CLIP_MEAN
    assert constants.OPENAI_DATASET_STD == CLIP_STD


@pytest.mark.one_case
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_scaled_and_normalized_by_channel(channels):
    images = bytes_of_images(channels)
    normalized = normalize_pixels(images)
    assert keras.backend.standardize_dtype(normalized.dtype) == "float32"
    mean, std = np.array(CLIP_MEAN), np.array(CLIP_STD)
    if channels != 3:
        mean, std = mean.mean(), std.mean()
    expected = (images / 255.0 - mean) / std
    assert_close(normalized, expected, 1e-5)


@pytest.mark.one_case
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_are_left_alone(dtype):
    images = (100.0 * np.random.default_rng(0).normal(size=(2, 4, 4, 3))).astype(dtype)
    same = normalize_pixels(images)
    assert keras.backend.standardize_dtype(same.dtype) == dtype
    assert_same_values(same, images)


def encoder_of(*layers, dtype="float32"):
    """An image encoder that starts with some layers, masked after its embedding."""
    images = x = keras.Input((16, 16, 3), dtype=dtype)
    for layer in layers:
        x = layer(x)
    x = keras.layers.Conv2D(16, 4, strides=4)(x)
    x = keras.layers.Reshape((16, 16), name="tokens")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    encoder = keras.Model(images, x)
    return kcm.with_masking(encoder, kcm.RandomMasking(num_prefix_tokens=0), "tokens")


def test_an_encoder_of_integers_gets_the_pixels_as_they_are():
    encoder = encoder_of(keras.layers.Rescaling(1 / 255), dtype="uint8")
    with pytest.raises(ValueError, match=r"`pixel_mean` must be None.*uint8 images$"):
        kcm.ContrastiveModel(encoder, text_bag())
    model = kcm.ContrastiveModel(encoder, text_bag(), pixel_mean=None)
    images = random_pairs(2)["images"]
    expected = to_numpy(encoder(images))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert_close(model.encode_image(images), expected, 0.0, 1e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "layer",
    [keras.layers.Rescaling(1 / 255), keras.layers.Normalization(mean=128, variance=9)],
)
def test_an_encoder_that_normalizes_again_causes_a_warning(layer, recwarn):
    with pytest.warns(UserWarning, match=rf"pass `pixel_mean=None`.*'{layer.name}'"):
        kcm.ContrastiveModel(encoder_of(layer), text_bag())
    kcm.ContrastiveModel(encoder_of(layer), text_bag(), pixel_mean=None)
    # A layer that scales features normalizes no images.
    features = encoder_of(keras.layers.Conv2D(4, 1), keras.layers.Rescaling(0.5))
    kcm.ContrastiveModel(features, text_bag())
    assert not [x for x in recwarn if x.category is UserWarning]


@pytest.mark.any_backend
@pytest.mark.parametrize("masked", [False, True])
def test_the_order_of_axes_is_that_of_the_encoder(masked):
    images = keras.Input((3, 16, 16))
    x = keras.layers.AveragePooling2D(4, data_format="channels_first")(images)
    x = keras.layers.Reshape((16, 3), name="tokens")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    encoder = keras.Model(images, keras.layers.Dense(16)(x))
    if masked:
        masking = kcm.ClusterMasking(patch_size=4, data_format="channels_first")
        encoder = kcm.with_masking(encoder, masking, "tokens")
    model = kcm.ContrastiveModel(encoder, text_bag())
    pixels = random_pairs(2)["images"]
    expected = (pixels / 255.0 - model.pixel_mean) / model.pixel_std
    found = model.image_tower.prepare(np.moveaxis(pixels, -1, 1))
    found = ops.moveaxis(found, 1, -1)
    assert_close(found, expected, 1e-6, 1e-4)
