"""ContrastiveModel.from_clip: it trains the backbone itself."""

import math

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models import CLIPContrastiveModel, clip_backbone
from tests.helpers import (
    FAST,
    random_pairs,
    tiny_clip,
    tiny_siglip,
    to_numpy,
    values,
)


@pytest.fixture(scope="module")
def trained():
    """A backbone, the model that trained it, its pairs, and the weights before."""
    backbone = tiny_clip()
    before = values(backbone.weights)
    masking = kcm.ClusterMasking(4, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    pairs = random_pairs(8)
    model.fit(pairs, batch_size=8, verbose=0)
    return backbone, model, pairs, before


def position_ids(backbone):
    return ops.convert_to_numpy(backbone.vision_encoder.embedding.position_ids)


@pytest.mark.any_backend
def test_a_fresh_backbone_gets_its_patches_numbered():
    fresh = tiny_clip()
    assert not position_ids(fresh).any()
    kcm.ContrastiveModel.from_backbone(fresh)
    np.testing.assert_array_equal(position_ids(fresh), [np.arange(17)])
    made = clip_backbone("tiny", image_size=16, vocabulary_size=30, context_length=6)
    np.testing.assert_array_equal(position_ids(made), [np.arange(5)])


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_arguments_that_a_given_head_defines_must_agree_with_it(make):
    backbone = make()
    head = kcm.ContrastiveModel.from_backbone(backbone, max_logit_scale=50.0).head
    with pytest.raises(
        ValueError, match=r"`max_logit_scale`.*Received: .*=100.0, .*50"
    ):
        kcm.ContrastiveModel.from_backbone(backbone, head=head)
    other = {"loss": "softmax" if head.loss == "sigmoid" else "sigmoid"}
    with pytest.raises(ValueError, match=r"`loss`.*Received: "):
        kcm.ContrastiveModel.from_backbone(
            backbone, head=head, max_logit_scale=50.0, **other
        )
    same = kcm.ContrastiveModel.from_backbone(backbone, head=head, max_logit_scale=50.0)
    assert same.head is head


@pytest.mark.any_backend
def test_positions_of_a_trained_backbone_stay():
    backbone = tiny_clip()
    given = np.arange(17)[None, ::-1].copy()
    backbone.vision_encoder.embedding.position_ids.assign(given)
    kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4))
    np.testing.assert_array_equal(position_ids(backbone), given)


def test_embeddings_are_the_backbones_own():
    backbone = tiny_clip()
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.ClusterMasking(4))
    pairs = random_pairs(4)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
    for one, other in (
        (model.encode_image(images), backbone.get_vision_embeddings(images)),
        (
            model.encode_text(pairs["token_ids"]),
            backbone.get_text_embeddings(pairs["token_ids"]),
        ),
    ):
        other = to_numpy(other)
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        np.testing.assert_allclose(to_numpy(one), other, atol=1e-6)


def test_a_fit_trains_all_of_the_backbone(trained):
    backbone, _, _, before = trained
    still = [
        v.path
        for v, old in zip(backbone.weights, before)
        if v.trainable and np.array_equal(ops.convert_to_numpy(v), old)
    ]
    # A key's bias has no influence on a softmax over keys, except by rounding.
    assert all("key" in path and "bias" in path for path in still), still
    moved = {v.path: old for v, old in zip(backbone.weights, before)}
    scale = backbone.clip_head.logit_scale
    assert float(ops.convert_to_numpy(scale)) != float(moved[scale.path])


@pytest.mark.any_backend
def test_the_model_adds_the_weights_of_the_masking_and_nothing_else(trained):
    backbone, model, _, _ = trained
    assert len(model.weights) == len({id(v) for v in model.weights})
    assert {id(v) for v in model.weights} == {id(v) for v in backbone.weights} | {
        id(v) for v in model.masking.weights
    }
    assert model.head.logit_scale is backbone.clip_head.logit_scale
    sigmoid = kcm.ContrastiveModel.from_backbone(tiny_clip(), loss="sigmoid")
    assert len(sigmoid.weights) == len(backbone.weights) + 1
    assert float(ops.convert_to_numpy(sigmoid.head.logit_bias)) == -10.0


def test_the_temperature_is_the_backbones_unless_given():
    backbone = tiny_clip()
    backbone.clip_head.logit_scale.assign(1.5)
    kept = kcm.ContrastiveModel.from_backbone(backbone)
    assert float(ops.convert_to_numpy(kept.head.scale)) == pytest.approx(math.exp(1.5))
    given = kcm.ContrastiveModel.from_backbone(backbone, initial_temperature=0.5)
    assert float(ops.convert_to_numpy(given.head.scale)) == pytest.approx(2.0)


def test_keras_hub_alone_reads_what_was_trained(trained, tmp_path):
    backbone, model, pairs, _ = trained
    backbone.save_to_preset(str(tmp_path))
    loaded = keras_hub.models.CLIPBackbone.from_preset(str(tmp_path))
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
    ids = pairs["token_ids"][:4]
    np.testing.assert_array_equal(
        to_numpy(loaded.get_vision_embeddings(images)),
        to_numpy(backbone.get_vision_embeddings(images)),
    )
    np.testing.assert_array_equal(
        to_numpy(loaded.get_text_embeddings(ids)),
        to_numpy(backbone.get_text_embeddings(ids)),
    )
    again = kcm.ContrastiveModel.from_backbone(loaded)
    np.testing.assert_allclose(
        to_numpy(again.encode_image(images)),
        to_numpy(model.encode_image(images)),
        atol=1e-6,
    )
    assert float(ops.convert_to_numpy(again.head.scale)) == pytest.approx(
        float(ops.convert_to_numpy(model.head.scale)), rel=1e-6
    )


def test_after_a_reload_a_fit_trains_the_reloaded_backbone(trained, tmp_path):
    _, model, pairs, _ = trained
    model.save(tmp_path / "clip.keras")
    loaded = keras.saving.load_model(tmp_path / "clip.keras")
    assert isinstance(loaded, CLIPContrastiveModel)
    for key, value in model.predict(pairs, verbose=0).items():
        np.testing.assert_array_equal(loaded.predict(pairs, verbose=0)[key], value)

    assert loaded.head.logit_scale is loaded.backbone.clip_head.logit_scale
    assert len(loaded.weights) == len(model.weights)
    images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")

    def embed():
        return (
            to_numpy(loaded.backbone.get_vision_embeddings(images)),
            to_numpy(loaded.backbone.get_text_embeddings(pairs["token_ids"])),
            to_numpy(loaded.backbone.clip_head.logit_scale),
        )

    before = embed()
    loaded.fit(pairs, batch_size=8, verbose=0)
    for one, other in zip(before, embed()):
        assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("by_policy", [False, True])
def test_mixed_precision_gives_float32_unit_vectors_and_a_float32_scale(by_policy):
    if by_policy:
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        backbone = tiny_clip(dtype=None if by_policy else "mixed_bfloat16")
        masking = kcm.ClusterMasking(4, seed=1)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking)
        backbone.clip_head.logit_scale.assign(2.71828)
        pairs = random_pairs(4)
        model.compile(optimizer=keras.optimizers.SGD(0.0), **FAST)
        for embeddings in model.predict(pairs, verbose=0).values():
            assert embeddings.dtype == "float32"
            lengths = np.linalg.norm(embeddings, axis=1)
            np.testing.assert_allclose(lengths, 1.0, atol=1e-5)
        history = model.fit(pairs, batch_size=4, verbose=0).history
        temperature = math.exp(-np.float32(2.71828))
        assert history["temperature"][0] == pytest.approx(temperature, rel=1e-6)
        assert np.isfinite(history["loss"][0])
    finally:
        keras.config.set_dtype_policy("float32")


class Stop(Exception):
    pass


class SpyMasking(kcm.ClusterMasking):
    """Keeps what it was given and what it selected, and ends the call there."""

    def score(self, noise, images=None, tokens=None):
        self.seen = keras.backend.standardize_dtype(images.dtype)
        self.scores = super().score(noise, images, tokens)
        raise Stop


@pytest.mark.parametrize("kind", ["policy", "backbone"])
def test_masks_are_those_of_full_precision_in_mixed_precision(kind):
    # Two sorts of patches that only float32 can distinguish, far from 0.
    rng = np.random.default_rng(0)
    images = np.tile(rng.normal(size=(4, 4, 3)), (8, 4, 4, 1)) * 0.01 + 8.0
    images = (images + 0.01 * rng.normal(size=images.shape)).astype("float32")

    def scores(policy, dtype, images):
        keras.config.set_dtype_policy(policy)
        try:
            masking = SpyMasking(4, seed=7, anchor_ratio=0.1)
            model = kcm.ContrastiveModel.from_backbone(tiny_clip(dtype), masking)
            with pytest.raises(Stop):
                model({**random_pairs(8), "images": images}, training=True)
        finally:
            keras.config.set_dtype_policy("float32")
        assert masking.seen == "float32"
        return ops.convert_to_numpy(masking.scores)

    full = scores("float32", None, images)
    if kind == "policy":
        mixed = scores("mixed_bfloat16", None, images)
    else:
        mixed = scores("float32", "mixed_bfloat16", images)
    np.testing.assert_array_equal(mixed, full)
    # And the images are such that rounding them first would have been seen.
    rounded = to_numpy(ops.cast(images, "bfloat16"))
    assert np.any(scores("float32", None, rounded) != full)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("temperature", "scale"), [(None, 10.0), (0.05, 20.0)], ids=["default", "given"]
)
def test_a_sigmoid_loss_starts_at_the_temperature_of_siglip(temperature, scale):
    model = kcm.ContrastiveModel.from_backbone(
        tiny_clip(), loss="sigmoid", initial_temperature=temperature
    )
    found, bias = (float(ops.convert_to_numpy(x)) for x in model.head.loss_weights)
    assert found == pytest.approx(scale, rel=1e-6)
    assert bias == -10.0


@pytest.mark.any_backend
def test_the_dtype_is_the_backbones():
    with pytest.raises(ValueError, match=r"`dtype` must be given to the backbone.*Rec"):
        kcm.ContrastiveModel.from_backbone(tiny_clip(), dtype="mixed_bfloat16")


@pytest.mark.any_backend
def test_something_that_is_no_backbone_is_refused():
    for thing in (tiny_clip().vision_encoder, "clip_vit_base_patch16", None):
        with pytest.raises(
            ValueError, match=r"CLIPBackbone.*SigLIPBackbone.*Received:"
        ):
            kcm.ContrastiveModel.from_backbone(thing)


def test_jax_compiles_a_step_once():
    # A weight that starts from a Python number would change its type with the first.
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    if keras.backend.backend() == "jax":
        assert not model.head.logit_scale.value.weak_type
    assert keras.backend.standardize_dtype(model.head.logit_scale.dtype) == "float32"


@pytest.mark.any_backend
def test_a_subclass_makes_models_of_its_own_or_says_what_to_derive_it_from():
    class Halved(kcm.models.CLIPContrastiveModel):
        def compute_loss(self, *args, **kwargs):
            return 0.5 * super().compute_loss(*args, **kwargs)

    losses = []
    for kind in (Halved, kcm.ContrastiveModel):
        keras.utils.set_random_seed(0)
        model = kind.from_backbone(tiny_clip(), kcm.RandomMasking(0.5, seed=1))
        model.compile("sgd", **FAST)
        history = model.fit(random_pairs(4), batch_size=4, verbose=0).history
        losses.append(history["loss"][0])
    assert losses[0] == pytest.approx(losses[1] / 2)

    class Other(kcm.ContrastiveModel):
        pass

    for kind in (Other, kcm.models.SigLIPContrastiveModel):
        message = rf"`CLIPContrastiveModel`.*derive `{kind.__name__}`.*Received: "
        with pytest.raises(ValueError, match=message):
            kind.from_backbone(tiny_clip())
