"""Models that a ContrastiveModel gives away: unmasked ones, and its towers."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    ids_of,
    masked_vit,
    random_images,
    random_pairs,
    reloaded,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
)


def generic(masking, **kwargs):
    options = dict(loss="sigmoid", projection_dim=5, **kwargs)
    return kcm.ContrastiveModel(masked_vit(masking), text_bag(), **options)


def clip(masking, **kwargs):
    kwargs.setdefault(
        "head", kcm.models.ContrastiveHead("sigmoid", initial_temperature=0.2)
    )
    return kcm.ContrastiveModel.from_backbone(tiny_clip(), masking, **kwargs)


def siglip(masking, **kwargs):
    return kcm.ContrastiveModel.from_backbone(tiny_siglip(), masking, **kwargs)


def metaclip(masking):
    return kcm.ContrastiveModel.from_backbone(tiny_metaclip(), masking)


def random_masking(make):
    prefix = 0 if make in (generic, siglip) else 1
    return kcm.RandomMasking(0.5, num_prefix_tokens=prefix, seed=0)


each_model = pytest.mark.parametrize("make", [generic, clip, siglip])


# === Without masking ===


@pytest.mark.one_case
@each_model
def test_training_whole_images_trains_the_masked_model(make):
    model = make(random_masking(make), views=2)
    model.head.logit_bias.assign(-3.0)
    model.head.logit_scale.assign(1.5)
    whole = model.without_masking()
    assert type(whole) is type(model)
    assert (model.views, whole.views) == (2, 1)
    state = ids_of(model.maskings[0].weights)
    assert ids_of(whole.weights) == ids_of(model.weights) - state

    pairs, images = random_pairs(4), random_images(4)
    full = to_numpy(model.encode_image(images))
    found = to_numpy(whole.encode_image(images, training=True))
    np.testing.assert_allclose(found, full, atol=1e-6)
    before = model.predict(pairs, verbose=0)
    # Nothing that was learned starts over.
    assert values([model.head.logit_scale, model.head.logit_bias]) == [1.5, -3.0]
    whole.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
    history = whole.fit(pairs, batch_size=4, verbose=0).history
    assert "mask_ratio" not in history
    after = model.predict(pairs, verbose=0)
    assert_close(whole.predict(pairs, verbose=0), after)
    assert all(np.abs(after[key] - x).max() > 1e-5 for key, x in before.items())
    moved = values([model.head.logit_scale, model.head.logit_bias])
    assert not {1.5, -3.0} & {*map(float, moved)}
    # The masked model still masks.
    model.compile(optimizer="sgd", **FAST)
    history = model.fit(pairs, batch_size=4, verbose=0).history
    assert history["mask_ratio"] == [0.5]


class WithFactor:
    """A model with an option of its own, which its embeddings depend on."""

    def __init__(self, *args, factor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def call(self, inputs, training=None):
        found = super().call(inputs, training)
        return {name: self.factor * value for name, value in found.items()}

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Scaled(WithFactor, kcm.ContrastiveModel):
    pass


def scaled(masking):
    return Scaled(masked_vit(masking), text_bag(), factor=3.0)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make", [scaled, lambda x: Scaled.from_backbone(tiny_clip(), x, factor=3.0)]
)
def test_an_unmasked_model_has_the_options_of_a_subclass(make):
    model, pairs = make(kcm.RandomMasking(0.5)), random_pairs(2)
    whole = model.without_masking()
    assert (whole.factor, whole.maskings) == (3.0, [])
    found = whole.predict(pairs, verbose=0)
    assert_close(found, model.predict(pairs, verbose=0))
    lengths = np.linalg.norm([*found.values()], axis=-1)
    np.testing.assert_allclose(lengths, 3.0, atol=1e-5)


class Owner(Scaled):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = keras.layers.Dense(3)
        self.extra.build((None, 3))


class Forgetful(Scaled):
    def get_config(self):
        return kcm.ContrastiveModel.get_config(self)


@pytest.mark.any_backend
def test_a_subclass_whose_config_omits_an_argument_keeps_its_masking():
    model = Forgetful(masked_vit(kcm.RandomMasking()), text_bag(), factor=3.0)
    with pytest.raises(ValueError, match=r"`Forgetful` must.*Received: .*factor"):
        model.without_masking()


@pytest.mark.any_backend
def test_a_subclass_with_weights_of_its_own_keeps_its_masking():
    model = Owner(masked_vit(kcm.RandomMasking()), text_bag())
    with pytest.raises(ValueError, match=r"no weights but .*Received: .*Owner"):
        model.without_masking()
    assert model.image_tower(random_images(2)).shape == (2, 16)


# === Towers ===


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [generic, clip, siglip, metaclip])
def test_towers_embed_whole_inputs_with_the_weights_that_the_model_has(make):
    model, pairs = make(random_masking(make)), random_pairs(4)
    # The end token of MetaCLIP 2.
    pairs["token_ids"][:, -2] = 2
    image_tower, text_tower = model.image_tower, model.text_tower
    assert model.image_tower is image_tower
    for _ in range(2):
        for tower, inputs, encode in (
            (image_tower, pairs["images"], model.encode_image),
            (image_tower, random_images(4), model.encode_image),
            (text_tower, pairs["token_ids"], model.encode_text),
        ):
            found = to_numpy(tower(inputs, training=True))
            np.testing.assert_allclose(found, to_numpy(encode(inputs)), atol=1e-6)
        # And again with other weights.
        for weight in model.trainable_variables:
            weight.assign(weight + 0.1)


@pytest.mark.any_backend
@each_model
def test_a_tower_has_its_side_of_the_weights_and_no_masking(make):
    model = make(random_masking(make))
    image, text = ids_of(model.image_tower.weights), ids_of(model.text_tower.weights)
    left_out = ids_of(model.maskings[0].weights)
    left_out |= {id(model.head.logit_scale), id(model.head.logit_bias)}
    assert not image & text
    assert image | text == ids_of(model.weights) - left_out
    # The model itself holds none of it twice.
    assert len(model.weights) == len(image) + len(text) + len(left_out)


@pytest.mark.any_backend
@each_model
def test_a_model_that_gave_its_towers_away_saves_as_before(make, tmp_path):
    model = make(random_masking(make))
    images = random_pairs(4)["images"]
    expected = model.image_tower.predict(images, verbose=0)
    loaded = reloaded(model, tmp_path)
    assert_same_values(model.variables, loaded.variables)
    found = loaded.image_tower.predict(images, verbose=0)
    np.testing.assert_array_equal(found, expected)
