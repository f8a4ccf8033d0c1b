"""The last blocks of pre-trained encoders, or LoRA, are trained."""

import contextlib
import warnings
import weakref

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.models import with_context_length, with_image_size
from keras_cluster_mask.models.encoders import BLOCKS, number_positions
from keras_cluster_mask.training.layers import all_layers
from tests.callbacks.training_run import StopAfter
from tests.helpers import (
    FAST,
    TRANSFORMER,
    as_trained,
    assert_same_values,
    clip_with_lora,
    make_backbone,
    random_images,
    random_pairs,
    small_model,
    tiny_clip,
    to_numpy,
    values,
)

TWO = {**TRANSFORMER, "num_layers": 2}
VIT = {**TWO, "patch_size": 4, "image_shape": (16, 16, 3)}
TEXT = {**TWO, "vocabulary_size": 30, "max_sequence_length": 8}


def vit():
    sizes = dict(VIT)
    sizes["mlp_dim"] = sizes.pop("intermediate_dim")
    return keras_hub.models.ViTBackbone(**sizes)


def connected(images=vit, texts="Bert", **options):
    texts = getattr(keras_hub.models, f"{texts}Backbone")(**TEXT)
    return kcm.ContrastiveModel.from_encoders(images(), texts, 4, **options)


def two_towers(family, **options):
    backbone = make_backbone(family, sizes=TWO, **options)
    return kcm.ContrastiveModel.from_backbone(backbone, kcm.RandomMasking(0.5))


def half(**options):
    return connected(masking=kcm.RandomMasking(0.5), **options)


# A model, and how many weights follow the last block of each encoder.
MODELS = {
    "ViT, BERT": (half, 2, 0),
    "DeiT, RoBERTa": (
        lambda: connected(lambda: keras_hub.models.DeiTBackbone(**VIT), "Roberta"),
        *(2, 0),
    ),
    "DINOv2, DistilBERT": (
        lambda: half(
            images=lambda: keras_hub.models.DINOV2Backbone(**VIT), texts="DistilBert"
        ),
        *(2, 0),
    ),
    "DINOv3": (
        lambda: half(images=lambda: keras_hub.models.DINOV3Backbone(**VIT)),
        *(2, 0),
    ),
    "CLIP": (lambda: two_towers("CLIP", projection_dim=16), 2, 2),
    "MetaCLIP 2": (lambda: two_towers("MetaCLIP2", projection_dim=16), 0, 2),
    # With a pooling and a projection in the encoders.
    "SigLIP": (lambda: two_towers("SigLIP"), 17, 4),
}
each_model = pytest.mark.parametrize("kind", MODELS)


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


@each_model
def test_the_last_blocks_and_what_follows_are_trained(kind):
    make, *after = MODELS[kind]
    model = make()
    others = len(model.trainable_weights)
    encoders = model.image_encoder, model.text_encoder
    others -= sum(len(encoder.trainable_weights) for encoder in encoders)
    kcm.train_last_blocks(model, image=1, text=1)
    for encoder, count in zip(encoders, after):
        last = blocks_of(encoder)[1]
        own = {id(v) for v in last.weights}
        assert own <= trained_in(encoder)
        assert len(trained_in(encoder)) == len(own) + count
    kcm.train_last_blocks(model, image=2, text=0)
    assert not trained_in(encoders[1])
    assert len(trained_in(encoders[0])) == 2 * len(own_weights(encoders[0])) + after[0]
    total = len(trained_in(encoders[0])) + others
    assert len(model.trainable_weights) == total


def own_weights(encoder):
    return blocks_of(encoder)[0].weights


@each_model
def test_lora_trains_factors_alone_and_is_merged_in_a_file(kind, tmp_path):
    model = MODELS[kind][0]()
    before = model.predict(pairs(), verbose=0)
    kcm.enable_lora(model, rank=2, text=True)
    for encoder in (model.image_encoder, model.text_encoder):
        names = {v.name for v in encoder.trainable_weights}
        assert names == {"lora_kernel_a", "lora_kernel_b"}
        assert len(encoder.trainable_weights) >= 2 * 2 * 2
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


def test_lora_of_keras_hub_leaves_the_same_frozen_in_a_file(tmp_path):
    model = two_towers("CLIP", projection_dim=16)
    model.backbone.enable_lora(2)
    biases = [v.path for v in model.trainable_weights if "lora" not in v.name]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.trainable_weights] == biases


@pytest.mark.parametrize("kind", ["last blocks", "LoRA"])
def test_only_what_is_trained_changes(kind):
    model = half()
    if kind == "LoRA":
        kcm.enable_lora(model, rank=2)
    else:
        kcm.train_last_blocks(model, image=1)
    model.compile("adam", **FAST)
    fit(model)
    frozen = values(model.non_trainable_weights), values(model.text_encoder.weights)
    trained = values(model.trainable_weights)
    whole = model.without_masking()
    assert len(whole.trainable_weights) == len(trained)
    whole.compile(keras.optimizers.Adam(0.1), **FAST)
    fit(whole)
    states = len(model.non_trainable_weights) - len(whole.non_trainable_weights)
    assert_same_values(model.non_trainable_weights[:-states], frozen[0][:-states])
    assert_same_values(model.text_encoder.weights, frozen[1])
    for one, other in zip(values(model.trainable_weights), trained):
        assert np.any(one != other)


@pytest.mark.parametrize("change", [kcm.enable_lora, kcm.train_last_blocks])
def test_a_model_must_be_compiled_afterwards(change):
    model = half()
    model.image_encoder.trainable = False
    model.compile("adam", **FAST)
    fit(model)
    change(model)
    with pytest.raises(ValueError, match=r"compile\(\)"):
        fit(model)
    model.compile("adam", **FAST)
    fit(model)


# === Checkpoints ===


PARTS = {
    "LoRA": lambda model: kcm.enable_lora(model, rank=2, text=True),
    "last blocks": lambda model: kcm.train_last_blocks(model, image=1, text=1),
    "first blocks": lambda model: [
        kcm.train_last_blocks(model, image=1, text=1),
        *(swap_blocks(x) for x in (model.image_encoder, model.text_encoder)),
    ],
}


def swap_blocks(encoder):
    first, last = blocks_of(encoder)
    first.trainable, last.trainable = True, False


def run(part, folder, stop=None):
    keras.utils.set_random_seed(0)
    model = half()
    PARTS[part](model)
    model.compile("adam", **FAST)
    callbacks = [kcm.callbacks.Checkpoint(folder), *([StopAfter(stop)] if stop else [])]
    with contextlib.suppress(KeyboardInterrupt):
        fit(model, epochs=3, resume_from=folder, callbacks=callbacks)
    return values([*model.variables, *model.optimizer.variables])


@pytest.mark.parametrize("part", ["LoRA", "last blocks"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(part, tmp_path):
    expected = run(part, tmp_path / "whole")
    run(part, tmp_path / "stopped", stop=2)
    for one, other in zip(run(part, tmp_path / "stopped"), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.any_backend
@pytest.mark.parametrize("other", ["LoRA", "first blocks"])
def test_a_checkpoint_of_other_trained_parts_is_refused(other, tmp_path):
    run("last blocks", tmp_path, stop=2)
    with pytest.raises(ValueError, match=r"frozen weights: .* in the checkpoint"):
        run(other, tmp_path)


# === Memory ===


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def kept(model):
    """The number of bytes that a forward pass keeps for the backward pass."""
    if keras.backend.backend() == "torch":
        import torch

        saved = weakref.WeakSet()

        def pack(x):
            held = Kept(x)
            saved.add(held)
            return held

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor):
            _outputs = model(pairs(), training=True)
        return sum(x.tensor.nbytes for x in saved)
    import jax

    def run(weights):
        others = [v.value for v in model.non_trainable_variables]
        return model.stateless_call(weights, others, pairs(), training=True)[0]

    _, backward = jax.vjp(run, [v.value for v in model.trainable_variables])
    return sum(x.nbytes for x in jax.tree.leaves(backward))


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="A compiled step plans its memory; the tape of an eager one keeps all.",
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masking", [None, kcm.RandomMasking(0.5)])
def test_nothing_is_kept_for_frozen_blocks(masking, checkpointing, monkeypatch):
    sizes = []
    for depth in (2, 4):
        monkeypatch.setitem(VIT, "num_layers", depth)
        monkeypatch.setitem(TEXT, "num_layers", depth)
        model = connected(masking=masking, gradient_checkpointing=checkpointing)
        sizes.append([])
        for count in (1, 2):
            kcm.train_last_blocks(model, image=count, text=count)
            sizes[-1].append(kept(model))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] < sizes[0][1]


# === Copies ===


@pytest.mark.parametrize(
    "copied", [lambda x: with_image_size(x, 16), lambda x: with_context_length(x, 6)]
)
def test_a_copy_has_the_same_lora(copied):
    backbone = as_trained(clip_with_lora())
    number_positions(backbone)
    copy = copied(backbone)
    assert not {id(v) for v in copy.weights} & {id(v) for v in backbone.weights}
    assert_same_values(copy.weights, backbone.weights)
    found = [v.trainable for v in copy.weights]
    assert found == [v.trainable for v in backbone.weights]
    ids = random_pairs(2)["token_ids"]
    one, other = (to_numpy(x.text_encoder(ids)) for x in (copy, backbone))
    np.testing.assert_array_equal(one, other)


def test_a_teacher_follows_an_encoder_merged_with_its_lora():
    backbone = tiny_clip()
    encoder = backbone.vision_encoder
    teacher = kcm.models.MomentumEncoder(encoder, 0.0, 0.0, steps=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, kcm.AttentiveMasking(teacher))
    kcm.enable_lora(model, rank=2)
    as_trained(model)
    teacher.update()
    images = random_images(2)
    expected = to_numpy(encoder({"images": images}, training=False))
    np.testing.assert_allclose(to_numpy(teacher(images)), expected, atol=1e-5)


# === Refusals ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: kcm.train_last_blocks(half(), image=3), "`image` must not exceed.* 2"),
        (lambda: kcm.train_last_blocks(half(), text=-1), "`text` must be an integer"),
        (lambda: kcm.train_last_blocks(half(), image=1.0), "`image` must be an int"),
        (lambda: kcm.train_last_blocks(small_model()), "`image` must not exceed.* 0"),
        (lambda: kcm.enable_lora(half(), rank=0), "`rank` must be an integer"),
        (
            lambda: kcm.enable_lora(half(), layer_names=["query_dense"]),
            r"`layer_names` must name layers of the image encoder.*'query'",
        ),
        (
            lambda: kcm.enable_lora(small_model(), image=False, text=True),
            "`layer_names` must name layers of the text encoder",
        ),
        (lambda: kcm.enable_lora(lora_model()), "`model` must have no LoRA"),
        (lambda: kcm.train_last_blocks(lora_model()), "`model` must have no LoRA"),
    ],
)
def test_what_cannot_be_done_is_refused(call, match):
    with pytest.raises(ValueError, match=rf"(?s){match}.*Received: "):
        call()


def lora_model():
    model = half()
    kcm.enable_lora(model)
    return model
