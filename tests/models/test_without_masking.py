"""Models that a ContrastiveModel gives away: unmasked ones, and its towers."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    functional_vit,
    options_of,
    random_images,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_siglip,
    to_numpy,
    values,
)


def generic(masking=None, **kwargs):
    encoder = functional_vit()
    if masking is not None:
        masking.num_prefix_tokens = 0
        encoder = kcm.with_masking(encoder, masking, "positions")
    options = dict(loss="sigmoid", projection_dim=5, **kwargs)
    return kcm.ContrastiveModel(encoder, text_bag(), **options)


def clip(masking=None, **kwargs):
    options = dict(loss="sigmoid", initial_temperature=0.2, **kwargs)
    return of_backbone(tiny_clip(), masking, **options)


def siglip(masking=None, **kwargs):
    return of_backbone(tiny_siglip(), masking, **kwargs)


def of_backbone(backbone, masking, **kwargs):
    if masking is not None:
        kwargs["text_masking"] = type(masking)(0.5, seed=1)
    return kcm.ContrastiveModel.from_backbone(backbone, masking, **kwargs)


each_model = pytest.mark.parametrize("make", [generic, clip, siglip])


class CountTokens(kcm.RandomMasking):
    """Counts the calls in which it masks."""

    calls = 0

    def score(self, noise, images=None, tokens=None):
        self.calls += 1
        return super().score(noise, images, tokens)


# === Without masking ===


@each_model
def test_training_whole_images_trains_the_masked_model(make):
    model = make(CountTokens(0.5, seed=0))
    model.head.logit_bias.assign(-3.0)
    model.head.logit_scale.assign(1.5)
    whole = model.without_masking()
    assert type(whole) is type(model)
    state = {id(v) for masking in model.maskings for v in masking.weights}
    own = {id(v) for v in model.weights} - state
    assert {id(v) for v in whole.weights} == own
    # Nothing that was learned starts over.
    assert float(ops.convert_to_numpy(model.head.logit_bias)) == -3.0
    assert float(ops.convert_to_numpy(model.head.logit_scale)) == 1.5

    pairs = random_pairs(4)
    before = model.predict(pairs, verbose=0)
    scalars = values([model.head.logit_scale, model.head.logit_bias])
    whole.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
    history = whole.fit(pairs, batch_size=4, verbose=0).history
    assert "mask_ratio" not in history
    assert not any(masking.calls for masking in model.maskings)
    after = model.predict(pairs, verbose=0)
    for key, value in before.items():
        assert np.abs(after[key] - value).max() > 1e-5
        found = whole.predict(pairs, verbose=0)[key]
        np.testing.assert_allclose(found, after[key], atol=1e-6)
    for one, other in zip(
        scalars, values([model.head.logit_scale, model.head.logit_bias])
    ):
        assert one != other


@each_model
def test_in_training_it_embeds_what_it_embeds_at_inference(make):
    model = make(kcm.RandomMasking(0.5, seed=0))
    whole = model.without_masking()
    images = random_images(4)
    full = to_numpy(model.encode_image(images))
    np.testing.assert_allclose(
        to_numpy(whole.encode_image(images, training=True)), full, atol=1e-6
    )
    assert np.abs(to_numpy(model.encode_image(images, training=True)) - full).max() > 0
    ids = random_pairs(4)["token_ids"]
    full = to_numpy(model.encode_text(ids))
    found = to_numpy(whole.encode_text(ids, training=True))
    np.testing.assert_allclose(found, full, atol=1e-6)
    difference = np.abs(to_numpy(model.encode_text(ids, training=True)) - full).max()
    assert (difference > 1e-4) == hasattr(model.text_encoder, "masking")


def test_each_of_the_two_trains_in_its_own_way():
    model = generic(kcm.RandomMasking(0.5, seed=0))
    whole = model.without_masking()
    pairs = random_pairs(4)
    for one in (whole, model):
        one.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
        history = one.fit(pairs, batch_size=4, verbose=0).history
        assert ("mask_ratio" in history) == (one is model)


@each_model
def test_an_unmasked_model_saves_and_reloads_alone(make, tmp_path):
    whole = make(kcm.RandomMasking(0.5), micro_batch_size=2).without_masking()
    whole.head.logit_scale.assign(1.25)
    whole.save(tmp_path / "whole.keras")
    loaded = keras.saving.load_model(tmp_path / "whole.keras")
    assert not loaded.maskings
    assert options_of(loaded) == options_of(whole)
    for one, other in zip(values(whole.weights), values(loaded.weights)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.any_backend
def test_a_model_without_a_masking_has_an_unmasked_twin():
    model = generic()
    assert {id(v) for v in model.without_masking().weights} == {
        id(v) for v in model.weights
    }


@pytest.mark.any_backend
def test_a_masking_that_was_built_in_by_hand_is_an_error():
    images = keras.Input((16, 16, 3))
    tokens = keras.layers.Reshape((16, 16))(keras.layers.Conv2D(16, 4, 4)(images))
    tokens = kcm.RandomMasking(0.5, num_prefix_tokens=0)(tokens)
    features = keras.layers.GlobalAveragePooling1D()(tokens)
    model = kcm.ContrastiveModel(keras.Model(images, features), text_bag())
    with pytest.raises(ValueError, match=r"with_masking.*Received:.*random_masking"):
        model.without_masking()


# === Towers ===


@pytest.mark.any_backend
def test_a_tower_takes_no_masking_out_of_the_other_encoder():
    ids = keras.Input((6,), dtype="int32")
    text_encoder = tiny_clip().text_encoder
    tokens = kcm.with_text_masking(text_encoder, kcm.RandomMasking(0.5))(ids)
    pooled = keras.Model(ids, keras.layers.GlobalAveragePooling1D()(tokens))
    masking = kcm.RandomMasking(0.5, num_prefix_tokens=0)
    encoder = kcm.with_masking(functional_vit(), masking, "positions")
    model = kcm.ContrastiveModel(encoder, pooled)
    pairs = random_pairs(4)
    for tower, key in ((model.image_tower, "images"), (model.text_tower, "token_ids")):
        expected = model(pairs)[f"{tower.name.split('_')[0]}_embeddings"]
        found = tower.predict(pairs[key], verbose=0)
        np.testing.assert_allclose(found, to_numpy(expected), atol=1e-6)


@each_model
def test_towers_compute_what_the_model_encodes_with_the_weights_it_has(make):
    model = make(kcm.RandomMasking(0.5))
    pairs = random_pairs(4)
    for _ in range(2):
        for tower, key, encode in (
            (model.image_tower, "images", model.encode_image),
            (model.text_tower, "token_ids", model.encode_text),
        ):
            found = tower.predict(pairs[key], verbose=0)
            assert found.dtype == "float32"
            np.testing.assert_allclose(found, to_numpy(encode(pairs[key])), atol=1e-6)
        floats = random_images(4)
        np.testing.assert_allclose(
            to_numpy(model.image_tower(floats)),
            to_numpy(model.encode_image(floats)),
            atol=1e-6,
        )
        # And again with other weights.
        for weight in model.trainable_variables:
            weight.assign(weight + 0.1)


@pytest.mark.any_backend
@each_model
def test_a_tower_has_its_side_of_the_weights_and_no_masking(make):
    model = make(kcm.RandomMasking(0.5))
    image, text = (
        {id(v) for v in tower.weights}
        for tower in (model.image_tower, model.text_tower)
    )
    left_out = {id(v) for masking in model.maskings for v in masking.weights}
    left_out |= {id(model.head.logit_scale), id(model.head.logit_bias)}
    assert not image & text
    assert image | text == {id(v) for v in model.weights} - left_out
    # The model itself holds none of it twice.
    assert len(model.weights) == len(image) + len(text) + len(left_out)


@each_model
def test_towers_never_mask(make):
    model, ids = make(kcm.RandomMasking(0.5)), random_pairs(4)["token_ids"]
    towers = (model.image_tower, random_images(4)), (model.text_tower, ids)
    for tower, inputs in towers:
        np.testing.assert_array_equal(
            to_numpy(tower(inputs, training=True)), to_numpy(tower(inputs))
        )


@each_model
def test_a_model_that_gave_its_towers_away_saves_as_before(make, tmp_path):
    model = make(kcm.RandomMasking(0.5))
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    pairs = random_pairs(4)
    model.fit(pairs, batch_size=4, verbose=0)
    assert model.image_tower is model.image_tower
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(values(model.variables), values(loaded.variables)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        loaded.image_tower.predict(pairs["images"], verbose=0),
        model.image_tower.predict(pairs["images"], verbose=0),
    )
