"""The last blocks of pre-trained encoders, or LoRA, are trained."""

import contextlib
import warnings
import weakref

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models.encoders import BLOCKS
from keras_cluster_mask.training.layers import all_layers
from tests.callbacks.training_run import StopAfter
from tests.helpers import (
    FAST,
    TRANSFORMER,
    as_trained,
    assert_same_values,
    make_backbone,
    random_pairs,
    small_model,
    tiny_clip,
    to_numpy,
    values,
)

# Families of the encoders, and how many weights follow the last block of each.
FAMILIES = {
    ("ViT", "Bert"): (2, 0),
    ("DeiT", "Roberta"): (2, 0),
    ("DINOV2", "DistilBert"): (2, 0),
    ("DINOV3", "Bert"): (2, 0),
    ("CLIP",): (2, 2),
    ("MetaCLIP2",): (2, 2),
    # With a pooling and a projection in the encoders.
    ("SigLIP",): (17, 4),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make_model(images="ViT", texts="Bert", depth=2, masked=True, **options):
    masking = kcm.RandomMasking(0.5) if masked else None
    sizes = {**TRANSFORMER, "num_layers": depth}
    if hasattr(keras_hub.models, f"{images}VisionEncoder"):
        projection = {} if images == "SigLIP" else {"projection_dim": 16}
        backbone = make_backbone(images, sizes=sizes, **projection)
        return kcm.ContrastiveModel.from_backbone(backbone, masking)
    of_images = {**sizes, "patch_size": 4, "image_shape": (16, 16, 3)}
    if images == "ViT":
        of_images["mlp_dim"] = of_images.pop("intermediate_dim")
    of_texts = {**sizes, "vocabulary_size": 30, "max_sequence_length": 8}
    encoders = (
        getattr(keras_hub.models, f"{name}Backbone")(**given)
        for name, given in ((images, of_images), (texts, of_texts))
    )
    return kcm.ContrastiveModel.from_encoders(*encoders, 4, masking, **options)


def pairs():
    """Pairs without padding of any family, with the end token of MetaCLIP 2."""
    found = random_pairs(4)
    found["token_ids"] = found["token_ids"].clip(3)
    found["token_ids"][:, -1] = 2
    return found


def fit(model, **options):
    return model.fit(pairs(), batch_size=4, shuffle=False, verbose=0, **options)


def blocks_of(encoder):
    blocks = [x for x in all_layers(encoder) if type(x).__name__ in BLOCKS]
    return sorted(blocks, key=lambda x: x.name)


def trained_in(encoder):
    return {id(v) for v in encoder.trainable_weights}


@pytest.mark.any_backend
@each_family
def test_the_last_blocks_and_what_follows_are_trained(family):
    model = make_model(*family)
    encoders = model.image_encoder, model.text_encoder
    others = trained_in(model) - trained_in(encoders[0]) - trained_in(encoders[1])
    kcm.train_last_blocks(model, image=1, text=1)
    for encoder, after in zip(encoders, FAMILIES[family]):
        own = {id(v) for v in blocks_of(encoder)[1].weights}
        assert own <= trained_in(encoder)
        assert len(trained_in(encoder)) == len(own) + after
    kcm.train_last_blocks(model, image=2, text=0)
    own = {id(v) for block in blocks_of(encoders[0]) for v in block.weights}
    assert len(trained_in(encoders[0])) == len(own) + FAMILIES[family][0]
    assert trained_in(model) == trained_in(encoders[0]) | others


@pytest.mark.any_backend
@each_family
def test_lora_trains_factors_alone_and_is_merged_in_a_file(family, tmp_path):
    model = make_model(*family)
    before = model.predict(pairs(), verbose=0)
    kcm.enable_lora(model, rank=2, text=True)
    for encoder in (model.image_encoder, model.text_encoder):
        names = {v.name for v in encoder.trainable_weights}
        assert names == {"lora_kernel_a", "lora_kernel_b"}
    for key, value in model.predict(pairs(), verbose=0).items():
        np.testing.assert_array_equal(value, before[key])
    as_trained(model)
    expected = model.predict(pairs(), verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    for key, value in loaded.predict(pairs(), verbose=0).items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5)
        assert np.abs(value - before[key]).max() > 0.01
    assert not loaded.image_encoder.trainable_weights
    assert not loaded.text_encoder.trainable_weights
    kcm.enable_lora(loaded, rank=2, text=True)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)


@pytest.mark.any_backend
def test_biases_that_keras_hub_trains_with_lora_are_trained_after_a_reload(tmp_path):
    model = make_model("CLIP")
    model.backbone.enable_lora(2)
    expected = [v.path for v in model.trainable_weights if "lora" not in v.name]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.trainable_weights] == expected


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("change", [kcm.enable_lora, kcm.train_last_blocks])
def test_only_what_is_trained_changes_once_the_model_is_compiled(change):
    model = make_model()
    model.compile("adam", **FAST)
    fit(model)
    change(model)
    with pytest.raises(ValueError, match=r"compile\(\)"):
        fit(model)
    # It shares all weights but those of the masking.
    whole = model.without_masking()
    assert trained_in(whole) == trained_in(model)
    frozen, trained = whole.non_trainable_weights, whole.trainable_weights
    before = values(frozen), values(trained)
    for each in (model, whole):
        each.compile(keras.optimizers.Adam(0.1), **FAST)
        fit(each)
    assert_same_values(frozen, before[0])
    for one, other in zip(values(trained), before[1]):
        assert np.any(one != other)


# === Checkpoints ===


def run(part, folder, stop=None):
    keras.utils.set_random_seed(0)
    model = make_model()
    if part == "LoRA":
        kcm.enable_lora(model)
    else:
        kcm.train_last_blocks(model, image=1)
    if part == "first block":
        first, last = blocks_of(model.image_encoder)
        first.trainable, last.trainable = True, False
    model.compile("adam", **FAST)
    callbacks = [kcm.callbacks.Checkpoint(folder), *([StopAfter(stop)] if stop else [])]
    with contextlib.suppress(KeyboardInterrupt):
        fit(model, epochs=3, resume_from=folder, callbacks=callbacks)
    return values([*model.variables, *model.optimizer.variables])


@pytest.mark.any_backend
@pytest.mark.parametrize("part", ["LoRA", "last block"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(part, tmp_path):
    expected = run(part, tmp_path / "whole")
    run(part, tmp_path / "stopped", stop=2)
    assert_same_values(run(part, tmp_path / "stopped"), expected)


@pytest.mark.any_backend
@pytest.mark.parametrize("other", ["LoRA", "first block"])
def test_a_checkpoint_of_other_trained_parts_is_refused(other, tmp_path):
    run("last block", tmp_path, stop=2)
    with pytest.raises(ValueError, match=r"frozen weights: .* in the checkpoint"):
        run(other, tmp_path)


# === Memory ===


def kept(model):
    """The number of bytes that a forward pass keeps for the backward pass."""
    if keras.backend.backend() == "torch":
        import torch

        saved = []

        def pack(x):
            x = x.detach()
            saved.append(weakref.ref(x))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _outputs = model(pairs(), training=True)
        return sum(x.nbytes for ref in saved if (x := ref()) is not None)
    import jax

    def run(weights):
        others = [v.value for v in model.non_trainable_variables]
        return model.stateless_call(weights, others, pairs(), training=True)[0]

    _, backward = jax.vjp(run, [v.value for v in model.trainable_variables])
    return sum(x.nbytes for x in jax.tree.leaves(backward))


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="A compiled step plans its memory; the tape of an eager one keeps all.",
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_is_kept_for_frozen_blocks(masked, checkpointing):
    options = dict(masked=masked, gradient_checkpointing=checkpointing)
    sizes = {}
    for depth in (2, 3):
        model = make_model(depth=depth, **options)
        for count in (1, 2):
            kcm.train_last_blocks(model, image=count, text=count)
            sizes[depth, count] = kept(model)
    assert sizes[2, 1] == sizes[3, 1] < sizes[2, 2] == sizes[3, 2]


# === Copies ===


@pytest.mark.any_backend
def test_a_teacher_follows_an_encoder_merged_with_its_lora(tmp_path):
    backbone = tiny_clip()
    teacher = kcm.models.MomentumEncoder(backbone.vision_encoder, 0.0, 0.0, steps=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.AttentiveMasking(teacher))
    kcm.enable_lora(model, rank=2)
    as_trained(model)
    teacher.update()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(
        teacher.copied_weights, loaded.backbone.vision_encoder.weights, strict=True
    ):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), atol=1e-5)


# === Refusals ===


def lora_model():
    model = make_model()
    kcm.enable_lora(model)
    return model


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "change", "options", "match"),
    [
        (make_model, "train_last_blocks", {"image": 3}, "`image` must not exceed.* 2"),
        (make_model, "train_last_blocks", {"text": -1}, "`text` must be an integer"),
        (make_model, "train_last_blocks", {"image": 1.0}, "`image` must be an integer"),
        (small_model, "train_last_blocks", {}, "`image` must not exceed.* 0"),
        (lora_model, "train_last_blocks", {}, "`model` must have no LoRA"),
        (lora_model, "enable_lora", {}, "`model` must have no LoRA"),
        (make_model, "enable_lora", {"rank": 0}, "`rank` must be an integer"),
        (small_model, "enable_lora", {}, "`layer_names` must name layers of the image"),
        (make_model, "enable_lora", {"layer_names": ["q"]}, "`layer_names`.*'query'"),
        (make_model, "enable_lora", {"layer_names": "queryx"}, "`layer_names`"),
        (make_model, "enable_lora", {"layer_names": ["query", "no such"]}, "`layer_n"),
    ],
)
def test_what_cannot_be_done_is_refused(make, change, options, match):
    model = make()
    with pytest.raises(ValueError, match=rf"(?s){match}.*Received: "):
        getattr(kcm, change)(model, **options)


@pytest.mark.one_case
def test_models_that_share_weights_predict_with_lora():
    masked = kcm.ContrastiveModel.from_backbone(tiny_clip(), kcm.RandomMasking(0.5))
    whole, pairs = masked.without_masking(), random_pairs(4)
    for model in (masked, whole):
        model.predict(pairs, verbose=0)
    masked.image_tower.predict(pairs["images"], verbose=0)
    kcm.enable_lora(masked, rank=2)
    as_trained(masked)
    expected = to_numpy(masked.encode_image(pairs["images"]))
    for model in (masked, whole):
        found = model.predict(pairs, verbose=0)["image_embeddings"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    found = masked.image_tower.predict(pairs["images"], verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
