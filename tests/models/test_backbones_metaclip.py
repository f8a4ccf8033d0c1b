"""ContrastiveModel.from_backbone of a MetaCLIP 2: texts are pooled at the end token."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models import MetaCLIP2ContrastiveModel
from tests.helpers import (
    FAST,
    VOCABULARY,
    options_of,
    random_images,
    random_pairs,
    tiny_metaclip,
    to_numpy,
    values,
)

END = 2


def pairs_of(count, seed=0):
    """Texts of several lengths: words, the end token, padding by 1."""
    pairs = random_pairs(count, seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, size=pairs["token_ids"].shape).astype("int32")
    ids[:, 0] = 0
    for row, length in enumerate(2 + np.arange(count) % (ids.shape[1] - 2)):
        ids[row, length] = END
        ids[row, length + 1 :] = 1
    return {**pairs, "token_ids": ids}


def without_end(pairs, row):
    ids = pairs["token_ids"].copy()
    ids[row][ids[row] == END] = 5
    return {**pairs, "token_ids": ids}


@pytest.fixture(scope="module")
def trained():
    """A backbone, the model that trained it, its pairs, and the weights before."""
    backbone = tiny_metaclip()
    before = values(backbone.weights)
    masking = kcm.ClusterMasking(4, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    pairs = pairs_of(8)
    model.fit(pairs, batch_size=8, verbose=0)
    return backbone, model, pairs, before


def test_embeddings_and_logits_are_the_backbones_own(trained):
    backbone, model, pairs, _ = trained
    images, ids = random_images(8), pairs["token_ids"]
    for one, other in (
        (model.encode_image(images), backbone.get_vision_embeddings(images)),
        (model.encode_text(ids), backbone.get_text_embeddings(ids)),
    ):
        other = to_numpy(other)
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        np.testing.assert_allclose(to_numpy(one), other, atol=1e-6)
    found = model({"images": images, "token_ids": ids})
    logits = to_numpy(found["image_embeddings"]) @ to_numpy(found["text_embeddings"]).T
    expected = to_numpy(backbone({"images": images, "token_ids": ids})["vision_logits"])
    np.testing.assert_allclose(to_numpy(model.head.scale) * logits, expected, atol=1e-4)


def test_what_follows_the_end_token_has_no_influence(trained):
    _, model, pairs, _ = trained
    ids = pairs["token_ids"].copy()
    for row in ids:
        rest = row[np.argmax(row == END) + 1 :]
        rest[:] = [END, VOCABULARY - 1, 9, 9][: len(rest)]
    assert np.any(ids != pairs["token_ids"])
    np.testing.assert_allclose(
        to_numpy(model.encode_text(ids)),
        to_numpy(model.encode_text(pairs["token_ids"])),
        atol=1e-6,
    )


def test_a_fit_trains_all_of_the_backbone(trained):
    backbone, model, _, before = trained
    still = [
        v.path
        for v, old in zip(backbone.weights, before)
        if v.trainable and np.array_equal(ops.convert_to_numpy(v), old)
    ]
    # A key's bias has no influence on a softmax over keys, except by rounding.
    assert all("key" in path and "bias" in path for path in still), still
    assert model.head.logit_scale is backbone.metaclip_2_head.logit_scale


@pytest.mark.parametrize("min_mask_ratio", [None, 0.25])
def test_masked_training_reads_fewer_patches(min_mask_ratio):
    threshold = None if min_mask_ratio is None else 0.1
    masking = kcm.ClusterMasking(4, 0.5, min_mask_ratio, threshold)
    model = kcm.ContrastiveModel.from_backbone(tiny_metaclip(), masking)
    images = random_images(4)
    tokens = model.image_encoder({"images": images}, training=True)
    assert tokens.shape == (4, 1 + (8 if min_mask_ratio is None else 12), 16)
    assert tuple(model.encode_image(images, training=True).shape) == (4, 16)


def test_a_saved_model_and_the_backbones_preset_reload(trained, tmp_path):
    backbone, model, pairs, _ = trained
    model.save(tmp_path / "metaclip.keras")
    loaded = keras.saving.load_model(tmp_path / "metaclip.keras")
    assert isinstance(loaded, MetaCLIP2ContrastiveModel)
    assert options_of(loaded) == options_of(model)
    assert loaded.head.logit_scale is loaded.backbone.metaclip_2_head.logit_scale
    expected = model.predict(pairs, verbose=0)
    for key, value in loaded.predict(pairs, verbose=0).items():
        np.testing.assert_array_equal(value, expected[key])
    backbone.save_to_preset(str(tmp_path / "preset"))
    again = kcm.ContrastiveModel.from_backbone(
        keras_hub.models.MetaCLIP2Backbone.from_preset(str(tmp_path / "preset"))
    )
    for key, value in again.predict(pairs, verbose=0).items():
        np.testing.assert_allclose(value, expected[key], atol=1e-6)


def test_the_towers_compute_what_the_model_does(trained):
    _, model, pairs, _ = trained
    expected = model.predict(pairs, verbose=0)
    for tower, given, name in (
        (model.text_tower, pairs["token_ids"], "text_embeddings"),
        (model.image_tower, pairs["images"], "image_embeddings"),
    ):
        found = tower.predict(given, verbose=0)
        np.testing.assert_allclose(found, expected[name], atol=1e-6)


@pytest.mark.any_backend
def test_the_norm_after_the_pooling_belongs_to_the_image_tower(trained):
    backbone, model, _, _ = trained
    of_towers = {
        id(v)
        for tower in model.towers.values()
        for layer in tower
        for v in layer.trainable_variables
    }
    rest = [v for v in model.trainable_variables if id(v) not in of_towers]
    assert rest == [backbone.metaclip_2_head.logit_scale]


# === Texts without the end token ===


def test_texts_without_the_end_token_are_refused_by_number(trained):
    _, model, pairs, _ = trained
    wrong = without_end(pairs, row=5)
    message = r"`token_ids` must hold the end token, 2.*Received:.*row 5"
    for run in (
        lambda: model.fit(wrong, batch_size=8, verbose=0),
        lambda: model.fit(pairs, batch_size=8, validation_data=wrong, verbose=0),
        lambda: model.evaluate(wrong, batch_size=8, verbose=0),
        lambda: model.predict(wrong, verbose=0),
        lambda: kcm.evaluation.embed(model, wrong, verbose=0),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_texts_without_the_end_token_are_refused_in_a_dataset(trained):
    tf = pytest.importorskip("tensorflow")
    _, model, pairs, _ = trained
    wrong = without_end(pairs, row=5)
    dataset = tf.data.Dataset.from_tensor_slices(wrong).batch(4, drop_remainder=True)
    with pytest.raises(Exception, match=r"`token_ids` must hold the end token, 2"):
        model.fit(dataset, verbose=0)


def test_unchecked_texts_without_the_end_token_have_no_embedding(trained):
    _, model, pairs, _ = trained
    found = to_numpy(model.text_embeddings(without_end(pairs, row=5)["token_ids"]))
    np.testing.assert_array_equal(np.isnan(found).any(axis=1), np.arange(8) == 5)
