import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.masking import masking_reference as reference
from tests.masking.images import assert_selects, draw_noise, tokens_of


@pytest.mark.any_backend
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
    assert kcm.RandomMasking(mask_ratio).num_kept(num_patches) == kept


@pytest.mark.one_case
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.5, 0.9])
def test_selects_as_the_reference_whatever_the_images_show(mask_ratio):
    noise = draw_noise(np.random.default_rng(0), 48, 24)
    masking = kcm.RandomMasking(mask_ratio, num_prefix_tokens=1)
    expected = reference.select_random(noise, mask_ratio)
    for images in (None, np.zeros((48, 30, 30, 3), "uint8")):
        inputs = dict(images=images, tokens=tokens_of(48, 25), noise=noise)
        assert_selects(masking, expected, **inputs)
