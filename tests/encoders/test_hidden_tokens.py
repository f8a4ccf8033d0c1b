"""Encoders that let hidden tokens through are found before they train."""

import functools
import math

import keras
import pytest
from keras import ops

import keras_cluster_mask as kcm
from tests.helpers import (
    assert_same_values,
    clip_vision_encoder,
    deit_encoder,
    functional_vit,
    random_images,
    values,
)

pytestmark = pytest.mark.any_backend


class MixTokens(keras.layers.Layer):
    """Adds to each token the mean of all, hidden ones included."""

    def __init__(self, initializer="ones", **kwargs):
        super().__init__(**kwargs)
        self.initializer = initializer

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer=self.initializer)

    def call(self, x):
        return x + self.scale * ops.mean(x, axis=1, keepdims=True)


class MeanOfAll(keras.layers.Layer):
    def call(self, x):
        return ops.mean(x, axis=1)


def leaky_vit(mix):
    return functional_vit(mix=mix, name="leaky_vit")


def threshold_masking(**kwargs):
    return kcm.ClusterMasking(
        patch_size=4, min_mask_ratio=0.25, threshold=0.1, **kwargs
    )


class LeakFrom(keras.layers.Layer):
    """Adds one token to all others."""

    def __init__(self, index, **kwargs):
        super().__init__(**kwargs)
        self.index = index

    def call(self, x):
        return x + ops.take(x, [self.index], axis=1)


class LeakIfFull(keras.layers.Layer):
    """Mixes tokens of samples in which more than half of them are visible."""

    def call(self, x, mask=None):
        if mask is None:
            return x
        share = ops.mean(ops.cast(mask, x.dtype), axis=1)[:, None, None]
        mixed = x + ops.mean(x, axis=1, keepdims=True)
        return ops.where(share > 0.5, mixed, x)


def frozen():
    encoder = leaky_vit(MixTokens("zeros"))
    encoder.trainable = False
    return encoder


def pooled_without_mask():
    vit = functional_vit(pool=False)
    return keras.Model(vit.input, MeanOfAll()(vit.output), name="leaky_vit")


LEAKS = {
    "mean": lambda: leaky_vit(MixTokens()),
    # A residual branch that is closed at first and opens in training.
    "zero scale": lambda: leaky_vit(MixTokens("zeros")),
    "frozen zero scale": frozen,
    "pooling": pooled_without_mask,
    "if full": lambda: leaky_vit(LeakIfFull()),
    **{
        f"token {i}": functools.partial(lambda i: leaky_vit(LeakFrom(i)), i)
        for i in range(8)
    },
}


@pytest.mark.parametrize("kind", LEAKS)
def test_an_encoder_that_lets_hidden_tokens_through_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"must honor Keras masks.*Received:.*leaky"):
        kcm.with_masking(LEAKS[kind](), threshold_masking(), layer="positions")


@pytest.mark.parametrize(
    "masking",
    [
        lambda: kcm.ClusterMasking(patch_size=4, mask_ratio=0.5),
        lambda: kcm.RandomMasking(0.5, num_prefix_tokens=0),
        lambda: threshold_masking(hide_padding=False),
    ],
    ids=["budget", "random", "padding takes part"],
)
def test_a_leaky_encoder_is_welcome_where_nothing_is_hidden(masking):
    masked = kcm.with_masking(leaky_vit(MixTokens()), masking(), "positions")
    assert masked(random_images(2), training=True).shape == (2, 16)


def pooled_prefix(make, prefix):
    """An encoder that pools tokens that are never hidden."""
    encoder = make()
    pooled = ops.mean(encoder.output[:, :prefix], axis=1)
    return keras.Model(encoder.input, pooled)


@pytest.mark.parametrize("global_policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "make",
    [
        clip_vision_encoder,
        lambda: clip_vision_encoder(dtype="mixed_bfloat16"),
        lambda: pooled_prefix(clip_vision_encoder, 1),
        lambda: pooled_prefix(deit_encoder, 2),
    ],
)
def test_an_encoder_that_hides_tokens_is_taken_with_its_weights(make, global_policy):
    keras.config.set_dtype_policy(global_policy)
    encoder = make()
    before = values(encoder.trainable_variables)
    kcm.with_masking(encoder, threshold_masking())
    assert_same_values(encoder.trainable_variables, before)


def test_the_probe_of_a_deep_encoder_holds_a_part_of_its_weights(monkeypatch):
    scope, probed = keras.StatelessScope, []

    def recorded(state_mapping):
        probed.extend(state_mapping)
        return scope(state_mapping=state_mapping)

    monkeypatch.setattr(keras, "StatelessScope", recorded)
    kcm.with_masking(functional_vit(num_layers=12), threshold_masking(), "positions")
    total = sum(math.prod(x.shape) for _, x in probed)
    held = {id(x): math.prod(x.shape) for _, x in probed}
    assert 0 < sum(held.values()) < total / 3
