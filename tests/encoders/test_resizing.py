"""Copies of encoders for images of another size, and for texts of another length."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.surgery import find_embedding_layer, number_positions
from keras_cluster_mask.models import with_context_length, with_image_size
from tests.helpers import (
    CONTEXT,
    as_trained,
    assert_close,
    assert_same_values,
    clip_vision_encoder,
    clip_with_lora,
    dino_encoder,
    functional_vit,
    ids_of,
    image_mlp,
    random_images,
    random_pairs,
    reloaded,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
    vit_encoder,
)

pytestmark = pytest.mark.any_backend

# Maker, and how many tokens of its position embeddings are no patches.
MODELS = {
    "clip": (clip_vision_encoder, 1),
    "clip_backbone": (tiny_clip, 1),
    "metaclip_backbone": (tiny_metaclip, 1),
    "siglip_backbone": (tiny_siglip, 0),
    "vit": (vit_encoder, 1),
    "dino": (dino_encoder, 1),
}
each_model = pytest.mark.parametrize("kind", list(MODELS))


def made(kind):
    return as_trained(MODELS[kind][0]())


def table_of(model):
    """The position embeddings that a model computes with."""
    embedding = find_embedding_layer(getattr(model, "vision_encoder", model))
    own = getattr(embedding, "interpolated_position_embeddings", None)
    table = embedding.position_embedding.embeddings if own is None else own[0]
    return to_numpy(table)


def inputs_for(model, height, width):
    images = random_images(4, height, width)
    if not isinstance(model.input, dict):
        return images
    inputs = {"images": images, "token_ids": random_pairs(4)["token_ids"]}
    return {key: inputs[key] for key in model.input}


def outputs_of(model, height=16, width=16):
    found = model(inputs_for(model, height, width))
    return [to_numpy(x) for x in keras.tree.flatten(found)]


def open_clips(table, prefix, grid):
    """The same numbers through open_clip's own function."""
    open_clip = pytest.importorskip("open_clip.model")
    import torch

    # It knows tables with a class token alone.
    table = np.concatenate([np.zeros((1 - prefix, table.shape[1])), table])
    state = {"visual.positional_embedding": torch.tensor(table.astype("float32"))}
    model = SimpleNamespace(visual=SimpleNamespace(grid_size=grid))
    open_clip.resize_pos_embed(state, model)
    return state["visual.positional_embedding"].numpy()[1 - prefix :]


@each_model
@pytest.mark.parametrize("side", [8, 28])
def test_positions_are_those_of_open_clip_and_all_else_is_copied(kind, side):
    model = made(kind)
    before = values(model.weights)
    other = with_image_size(model, side)
    assert type(other) is type(model)
    expected = open_clips(table_of(model), MODELS[kind][1], (side // 4, side // 4))
    assert_close(table_of(other), expected, 1e-5)

    assert not ids_of(model.weights) & ids_of(other.weights)
    assert_same_values(model.weights, before)
    for new, kept in zip(other.weights, before):
        if "position" not in new.path:
            assert_same_values([new], [kept])


def test_a_grid_may_be_wide_where_the_encoder_allows_it():
    model = made("vit")
    wide = with_image_size(model, (8, 24))
    expected = open_clips(table_of(model), 1, (2, 6))
    assert_close(table_of(wide), expected, 1e-5)
    assert outputs_of(wide, 8, 24)[0].shape == (4, 1 + 12, 16)
    # As many patches as before, in another shape.
    tall = with_image_size(wide, (24, 8))
    assert np.abs(table_of(tall) - table_of(wide))[1:].max() > 0.1
    assert_same_values(table_of(tall)[0], table_of(wide)[0])
    with pytest.raises(ValueError, match="height and width to be the same"):
        with_image_size(made("clip"), (8, 24))


@pytest.mark.parametrize("side", [16, 28])
def test_a_clip_that_was_never_numbered_is_numbered_in_the_copy(side):
    model = clip_vision_encoder()
    other = with_image_size(model, side)
    ids = ops.convert_to_numpy(other.embedding.position_ids)
    assert_same_values(ids, [np.arange(1 + (side // 4) ** 2)])
    assert not ops.convert_to_numpy(model.embedding.position_ids).any()


def test_positions_in_another_order_are_put_in_order_first():
    model = made("clip")
    order = np.random.default_rng(0).permutation(17)
    model.embedding.position_ids.assign(order[None])
    expected = open_clips(table_of(model)[order], 1, (7, 7))
    other = with_image_size(model, 28)
    assert_close(table_of(other), expected, 1e-5)
    ids = ops.convert_to_numpy(other.embedding.position_ids)
    assert_same_values(ids, [np.arange(50)])


@pytest.mark.parametrize("kind", ["clip_backbone", "siglip_backbone", "vit", "dino"])
def test_the_new_model_saves_and_reloads(kind, tmp_path):
    other = with_image_size(made(kind), 28)
    loaded = reloaded(other, tmp_path)
    for one, two in zip(outputs_of(other, 28, 28), outputs_of(loaded, 28, 28)):
        assert_same_values(one, two)
        assert np.isfinite(one).all()


def test_channels_first_is_kept():
    keras.config.set_image_data_format("channels_first")
    model = as_trained(
        kcm.models.clip_backbone("tiny", image_size=16, vocabulary_size=30)
    ).vision_encoder
    keras.config.set_image_data_format("channels_last")
    other = with_image_size(model, 32)
    assert other.embedding.data_format == "channels_first"
    assert tuple(other.image_shape) == (3, 32, 32)
    expected = open_clips(table_of(model), 1, (4, 4))
    assert_close(table_of(other), expected, 1e-5)


# === Texts ===

TEXTS = tiny_clip, tiny_metaclip, tiny_siglip, lambda: tiny_clip().text_encoder


def tables(*models):
    """The weights that differ in shape, of each model."""
    pairs = zip(*(model.weights for model in models))
    differ = [pair for pair in pairs if len({tuple(x.shape) for x in pair}) > 1]
    # SigLIP has the numbers of the rows as well.
    return [pair for pair in differ if "int" not in pair[0].dtype]


@pytest.mark.parametrize("make", TEXTS)
@pytest.mark.parametrize("length", [3, CONTEXT, 9, 13])
def test_positions_of_texts_are_interpolated_as_torch_does(make, length):
    torch = pytest.importorskip("torch")
    model = as_trained(make())
    copy = with_context_length(model, length)
    assert type(copy) is type(model)
    encoder = getattr(copy, "text_encoder", copy)
    assert encoder.max_sequence_length == length
    assert np.isfinite(to_numpy(encoder(np.ones((2, length), "int32")))).all()
    found = tables(model, copy)
    assert len(found) == (length != CONTEXT)
    for old, new in found:
        old, new = values([old, new])
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(old.T[None]), size=length, mode="linear"
        )
        assert_close(new, expected[0].numpy().T, 1e-5)


# === Both ===


def masked_clip():
    return kcm.with_masking(clip_vision_encoder(), kcm.ClusterMasking(patch_size=4))


@pytest.mark.parametrize(
    ("copied", "make", "size", "name"),
    [
        *(
            (with_image_size, make, 32, "model")
            for make in (functional_vit, lambda: None, masked_clip)
        ),
        *((with_image_size, tiny_clip, x, "image_size") for x in (0, (16, 18), (16,))),
        (with_context_length, image_mlp, 9, "model"),
        *((with_context_length, tiny_clip, x, "length") for x in (2, 9.0, True, None)),
    ],
)
def test_other_models_and_sizes_are_refused(copied, make, size, name):
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}="):
        copied(make(), size)


def half_frozen(make):
    backbone = make()
    backbone.vision_encoder.trainable = False
    backbone.text_encoder.layers[-1].trainable = False
    return backbone


@pytest.mark.parametrize(
    "make", [clip_with_lora, *(lambda x=x: half_frozen(x) for x in TEXTS[:3])]
)
@pytest.mark.parametrize(
    ("copied", "same", "other"),
    [(with_image_size, 16, 32), (with_context_length, 6, 9)],
)
def test_a_copy_has_the_weights_what_is_frozen_and_lora(make, copied, same, other):
    backbone = as_trained(make())
    number_positions(backbone)
    before = values(backbone.weights)
    trained = [v.trainable for v in backbone.weights]
    assert {*trained} == {True, False}
    copies = copied(backbone, same), copied(backbone, other)
    assert_same_values(copies[0].weights, before)
    assert_same_values(backbone.weights, before)
    for copy in copies:
        assert not ids_of(copy.weights) & ids_of(backbone.weights)
        assert [v.trainable for v in copy.weights] == trained
        assert copy.vision_encoder.trainable == backbone.vision_encoder.trainable
