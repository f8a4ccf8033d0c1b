"""Models that a ContrastiveModel gives away: unmasked ones, and its towers."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_same_values,
    functional_vit,
    random_images,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
)


def generic(masking=None, **kwargs):
    encoder = functional_vit()
    if masking is not None:
        encoder = kcm.with_masking(encoder, masking, "positions")
    options = dict(loss="sigmoid", projection_dim=5, **kwargs)
    return kcm.ContrastiveModel(encoder, text_bag(), **options)


def clip(masking=None, **kwargs):
    options = dict(loss="sigmoid", initial_temperature=0.2, **kwargs)
    return kcm.ContrastiveModel.from_backbone(tiny_clip(), masking, **options)


def siglip(masking=None, **kwargs):
    return kcm.ContrastiveModel.from_backbone(tiny_siglip(), masking, **kwargs)


def metaclip(masking=None):
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
    state = {id(v) for v in model.maskings[0].weights}
    assert {id(v) for v in whole.weights} == {id(v) for v in model.weights} - state

    pairs, images = random_pairs(4), random_images(4)
    full = to_numpy(model.encode_image(images))
    found = to_numpy(whole.encode_image(images, training=True))
    np.testing.assert_allclose(found, full, atol=1e-6)
    before = model.predict(pairs, verbose=0)
    # Nothing that was learned starts over.
    scalars = values([model.head.logit_scale, model.head.logit_bias])
    assert scalars == [1.5, -3.0]
    whole.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
    history = whole.fit(pairs, batch_size=4, verbose=0).history
    assert "mask_ratio" not in history
    after = model.predict(pairs, verbose=0)
    for key, value in whole.predict(pairs, verbose=0).items():
        np.testing.assert_allclose(value, after[key], atol=1e-6)
        assert np.abs(after[key] - before[key]).max() > 1e-5
    for one, other in zip(
        scalars, values([model.head.logit_scale, model.head.logit_bias])
    ):
        assert one != other
    # The masked model still masks.
    model.compile(optimizer="sgd", **FAST)
    history = model.fit(pairs, batch_size=4, verbose=0).history
    assert history["mask_ratio"] == [0.5]


class WithFactor:
    """A model with an option of its own, which its embeddings depend on."""

    def __init__(self, *args, factor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def embed(self, inputs, training=None):
        found = super().embed(inputs, training)
        return {name: self.factor * value for name, value in found.items()}

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Scaled(WithFactor, kcm.ContrastiveModel):
    pass


class ScaledCLIP(WithFactor, kcm.models.CLIPContrastiveModel):
    def __init__(self, *args, factor, **kwargs):
        super().__init__(*args, factor=factor, **kwargs)


def scaled(masking):
    encoder = kcm.with_masking(functional_vit(), masking, "positions")
    return Scaled(encoder, text_bag(), factor=3.0)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make", [scaled, lambda x: ScaledCLIP.from_backbone(tiny_clip(), x, factor=3.0)]
)
def test_an_unmasked_model_has_the_options_of_a_subclass(make):
    model, pairs = make(kcm.RandomMasking(0.5)), random_pairs(2)
    whole = model.without_masking()
    assert (whole.factor, whole.maskings) == (3.0, [])
    expected = model.predict(pairs, verbose=0)
    for key, found in whole.predict(pairs, verbose=0).items():
        np.testing.assert_allclose(found, expected[key], atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 3.0, atol=1e-5)


class Forgetful(Scaled):
    def get_config(self):
        return kcm.ContrastiveModel.get_config(self)


class Owner(Scaled):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = keras.layers.Dense(3)
        self.extra.build((None, 3))


class Maker(kcm.ContrastiveModel):
    def __init__(self, width=16, **kwargs):
        encoder = kcm.with_masking(
            functional_vit(width), kcm.RandomMasking(), "positions"
        )
        super().__init__(encoder, text_bag(width), **kwargs)
        self.width = width

    def get_config(self):
        return {"name": self.name, "width": self.width, "frozen": None}


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("cls", "received"),
    [(Forgetful, "factor"), (Owner, "weights"), (Maker, "image_encoder")],
)
def test_a_subclass_that_cannot_be_made_without_its_masking_is_refused(cls, received):
    encoder = kcm.with_masking(functional_vit(), kcm.RandomMasking(), "positions")
    model = cls() if cls is Maker else cls(encoder, text_bag())
    with pytest.raises(ValueError, match=rf"`{cls.__name__}` .*Received: .*{received}"):
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
    image, text = (
        {id(v) for v in tower.weights}
        for tower in (model.image_tower, model.text_tower)
    )
    left_out = {id(v) for v in model.maskings[0].weights}
    left_out |= {id(model.head.logit_scale), id(model.head.logit_bias)}
    assert not image & text
    assert image | text == {id(v) for v in model.weights} - left_out
    # The model itself holds none of it twice.
    assert len(model.weights) == len(image) + len(text) + len(left_out)


@pytest.mark.any_backend
@each_model
def test_a_model_that_gave_its_towers_away_saves_as_before(make, tmp_path):
    model = make(random_masking(make))
    images = random_pairs(4)["images"]
    expected = model.image_tower.predict(images, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_values(model.variables, loaded.variables)
    found = loaded.image_tower.predict(images, verbose=0)
    np.testing.assert_array_equal(found, expected)
