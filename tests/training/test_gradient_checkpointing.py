"""Gradient checkpointing: the same gradients, without the activations of all blocks."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models.encoders import BLOCKS
from keras_cluster_mask.training.gradient_checkpointing import find_blocks
from tests.helpers import (
    CONTEXT,
    FAST,
    VOCABULARY,
    AddPositions,
    GradientSteps,
    deit_encoder,
    dino_encoder,
    kept_bytes_jax,
    largest_error,
    make_backbone,
    memory_of_gradients,
    patch_mlp,
    random_pairs,
    siglip_encoder,
    text_bag,
    tiny_clip,
    to_numpy,
)

BATCH = 8
MASKINGS = {
    "none": None,
    "budget": dict(mask_ratio=0.5),
    "threshold": dict(mask_ratio=0.5, min_mask_ratio=0.25, threshold=0.05),
}


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A block with all that may go wrong: dropout, an average, losses, no `training`.

    Its own weight is cast by the block's own precision.
    """

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones")
        self.attention = keras.layers.MultiHeadAttention(2, 8, dtype=self.dtype_policy)
        self.attention.build(shape, shape)
        self.dropout = keras.layers.Dropout(0.3, dtype=self.dtype_policy)
        self.norm = keras.layers.BatchNormalization(dtype=self.dtype_policy)
        self.norm.build(shape)
        self.dense = keras.layers.Dense(
            shape[-1],
            "gelu",
            activity_regularizer=keras.regularizers.L2(0.1),
            dtype=self.dtype_policy,
        )
        self.dense.build(shape)

    def call(self, tokens, gain=None, flip=False):
        x = self.norm(tokens) * self.scale
        x = self.dropout(self.attention(x, ops.flip(x, axis=1) if flip else x))
        x = self.dense(tokens + x)
        return x if gain is None else x * gain


def own_vit(num_layers=2, width=16, dtype=None, regularizer=None):
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(width, 4, strides=4, dtype=dtype)(images)
    x = keras.layers.Reshape((16, width), dtype=dtype)(x)
    x = tokens = AddPositions(name="positions", dtype=dtype)(x)
    for index in range(num_layers):
        gain = keras.layers.Dense(1, "sigmoid", dtype=dtype)(tokens)
        block = Block(
            name=f"block_{index}", dtype=dtype, activity_regularizer=regularizer
        )
        x = block(x, gain=gain, flip=index == 1)
    x = keras.layers.GlobalAveragePooling1D(dtype=dtype)(x)
    return keras.Model(images, keras.layers.Dense(width, dtype=dtype)(x), name="vit")


def own_model(checkpointing, **kwargs):
    keras.utils.set_random_seed(0)
    dtype, regularizer = kwargs.pop("dtype", None), kwargs.pop("regularizer", None)
    encoder = own_vit(dtype=dtype, regularizer=regularizer)
    checkpointing = ["block_0", "block_1"] if checkpointing else False
    return kcm.ContrastiveModel(
        encoder, text_bag(), gradient_checkpointing=checkpointing, **kwargs
    )


def deep_clip(checkpointing, masking="none", num_layers=2, width=16, **kwargs):
    keras.utils.set_random_seed(0)
    sizes = dict(
        hidden_dim=width,
        num_layers=num_layers,
        num_heads=2,
        intermediate_dim=4 * width,
    )
    if MASKINGS[masking]:
        kwargs["masking"] = kcm.ClusterMasking(4, seed=1, **MASKINGS[masking])
    return kcm.ContrastiveModel.from_backbone(
        make_backbone("CLIP", sizes=sizes, projection_dim=16),
        gradient_checkpointing=checkpointing,
        **kwargs,
    )


def assert_same_steps(make, steps=2, tolerance=1e-5):
    """The same losses and gradients in each of some steps, from the same state."""
    found = []
    for checkpointing in (False, True):
        model, results = make(checkpointing), []
        gradients_of = GradientSteps(model)
        for step in range(steps):
            loss, gradients = gradients_of(random_pairs(BATCH, seed=step))
            state = [to_numpy(v) for v in model.non_trainable_variables]
            results.append((float(loss), gradients, state))
        found.append(results)
    blocks = find_blocks(model, model.gradient_checkpointing, BLOCKS)
    assert blocks
    assert all("call" not in vars(block) for block in blocks)
    for expected, again in zip(*found):
        assert again[0] == pytest.approx(expected[0], rel=tolerance)
        assert largest_error(again[1], expected[1]) < tolerance
        for one, other in zip(again[2], expected[2]):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-6)
    return found[0]


# === The same gradients ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("masking", "micro_batch_size"),
    [
        ("none", None),
        ("budget", 4),
        ("threshold", None),
        ("threshold", 4),
    ],
)
def test_clip_has_the_gradients_it_has_without(masking, micro_batch_size):
    options = dict(masking=masking, micro_batch_size=micro_batch_size, num_layers=1)
    assert_same_steps(functools.partial(deep_clip, **options), 1)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        # Gradients of weights are added up in another precision.
        ({"dtype": "mixed_bfloat16"}, 1e-2),
        ({"micro_batch_size": 4, "regularizer": keras.regularizers.L2(0.1)}, 1e-5),
    ],
    ids=["whole", "bfloat16", "micro-regularized"],
)
def test_a_block_of_the_users_own_is_named(options, tolerance):
    make = functools.partial(own_model, **options)
    steps = assert_same_steps(make, tolerance=tolerance)
    # The states of dropout have moved.
    assert any((x != y).any() for x, y in zip(steps[0][2], steps[1][2]))


@pytest.mark.any_backend
def test_a_frozen_tower_works():
    def make(checkpointing):
        model = deep_clip(checkpointing, "budget", num_layers=1)
        model.image_encoder.trainable = False
        return model

    assert_same_steps(make, 1)


# === Memory ===


def test_memory_hardly_grows_with_depth():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow does not tell what a step keeps; see benchmarks.")
    # XLA begins to compute again too early on a CPU to save anything there.
    jax = keras.backend.backend() == "jax"
    measure = kept_bytes_jax if jax else memory_of_gradients
    growth = {}
    for checkpointing in (False, True):
        sizes = []
        for depth in (2, 6):
            model = deep_clip(checkpointing, num_layers=depth, width=32)
            weights = sum(v.value.nbytes for v in model.trainable_variables)
            # Of each weight there is a copy, or a gradient.
            sizes.append(measure(model, random_pairs(32)) - weights)
        growth[checkpointing] = sizes[1] - sizes[0]
    assert growth[True] < 0.25 * growth[False]


# === Which blocks ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    # Those of others are found where their gradients are compared.
    [
        lambda: tiny_clip().vision_encoder,
        lambda: tiny_clip().text_encoder,
        lambda: keras.Sequential([keras_hub.layers.TransformerDecoder(8, 2)]),
    ],
    ids=["clip", "clip-text", "decoder"],
)
def test_the_blocks_of_keras_hub_are_known(make):
    assert len(find_blocks(make(), True, BLOCKS)) == 1


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [siglip_encoder, dino_encoder])
def test_other_encoders_of_keras_hub_have_the_same_gradients(make):
    def model(checkpointing):
        keras.utils.set_random_seed(0)
        encoder = make()
        images = keras.Input((16, 16, 3))
        features = encoder(
            {"images": images} if isinstance(encoder.input, dict) else images
        )
        if len(features.shape) == 3:
            features = keras.layers.GlobalAveragePooling1D()(features)
        encoder = keras.Model(images, features, name="pooled")
        return kcm.ContrastiveModel(
            encoder, text_bag(), gradient_checkpointing=checkpointing
        )

    assert_same_steps(model, 1)


@pytest.mark.any_backend
def test_a_text_encoder_with_a_padding_mask_has_the_same_gradients():
    def model(checkpointing):
        keras.utils.set_random_seed(0)
        ids = keras.Input((CONTEXT,), dtype="int32")
        x = keras.layers.Embedding(VOCABULARY, 16, mask_zero=True)(ids)
        for _ in range(2):
            x = keras_hub.layers.TransformerEncoder(16, 2, dropout=0.1)(x)
        x = keras.layers.GlobalAveragePooling1D()(x)
        return kcm.ContrastiveModel(
            patch_mlp(), keras.Model(ids, x), gradient_checkpointing=checkpointing
        )

    pairs = random_pairs(BATCH)
    assert (pairs["token_ids"] == 0).any()
    assert_same_steps(model, 1)


def test_micro_batches_of_a_model_in_mixed_precision_are_recomputed_too():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = kcm.ContrastiveModel.from_backbone(
        tiny_clip(), gradient_checkpointing=True, micro_batch_size=4
    )
    model.compile("sgd", **FAST)
    history = model.fit(random_pairs(BATCH), batch_size=BATCH, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("checkpointing", "message"),
    [
        (True, "lacks a block of a known class"),
        (["positions", "nothing", "patches"], "lacks nothing, patches$"),
    ],
)
def test_blocks_that_are_not_there_are_an_error(checkpointing, message):
    with pytest.raises(ValueError, match=message):
        kcm.ContrastiveModel(
            patch_mlp(), text_bag(), gradient_checkpointing=checkpointing
        )


@pytest.mark.one_case
def test_a_block_that_returns_none_beside_tokens_trains_alike():
    found = []
    for checkpointing in (False, True):
        keras.utils.set_random_seed(0)
        encoder = deit_encoder()
        images = keras.Model(encoder.input, encoder.output[:, 0])
        options = dict(projection_dim=5, gradient_checkpointing=checkpointing)
        model = kcm.ContrastiveModel(images, text_bag(), **options)
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(random_pairs(8), batch_size=8, verbose=0)
        found.append([to_numpy(x) for x in model.trainable_variables])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, atol=1e-5)
