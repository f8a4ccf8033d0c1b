"""LoRA of keras_hub in the encoders of a `ContrastiveModel`."""

import contextlib

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    FAST,
    TRANSFORMER,
    as_trained,
    assert_close,
    assert_same_values,
    ids_of,
    letters_as_tokens,
    make_backbone,
    random_pairs,
    reloaded,
    tiny_clip,
    to_numpy,
    values,
    vision_encoder,
)
from tests.training.training_run import StopAfter

# Families of the encoders, by name a backbone of both.
FAMILIES = [
    ("ViT", "Bert"),
    ("DeiT", "Roberta"),
    ("DINOV2", "DistilBert"),
    ("DINOV3", "Bert"),
    ("CLIP",),
    ("MetaCLIP2",),
    ("SigLIP",),
]
each_family = pytest.mark.parametrize("family", FAMILIES)
FACTORS = {"lora_kernel_a", "lora_kernel_b"}


def make_model(images="ViT", texts="Bert"):
    masking = kcm.RandomMasking(0.5)
    if hasattr(keras_hub.models, f"{images}VisionEncoder"):
        projection = {} if images == "SigLIP" else {"projection_dim": 16}
        backbone = make_backbone(images, **projection)
        return kcm.ContrastiveModel.from_backbone(backbone, masking=masking), [backbone]
    make_text = getattr(keras_hub.models, f"{texts}Backbone")
    text_encoder = make_text(**TRANSFORMER, vocabulary_size=30, max_sequence_length=8)
    encoders = [vision_encoder(images), text_encoder]
    options = {"projection_dim": 4, "masking": masking}
    return kcm.ContrastiveModel.from_encoders(*encoders, **options), encoders


def add_lora(backbones):
    for backbone in backbones:
        names = None
        if type(backbone).__name__ == "DINOV3Backbone":
            names = ["q_proj", "v_proj"]
        backbone.enable_lora(2, target_layer_names=names)


def pairs():
    """Pairs without padding of any family, with the end token of MetaCLIP 2."""
    found = random_pairs(4)
    found["token_ids"] = found["token_ids"].clip(3)
    found["token_ids"][:, -1] = 2
    return found


def fit(model, **options):
    return model.fit(pairs(), batch_size=4, shuffle=False, verbose=0, **options)


@pytest.mark.any_backend
@each_family
def test_lora_trains_something_and_nothing_else_and_is_merged_in_a_file(
    family, tmp_path
):
    model, backbones = make_model(*family)
    before = model.predict(pairs(), verbose=0)
    add_lora(backbones)
    trained = ids_of(model.trainable_weights)
    for encoder in (model.image_encoder, model.text_encoder):
        names = {v.name for v in encoder.weights if id(v) in trained}
        assert FACTORS <= names <= {*FACTORS, "bias"}
    model.compile("adam", **FAST)
    assert_same_values(model.predict(pairs(), verbose=0), before)
    frozen, trained = model.non_trainable_weights, model.trainable_weights
    # The first factor gets no gradient before the second one is no longer 0.
    start = values(frozen), values(trained)
    fit(model, epochs=2)
    state = {id(v) for masking in model.maskings for v in masking.weights}
    state.add(id(model.head.is_trained))
    for weight, one in zip(frozen, start[0]):
        if id(weight) not in state:
            assert_same_values([weight], [one])
    for weight, one in zip(trained, start[1]):
        # The biases of keys have no influence.
        assert np.any(to_numpy(weight) != one) or weight.name == "bias"
    as_trained(model)
    expected = model.predict(pairs(), verbose=0)
    loaded = reloaded(model, tmp_path, compile=False)
    found = loaded.predict(pairs(), verbose=0)
    assert_close(found, expected, 1e-5)
    assert all(np.abs(x - before[key]).max() > 0.01 for key, x in found.items())
    assert not FACTORS & {v.name for v in loaded.weights}
    # Keras numbers the names of models.
    ends = [v.path.split("/")[-3:] for v in trained if v.name not in FACTORS]
    assert [v.path.split("/")[-3:] for v in loaded.trainable_weights] == ends


# === Checkpoints ===


def run(part, folder, stop=None):
    keras.utils.set_random_seed(0)
    model, (images, texts) = make_model()
    if part == "LoRA":
        add_lora([images, texts])
    else:
        images.get_layer(part).trainable = texts.trainable = False
    model.compile("adam", **FAST)
    callbacks = [kcm.callbacks.Checkpoint(folder), *([StopAfter(stop)] if stop else [])]
    with contextlib.suppress(KeyboardInterrupt):
        fit(model, epochs=3, resume_from=folder, callbacks=callbacks)
    return values([*model.variables, *model.optimizer.variables])


@pytest.mark.any_backend
def test_a_resumed_run_with_lora_ends_as_one_that_was_not_interrupted(tmp_path):
    expected = run("LoRA", tmp_path / "whole")
    run("LoRA", tmp_path / "stopped", stop=2)
    assert_same_values(run("LoRA", tmp_path / "stopped"), expected)


@pytest.mark.any_backend
def test_a_checkpoint_of_other_trained_parts_is_refused(tmp_path):
    run("vit_patching_and_embedding", tmp_path, stop=2)
    with pytest.raises(ValueError, match=r"variables\..*, trained' then"):
        run("LoRA", tmp_path)


# === Copies ===


@pytest.mark.parametrize("change", ["LoRA", "quantized"])
def test_models_that_share_weights_predict_with_those_that_changed(change):
    backbone, inputs, words = tiny_clip(), random_pairs(4), ["ab", "cde"]
    masked = kcm.ContrastiveModel.from_backbone(
        backbone, masking=kcm.RandomMasking(0.5), tokenizer=letters_as_tokens
    )
    whole = masked.without_masking()
    images, texts = inputs["images"], inputs["token_ids"]

    def predict():
        return [
            masked.predict(inputs, verbose=0)["image_embeddings"],
            whole.predict(inputs, verbose=0)["image_embeddings"],
            masked.image_tower.predict(images, verbose=0),
            masked.text_tower.predict(texts, verbose=0),
            masked.encode_text(words),
        ]

    before = predict()
    if change == "LoRA":
        backbone.enable_lora(2)
        as_trained(masked)
    else:
        backbone.quantize("int8")
    of_texts = [masked.encode_text(x) for x in (texts, letters_as_tokens(words))]
    found = predict()
    assert_close(found, [masked.encode_image(images)] * 3 + of_texts, 1e-5)
    assert all(np.abs(x - y).max() > 1e-4 for x, y in zip(found, before))
