"""A masked DINOv3: each kept patch keeps its own rotary position."""

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
)

PREFIX = 3


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


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("options", [{}, {"min_mask_ratio": 0.25, "threshold": 0.0}])
def test_kept_tokens_are_those_of_the_whole_encoder_that_attends_to_them_alone(options):
    encoder = dino_3_encoder(2)
    masking = kcm.ClusterMasking(0.5, patch_size=4, **options)
    masked = kcm.with_masking(encoder, masking)
    assert masked.num_prefix_tokens == PREFIX
    images, noise = random_images(4), random_noise(4)
    visible = visible_of(masking, images, noise)
    expected, visible = reference(encoder, images, visible)
    found = masked({"pixel_values": images}, training=True, noise=noise)
    _, shown = map(ops.convert_to_numpy, masking.select(images, noise=noise))
    # Hidden tokens are padding.
    assert shown.all() != bool(options)
    for row, alone, seen, is_shown in zip(
        to_numpy(found), to_numpy(expected), visible, shown
    ):
        row = np.concatenate([row[:PREFIX], row[PREFIX:][is_shown]])
        assert_close(row, alone[seen], 1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("option", ["attention_dropout", "drop_path_rate"])
def test_dropout_is_refused(option):
    with pytest.raises(ValueError, match=rf"without dropout.*Received:.*{option}=0.1"):
        kcm.with_masking(
            dino_3_encoder(2, **{option: 0.1}), kcm.ClusterMasking(patch_size=4)
        )
