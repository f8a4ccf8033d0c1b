"""ContrastiveModel.from_siglip: it trains the backbone itself."""

import math

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models import SigLIPContrastiveModel
from tests.helpers import (
    FAST,
    compiled,
    options_of,
    random_images,
    random_noise,
    random_pairs,
    tiny_siglip,
    to_numpy,
    values,
)


@pytest.fixture(scope="module")
def trained():
    """A backbone, the model that trained it, its pairs, and the weights before."""
    backbone = tiny_siglip()
    masking = kcm.ClusterMasking(4, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    before = values(backbone.weights)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    pairs = random_pairs(8)
    model.fit(pairs, batch_size=8, verbose=0)
    return backbone, model, pairs, before


def scalar(variable):
    return float(ops.convert_to_numpy(variable))


def test_logits_of_the_embeddings_are_the_backbones_own(trained):
    backbone, model, pairs, _ = trained
    inputs = {"images": random_images(4), "token_ids": pairs["token_ids"][:4]}
    embeddings = {key: to_numpy(x) for key, x in model(inputs).items()}
    similarity = embeddings["image_embeddings"] @ embeddings["text_embeddings"].T
    logits = scalar(model.head.scale) * similarity + scalar(model.head.logit_bias)
    expected = to_numpy(backbone(inputs)["vision_logits"])
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_loss_is_that_of_the_backbones_own_logits(trained):
    backbone, model, pairs, _ = trained
    inputs = {"images": random_images(4), "token_ids": pairs["token_ids"][:4]}
    loss = model.evaluate(inputs, batch_size=4, verbose=0, return_dict=True)["loss"]
    logits = to_numpy(backbone(inputs)["vision_logits"])
    signs = 2.0 * np.eye(4) - 1.0
    expected = np.logaddexp(0.0, -signs * logits).sum(axis=1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_bytes_are_scaled_to_minus_one_to_one(trained):
    backbone, model, pairs, _ = trained
    images = pairs["images"][:4]
    expected = to_numpy(backbone.get_vision_embeddings(images / np.float32(127.5) - 1))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        to_numpy(model.encode_image(images)), expected, atol=1e-5
    )


def test_a_fit_trains_all_of_the_backbone(trained):
    backbone, _, _, before = trained
    still = [
        v.path
        for v, old in zip(backbone.weights, before)
        if v.trainable and np.array_equal(ops.convert_to_numpy(v), old)
    ]
    # A key's bias has no influence on a softmax over keys, except by rounding.
    assert all("key" in path and "bias" in path for path in still), still


@pytest.mark.any_backend
def test_the_model_adds_the_weights_of_the_masking_and_nothing_else(trained):
    backbone, model, _, _ = trained
    assert len(model.weights) == len({id(v) for v in model.weights})
    assert {id(v) for v in model.weights} == {id(v) for v in backbone.weights} | {
        id(v) for v in model.masking.weights
    }
    assert model.head.logit_scale is backbone.siglip_head.logit_scale
    assert model.head.logit_bias is backbone.siglip_head.logit_bias


def test_a_fresh_backbone_starts_where_siglip_did_and_a_trained_one_where_it_is():
    backbone = tiny_siglip()
    model = kcm.ContrastiveModel.from_backbone(backbone)
    assert scalar(model.head.scale) == pytest.approx(10.0)
    assert scalar(backbone.siglip_head.logit_bias) == -10.0
    backbone.siglip_head.logit_scale.assign(0.0)
    backbone.siglip_head.logit_bias.assign(-3.0)
    kept = kcm.ContrastiveModel.from_backbone(backbone)
    assert (scalar(kept.head.scale), scalar(kept.head.logit_bias)) == (1.0, -3.0)
    given = kcm.ContrastiveModel.from_backbone(backbone, initial_temperature=0.5)
    assert scalar(given.head.scale) == pytest.approx(2.0)
    assert scalar(given.head.logit_bias) == -3.0


def test_the_softmax_loss_leaves_the_bias_alone():
    backbone = tiny_siglip()
    backbone.siglip_head.logit_scale.assign(math.log(14.0))
    model = kcm.ContrastiveModel.from_backbone(backbone, loss="softmax")
    model.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
    model.fit(random_pairs(4), batch_size=4, verbose=0)
    assert scalar(backbone.siglip_head.logit_bias) == 0.0
    assert scalar(model.head.scale) != pytest.approx(14.0, rel=1e-6)


def test_the_pooling_head_sees_nothing_of_the_patches_that_are_left_out(trained):
    _, model, _, _ = trained
    images, noise = random_images(4), random_noise(4)
    masked = model.image_encoder
    stem, blocks = masked._parts()
    indices, visible = model.masking.select(images, noise=noise)
    assert ops.convert_to_numpy(visible).all()
    tokens = ops.take_along_axis(stem({"images": images}), indices[:, :, None], axis=1)
    pooled = to_numpy(masked({"images": images}, training=True, noise=noise))
    np.testing.assert_allclose(pooled, to_numpy(blocks(tokens)), atol=1e-6)
    assert pooled.shape == (4, 16)


def test_hidden_padding_is_hidden_from_the_pooling_head():
    masking = kcm.ClusterMasking(4, min_mask_ratio=0.25, threshold=0.0)
    model = kcm.ContrastiveModel.from_backbone(tiny_siglip(), masking)
    images, noise = random_images(4, seed=3), random_noise(4, seed=3)
    masked = model.image_encoder
    stem, blocks = masked._parts()
    indices, visible = map(ops.convert_to_numpy, masking.select(images, noise=noise))
    assert not visible.all(axis=1).any()
    pooled = to_numpy(masked({"images": images}, training=True, noise=noise))
    tokens = to_numpy(stem({"images": images}))
    for row in range(2):
        alone = tokens[row : row + 1, indices[row][visible[row]]]
        expected = to_numpy(compiled(blocks)(alone))[0]
        np.testing.assert_allclose(pooled[row], expected, atol=1e-5)


def test_keras_hub_alone_reads_what_was_trained(trained, tmp_path):
    backbone, model, pairs, _ = trained
    backbone.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.SigLIPBackbone.from_preset(str(tmp_path))
    inputs = {"images": random_images(4), "token_ids": pairs["token_ids"][:4]}
    np.testing.assert_array_equal(
        to_numpy(loaded(inputs)["text_logits"]),
        to_numpy(backbone(inputs)["text_logits"]),
    )
    again = kcm.ContrastiveModel.from_backbone(loaded)
    for key, value in model(inputs).items():
        np.testing.assert_allclose(
            to_numpy(again(inputs)[key]), to_numpy(value), atol=1e-6
        )


def test_after_a_reload_a_fit_trains_the_reloaded_backbone(trained, tmp_path):
    _, model, pairs, _ = trained
    model.save(tmp_path / "siglip.keras")
    loaded = keras.saving.load_model(tmp_path / "siglip.keras")
    assert isinstance(loaded, SigLIPContrastiveModel)
    assert options_of(loaded) == options_of(model)
    for one, other in zip(values(model.weights), values(loaded.weights)):
        np.testing.assert_array_equal(one, other)
    for key, value in model.predict(pairs, verbose=0).items():
        np.testing.assert_array_equal(loaded.predict(pairs, verbose=0)[key], value)

    head = loaded.backbone.siglip_head
    assert loaded.head.logit_scale is head.logit_scale
    assert loaded.head.logit_bias is head.logit_bias
    images = random_images(4)

    def embed():
        return (
            to_numpy(loaded.backbone.get_vision_embeddings(images)),
            to_numpy(loaded.backbone.get_text_embeddings(pairs["token_ids"])),
            to_numpy(head.logit_scale),
            to_numpy(head.logit_bias),
        )

    before = embed()
    loaded.fit(pairs, batch_size=8, verbose=0)
    for one, other in zip(before, embed()):
        assert np.abs(one - other).max() > 1e-4


def test_mixed_precision_gives_float32_unit_vectors():
    model = kcm.ContrastiveModel.from_backbone(
        tiny_siglip("mixed_bfloat16"), kcm.ClusterMasking(4, seed=1)
    )
    model.compile(optimizer=keras.optimizers.SGD(0.0), **FAST)
    pairs = random_pairs(4)
    for embeddings in model.predict(pairs, verbose=0).values():
        assert embeddings.dtype == "float32"
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)
    assert np.isfinite(model.fit(pairs, batch_size=4, verbose=0).history["loss"][0])
