import keras
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models.encoders import tokens_per_image

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
