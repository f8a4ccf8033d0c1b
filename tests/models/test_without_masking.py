"""Models that a ContrastiveModel gives away: unmasked ones, and its towers."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_close,
    ids_of,
    masked_vit,
    random_images,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    values,
)


def generic(masking, **kwargs):
    options = dict(loss="sigmoid", projection_dim=5, **kwargs)
    return kcm.ContrastiveModel(masked_vit(masking), text_bag(), **options)


def clip(masking, **kwargs):
    head = kcm.models.ContrastiveHead("sigmoid", initial_temperature=0.2)
    return kcm.ContrastiveModel.from_backbone(tiny_clip(), masking, head=head, **kwargs)


def siglip(masking, **kwargs):
    return kcm.ContrastiveModel.from_backbone(tiny_siglip(), masking, **kwargs)


def metaclip(masking):
    return kcm.ContrastiveModel.from_backbone(tiny_metaclip(), masking)


each_model = pytest.mark.parametrize("make", [generic, clip, siglip])


# === Without masking ===


@pytest.mark.one_case
@each_model
def test_training_whole_images_trains_the_masked_model(make):
    model = make(kcm.RandomMasking(0.5, seed=0), views=2)
    model.head.logit_bias.assign(-3.0)
    model.head.logit_scale.assign(1.5)
    whole = model.without_masking()
    assert type(whole) is type(model)
    assert (model.views, whole.views) == (2, 1)
    state = ids_of(model.maskings[0].weights)
    assert ids_of(whole.weights) == ids_of(model.weights) - state

    pairs, images = random_pairs(4), random_images(4)
    found = whole.encode_image(images, training=True)
    assert_close(found, model.encode_image(images))
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
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        # Its config omits an argument.
        (Forgetful, "`Forgetful` must.*Received: .*factor"),
        # It has weights of its own.
        (Owner, "weights only in .*Received: .*Owner"),
    ],
)
def test_a_subclass_that_cannot_be_made_again_keeps_its_masking(kind, match):
    model = kind(masked_vit(kcm.RandomMasking()), text_bag())
    with pytest.raises(ValueError, match=match):
        model.without_masking()
    assert model.image_tower(random_images(2)).shape == (2, 16)


# === Towers ===


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [generic, clip, siglip, metaclip])
def test_towers_embed_whole_inputs_with_the_weights_that_the_model_has(make):
    model, pairs = make(kcm.RandomMasking(0.5, seed=0)), random_pairs(4)
    # The end token of MetaCLIP 2.
    pairs["token_ids"][:, -2] = 2
    for _ in range(2):
        for tower, inputs, encode in (
            (model.image_tower, pairs["images"], model.encode_image),
            (model.image_tower, random_images(4), model.encode_image),
            (model.text_tower, pairs["token_ids"], model.encode_text),
        ):
            assert_close(tower(inputs, training=True), encode(inputs))
        # And again with other weights.
        for weight in model.trainable_variables:
            weight.assign(weight + 0.1)


@pytest.mark.any_backend
@each_model
def test_a_tower_has_its_side_of_the_weights_and_no_masking(make):
    model = make(kcm.RandomMasking(0.5, seed=0))
    image, text = ids_of(model.image_tower.weights), ids_of(model.text_tower.weights)
    left_out = ids_of(model.maskings[0].weights)
    left_out |= {id(model.head.logit_scale), id(model.head.logit_bias)}
    assert not image & text
    assert image | text == ids_of(model.weights) - left_out
    # The model itself holds none of it twice.
    assert len(model.weights) == len(image) + len(text) + len(left_out)
