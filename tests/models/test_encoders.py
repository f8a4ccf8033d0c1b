import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models import with_context_length, with_image_size
from keras_cluster_mask.models.encoders import tokens_per_image
from tests.helpers import tiny_clip, tiny_metaclip, tiny_siglip

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    ("masking", "expected"),
    [
        (None, 17),
        (kcm.RandomMasking(0.5), 9),
        (kcm.ClusterMasking(8, min_mask_ratio=0.25, threshold=0.5), 13),
    ],
)
def test_prefix_and_kept_patches_are_counted(masking, expected):
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    assert tokens_per_image(model.image_encoder, (32, 32, 3)) == expected


def test_what_an_unknown_encoder_sees_is_not_known():
    images = keras.Input((8, 8, 3))
    encoder = keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))
    assert tokens_per_image(encoder, (8, 8, 3)) is None


@pytest.mark.parametrize("make", [tiny_clip, tiny_metaclip, tiny_siglip])
def test_what_is_frozen_is_frozen_in_a_copy(make):
    backbone = make()
    backbone.vision_encoder.trainable = False
    backbone.text_encoder.layers[-1].trainable = False
    expected = [v.trainable for v in backbone.weights]
    assert {*expected} == {True, False}
    for copy in (with_context_length(backbone, 9), with_image_size(backbone, 32)):
        assert [v.trainable for v in copy.weights] == expected
        assert not copy.vision_encoder.trainable


def test_a_size_may_be_integers_of_numpy():
    for size in (np.int64(8), (np.int64(8), 8)):
        copy = with_image_size(tiny_clip(), size)
        assert copy.vision_encoder.image_shape == (8, 8, 3)
