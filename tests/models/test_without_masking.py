"""Whole images: a mask ratio of 0, a model without masking, and towers."""

import keras
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    functional_vit,
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
    return kcm.ContrastiveModel.from_backbone(
        tiny_clip(), masking=masking, head=head, **kwargs
    )


def siglip(masking, **kwargs):
    return kcm.ContrastiveModel.from_backbone(tiny_siglip(), masking=masking, **kwargs)


def metaclip(masking):
    return kcm.ContrastiveModel.from_backbone(tiny_metaclip(), masking=masking)


each_model = pytest.mark.parametrize("make", [generic, clip, siglip])


# === A mask ratio of 0 ===


@pytest.mark.parametrize(
    "masking",
    [
        kcm.RandomMasking(0.5),
        kcm.GridMasking(2),
        kcm.ClusterMasking(
            0.5, patch_size=4, min_mask_ratio=0.25, threshold=0.1, embedding_weight=0.5
        ),
    ],
    ids=["budget", "grid", "threshold"],
)
def test_a_mask_ratio_of_0_trains_on_whole_images(masking):
    model = kcm.ContrastiveModel(masked_vit(masking), text_bag())
    whole = kcm.ContrastiveModel(functional_vit(), text_bag())
    for each in (model, whole):
        each.compile(keras.optimizers.SGD(0.1), **FAST)
    pairs, fit = random_pairs(8), dict(batch_size=4, shuffle=False, verbose=0)
    ratio, state = masking.mask_ratio, [*masking.variables]
    state.remove(masking.last_mask_ratio)

    assert model.fit(pairs, **fit).history["mask_ratio"][0] > 0.2
    trained = values(model.trainable_variables)
    for weight, value in zip(whole.trainable_variables, trained):
        weight.assign(value)
    before = values(state)
    masking.mask_ratio = 0.0
    history, expected = (x.fit(pairs, **fit).history for x in (model, whole))
    assert history.pop("mask_ratio") == [0.0]
    assert_close(history, expected, 1e-5)
    assert_close(model.trainable_variables, whole.trainable_variables, 1e-5)
    # The threshold and the noise wait for the next step that masks.
    assert_same_values(state, before)
    masking.mask_ratio = ratio
    assert model.fit(pairs, **fit).history["mask_ratio"][0] > 0.2


@pytest.mark.any_backend
def test_a_masking_with_a_ratio_of_0_is_loaded():
    masking = kcm.ClusterMasking(
        0.5, patch_size=4, min_mask_ratio=0.25, threshold=0.1, embedding_weight=0.5
    )
    masking.mask_ratio = 0.0
    loaded = kcm.ClusterMasking.from_config(masking.get_config())
    assert (loaded.mask_ratio, loaded.num_kept(16)) == (0.0, 16)


# === Without masking ===


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


@pytest.mark.any_backend
def test_a_model_without_masking_has_the_same_weights_and_options():
    model = Scaled.from_backbone(tiny_clip(), masking=kcm.RandomMasking(), factor=3.0)
    whole, pairs = model.without_masking(), random_pairs(2)
    assert (type(whole), whole.factor) == (Scaled, 3.0)
    assert ids_of(whole.weights) == ids_of(model.weights) - ids_of(
        model.masking.weights
    )
    assert_close(whole.predict(pairs, verbose=0), model.predict(pairs, verbose=0))


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
    ("kind", "is_own", "match"),
    [
        # Its config omits an argument.
        (Forgetful, False, "`Forgetful` must.*Received: .*factor"),
        # It has weights of its own.
        (Owner, False, "weights only in .*Received: .*Owner"),
        # Its encoder is not that of `with_masking`, but holds it.
        (Scaled, True, "masking must come from `kcm.with_masking`.*Received: "),
    ],
)
def test_a_model_that_cannot_be_made_again_keeps_its_masking(kind, is_own, match):
    encoder = masked_vit(kcm.RandomMasking())
    encoder = keras.Sequential([encoder]) if is_own else encoder
    with pytest.raises(ValueError, match=match):
        kind(encoder, text_bag()).without_masking()


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
def test_a_tower_has_its_side_of_the_weights(make):
    model = make(kcm.RandomMasking(0.5, seed=0))
    image, text = ids_of(model.image_tower.weights), ids_of(model.text_tower.weights)
    left_out = {*map(id, model.head.weights)}
    assert not image & text
    assert image | text == ids_of(model.weights) - left_out
    # The model itself holds none of it twice.
    assert len(model.weights) == len(image) + len(text) + len(left_out)
