import numpy as np
import pytest
from keras.src import testing

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import assert_selects, draw_noise, numpy, tokens_of


class MaskingLayerTest(testing.TestCase):
    def test_is_a_keras_layer_in_every_respect(self):
        for strategy, prefix in ((kcm.RandomMasking, 0), (kcm.BlockMasking, 1)):
            self.run_layer_test(
                strategy,
                init_kwargs={"num_prefix_tokens": prefix, "seed": 1},
                input_shape=(2, prefix + 16, 8),
                call_kwargs={"training": True},
                expected_output_shape=(2, None, 8),
                expected_num_trainable_weights=0,
                expected_num_non_trainable_weights=1,
                expected_num_seed_generators=1,
                expected_num_losses=0,
                supports_masking=True,
            )


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("mask_ratio", "num_patches", "kept"),
    [
        (0.0, 10, 10),
        (0.9, 10, 1),
        (0.99, 10, 1),
        (0.75, 196, 49),
        (0.7, 10, 3),
        (0.5, 7, 3),
        (0.5, 1, 1),
    ],
)
def test_keeps_a_number_of_patches_that_is_rounded_down(mask_ratio, num_patches, kept):
    assert reference.kept_count(num_patches, mask_ratio) == kept
    masking = kcm.RandomMasking(mask_ratio, num_prefix_tokens=0, seed=0)
    indices, _ = numpy(*masking.select(tokens=tokens_of(4, num_patches)))
    assert indices.shape == (4, kept)


@pytest.mark.one_case
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.5, 0.9])
def test_selects_as_the_reference_whatever_the_images_show(mask_ratio):
    noise = draw_noise(np.random.default_rng(0), 48, 24)
    masking = kcm.RandomMasking(mask_ratio, num_prefix_tokens=1)
    expected = reference.select_random(noise, mask_ratio)
    for images in (None, np.zeros((48, 30, 30, 3), "uint8")):
        inputs = dict(images=images, tokens=tokens_of(48, 25), noise=noise)
        assert_selects(masking, expected, **inputs)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("prefix", "tokens", "argument"),
    [
        (None, np.zeros((2, 17, 6)), "num_prefix_tokens"),
        (1, None, "tokens"),
        (4, np.zeros((2, 4, 6)), "tokens"),
    ],
)
def test_needs_to_know_how_many_tokens_are_patches(prefix, tokens, argument):
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=prefix)
    with pytest.raises(ValueError, match=rf"`{argument}`[\s\S]*Received: {argument}"):
        masking.select(tokens=tokens)
    if tokens is not None:
        with pytest.raises(ValueError, match=rf"Received: {argument}"):
            masking(tokens, training=True)
