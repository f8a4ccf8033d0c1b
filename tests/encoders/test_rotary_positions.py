"""A masked DINOv3: each kept patch keeps its own rotary position."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    assert_close,
    dino_3_encoder,
    random_images,
    random_noise,
    to_numpy,
    value_and_gradients,
)

PREFIX = 3


def pooled(encoder):
    return keras.Model(encoder.input, encoder.output[:, 0], name="pooled")


def reference(encoder, images, visible):
    """The whole encoder, where no token attends to those that are left out."""
    visible = np.concatenate([np.ones((len(images), PREFIX), bool), visible], axis=1)
    tokens, _ = encoder.encoder(
        encoder.embeddings(images),
        attention_mask=ops.convert_to_tensor(visible[:, None, None]),
        position_embeddings=encoder.rope_embedding(images),
        num_prefix_tokens=PREFIX,
    )
    return encoder.layernorm(tokens), visible


def visible_of(masking, images, noise):
    indices, visible = map(ops.convert_to_numpy, masking.select(images, noise=noise))
    found = np.zeros(noise.shape, bool)
    np.put_along_axis(found, indices, visible, axis=1)
    return found


@pytest.mark.any_backend
@pytest.mark.parametrize("num_layers", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_with_all_patches_the_output_is_that_of_the_last_block(num_layers):
    # More than nine blocks: their names are not in the order of their numbers.
    encoder = dino_3_encoder(num_layers)
    masked = kcm.with_masking(encoder, kcm.RandomMasking(0.0))
    images = {"pixel_values": random_images(2)}
    assert_close(masked(images, training=True), encoder(images), 1e-5)


@pytest.mark.any_backend
@pytest.mark.slow
def test_average_pooling_passes_over_hidden_tokens():
    encoder = dino_3_encoder(2)
    average = keras.layers.GlobalAveragePooling1D()(encoder.output)
    masking = kcm.ClusterMasking(4, 0.5, min_mask_ratio=0.25, threshold=0.0)
    masked = kcm.with_masking(
        keras.Model(encoder.input, average), masking, "embeddings"
    )
    images, noise = random_images(4), random_noise(4)
    expected, visible = reference(encoder, images, visible_of(masking, images, noise))
    expected = to_numpy(expected) * visible[:, :, None]
    expected = expected.sum(axis=1) / visible.sum(axis=1, keepdims=True)
    found = masked({"pixel_values": images}, training=True, noise=noise)
    assert_close(found, expected, 1e-5)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    "min_mask_ratio", [None, pytest.param(0.25, marks=pytest.mark.slow)]
)
def test_kept_tokens_are_those_of_the_whole_encoder_that_attends_to_them_alone(
    min_mask_ratio,
):
    encoder = dino_3_encoder(2)
    threshold = None if min_mask_ratio is None else 0.0
    masking = kcm.ClusterMasking(4, 0.5, min_mask_ratio, threshold)
    masked = kcm.with_masking(encoder, masking)
    assert masked.num_prefix_tokens == PREFIX
    images, noise = random_images(4), random_noise(4)
    visible = visible_of(masking, images, noise)
    expected, visible = reference(encoder, images, visible)
    found = to_numpy(masked({"pixel_values": images}, training=True, noise=noise))
    for row in range(4):
        alone = to_numpy(expected)[row, visible[row]]
        seen = found[row]
        if min_mask_ratio is not None:
            is_visible = ops.convert_to_numpy(masking.select(images, noise=noise)[1])
            seen = np.concatenate([seen[:PREFIX], seen[PREFIX:][is_visible[row]]])
        assert_close(seen, alone, 1e-5)


@pytest.mark.any_backend
@pytest.mark.slow
def test_gradients_are_those_of_the_whole_encoder():
    encoder = dino_3_encoder(2)
    masked = kcm.with_masking(pooled(encoder), kcm.ClusterMasking(4, 0.5))
    images, noise = random_images(4), random_noise(4)
    visible = visible_of(masked.masking, images, noise)
    weights = [v for v in encoder.trainable_variables if "mask_token" not in v.path]

    def of(output):
        return ops.sum(output * ops.arange(16, dtype="float32")), output

    found, expected = (
        value_and_gradients(fn, weights)
        for fn in (
            lambda: of(masked({"pixel_values": images}, training=True, noise=noise)),
            lambda: of(reference(encoder, images, visible)[0][:, 0]),
        )
    )
    assert_close(found[0], expected[0], 1e-5)
    for weight, one, other in zip(weights, found[1], expected[1]):
        scale = max(1, np.abs(other).max())
        np.testing.assert_allclose(one, other, atol=1e-4 * scale, err_msg=weight.path)


@pytest.mark.any_backend
@pytest.mark.parametrize("option", ["attention_dropout", "drop_path_rate"])
def test_dropout_is_refused(option):
    with pytest.raises(ValueError, match=rf"without dropout.*Received:.*{option}=0.1"):
        kcm.with_masking(dino_3_encoder(2, **{option: 0.1}), kcm.ClusterMasking(4))
