"""The vision transformers of keras_hub that are promised to work are masked."""

import keras_hub
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models.encoders import image_shape_of
from tests.helpers import (
    VIT,
    metaclip_vision_encoder,
    random_images,
)

pytestmark = pytest.mark.any_backend


def blip2():
    return keras_hub.models.BLIP2VisionEncoder(
        **VIT,
        image_size=16,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )


def dino3():
    return keras_hub.models.DINOV3Backbone(**VIT, image_shape=(16, 16, 3))


@pytest.mark.parametrize(
    ("make", "prefix"),
    # Others are masked in `test_masked_encoder.py`.
    [(blip2, 1), (dino3, 5), (metaclip_vision_encoder, 1)],
)
@pytest.mark.parametrize(
    ("options", "kept"), [({}, 8), ({"min_mask_ratio": 0.25, "threshold": 0.0}, 12)]
)
def test_an_encoder_is_masked_after_its_prefix_and_positions(
    make, prefix, options, kept
):
    encoder = make()
    masked = kcm.with_masking(encoder, kcm.ClusterMasking(4, **options))
    assert masked.num_prefix_tokens == prefix
    images = random_images(2, *image_shape_of(encoder)[:2])
    given = encoder.input
    inputs = dict.fromkeys(given, images) if isinstance(given, dict) else images
    trained = masked(inputs, training=True)
    assert trained.shape == (2, prefix + kept, 16)
