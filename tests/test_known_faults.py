"""Known faults that are not mended yet: each test fails until its fault is."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    image_mlp,
    patch_mlp,
    random_images,
    random_pairs,
    text_bag,
    tiny_clip,
)


def compiled(optimizer, masking=None):
    encoder = image_mlp()
    if masking is not None:
        encoder = kcm.with_masking(patch_mlp(), masking, "positions")
    model = kcm.ContrastiveModel(encoder, text_bag())
    model.compile(optimizer, **FAST)
    return model


@pytest.mark.xfail(strict=True, reason="the threshold moves without feedback")
def test_a_threshold_without_hidden_padding_keeps_its_mask_ratio():
    images = random_images(16)
    masking = kcm.ClusterMasking(
        4,
        mask_ratio=0.5,
        min_mask_ratio=0.3,
        hide_padding=False,
        embedding_weight=0.01,
        seed=0,
    )
    masking.adapt(images)
    model = compiled(keras.optimizers.SGD(0.0), masking)
    pairs = {**random_pairs(16), "images": images}
    model.fit(pairs, batch_size=16, epochs=24, verbose=0)
    anchors = masking.draw_anchors(masking.draw(16, 16))
    similarity = ops.convert_to_numpy(masking.similarity_of_pixels(images, anchors))
    share = np.mean(similarity > float(ops.convert_to_numpy(masking.threshold)))
    assert share == pytest.approx(0.5, abs=0.1)


@pytest.mark.xfail(
    keras.backend.backend() != "tensorflow",
    strict=True,
    reason="a .keras file does not hold `trainable`",
)
def test_a_frozen_tower_is_frozen_after_a_reload(tmp_path):
    backbone = tiny_clip()
    backbone.vision_encoder.trainable = False
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
