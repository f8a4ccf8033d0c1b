"""with_masking: the same encoder, on fewer tokens, and nothing hidden gets through."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.surgery import split_at
from tests.helpers import (
    VIT,
    AddPositions,
    assert_close,
    assert_same_values,
    clip_vision_encoder,
    deit_encoder,
    dino_encoder,
    functional_vit,
    ids_of,
    random_images,
    random_noise,
    siglip_encoder,
    to_numpy,
    value_and_gradients,
    vision_encoder,
    vit_encoder,
)


def blip_2_encoder():
    return keras_hub.models.BLIP2VisionEncoder(
        **VIT,
        image_size=16,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )


# Maker, name of the embedding layer, (height, width), prefix tokens.
ENCODERS = {
    "clip": (clip_vision_encoder, None, (16, 16), 1),
    "vit": (vit_encoder, None, (16, 16), 1),
    "vit_wide": (lambda: vit_encoder(8, 16), None, (8, 16), 1),
    "siglip": (siglip_encoder, None, (16, 16), 0),
    "dino": (dino_encoder, None, (16, 16), 3),
    "deit": (lambda: deit_encoder(8, 16), None, (8, 16), 2),
    "meta": (lambda: vision_encoder("MetaCLIP2"), None, (16, 16), 1),
    "blip_2": (blip_2_encoder, None, (16, 16), 1),
    "own": (functional_vit, "positions", (16, 16), 0),
}
each_encoder = pytest.mark.parametrize("kind", list(ENCODERS))


@functools.cache
def encoder_of(kind):
    return ENCODERS[kind][0]()


def make(kind, **kwargs):
    """A masked encoder, images and noise for it, and its number of prefix tokens."""
    _, layer, (height, width), prefix = ENCODERS[kind]
    masked = kcm.with_masking(
        encoder_of(kind), kcm.ClusterMasking(patch_size=4, **kwargs), layer
    )
    images = random_images(4, height, width)
    return masked, images, random_noise(4, height * width // 16), prefix


def inputs_of(masked, images):
    expected = masked.input
    return dict.fromkeys(expected, images) if isinstance(expected, dict) else images


def blocks_of(masked):
    return split_at(masked.encoder, masked.embedding_layer)[1]


def kept_tokens(masked, images, noise, prefix):
    """The stem's tokens, the numbers of those that stay, and which are visible."""
    tokens = masked.stem(inputs_of(masked, images), training=True)
    indices, visible = masked.masking.select(images, tokens, noise)
    indices, visible = (ops.convert_to_numpy(x) for x in (indices, visible))
    batch = len(images)
    first = np.tile(np.arange(prefix), (batch, 1))
    return (
        blocks_of(masked),
        tokens,
        np.concatenate([first, prefix + indices], axis=1),
        np.concatenate([np.ones((batch, prefix), bool), visible], axis=1),
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["own", "vit_wide", "dino"])
def test_the_size_of_patches_follows_from_their_number(kind):
    _, layer, (height, width), _ = ENCODERS[kind]
    encoder, masking = encoder_of(kind), kcm.KMeansMasking()
    masked = kcm.with_masking(encoder, masking, layer)
    images, noise = (
        random_images(4, height, width),
        random_noise(4, height * width // 16),
    )
    given = kcm.with_masking(encoder, kcm.KMeansMasking(patch_size=4), layer)
    again = type(masked).from_config(masked.get_config())
    again.set_weights(masked.get_weights())
    inputs = inputs_of(masked, images)
    expected = given(inputs, training=True, noise=noise)
    for each in (masked, again):
        assert_same_values(each(inputs, training=True, noise=noise), expected)
    assert masking.patch_size is None


# === The same encoder ===


@pytest.mark.one_case
@each_encoder
def test_training_takes_the_prefix_and_half_and_inference_the_whole_image(kind):
    masked, images, noise, prefix = make(kind, mask_ratio=0.5)
    blocks, tokens, kept, visible = kept_tokens(masked, images, noise, prefix)
    num_patches = noise.shape[1]
    assert tokens.shape[1] == prefix + num_patches
    assert kept.shape[1] == prefix + num_patches // 2
    assert visible.all()
    inputs, encoder = inputs_of(masked, images), masked.encoder
    for options in ({}, {"training": False}):
        assert_same_values(masked(inputs, noise=noise, **options), encoder(inputs))
    trained = to_numpy(masked(inputs, training=True, noise=noise))
    if trained.ndim == 3:
        assert trained.shape[1] == prefix + num_patches // 2
    chosen = ops.take_along_axis(tokens, kept[:, :, None], axis=1)
    assert_close(trained, blocks(chosen))


@pytest.mark.any_backend
@each_encoder
def test_weights_are_the_encoders_own_and_not_held_twice(kind):
    masked, *_ = make(kind)
    encoder = masked.encoder
    own = ids_of(encoder.weights)
    state = ids_of(masked.masking.weights)
    assert len(masked.weights) == len(ids_of(masked.weights))
    assert ids_of(masked.weights) == own | state
    assert [v.path for v in masked.trainable_variables] == [
        v.path for v in encoder.trainable_variables
    ]


@pytest.mark.any_backend
def test_one_masking_serves_encoders_with_different_prefixes():
    masking = kcm.RandomMasking(0.5, seed=1)
    config, prefixes = masking.get_config(), {"dino": 3, "clip": 1, "siglip": 0}
    several = [kcm.with_masking(encoder_of(kind), masking) for kind in prefixes]
    for masked, prefix in zip(several, prefixes.values()):
        assert masked.masking is masking
        assert masked.num_prefix_tokens == prefix
        images, noise = {"images": random_images(4)}, random_noise(4)
        alone = kcm.RandomMasking(0.5, num_prefix_tokens=prefix)
        tokens = alone(masked.stem(images), training=True, noise=noise)
        found = masked(images, training=True, noise=noise)
        assert_close(found, blocks_of(masked)(tokens))
    assert masking.num_prefix_tokens is None
    assert masking.get_config() == config


# === Nothing left out has an influence ===


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize("kind", [x for x in ENCODERS if x != "vit"])
def test_a_threshold_equals_the_encoder_on_the_visible_tokens_alone(kind):
    masked, images, noise, prefix = make(kind, min_mask_ratio=0.25, threshold=0.0)
    images, noise = images[1:3], noise[1:3]
    blocks, _, kept, visible = kept_tokens(masked, images, noise, prefix)
    assert len(set(visible.sum(axis=1))) > 1
    inputs = inputs_of(masked, images)

    def pool(output):
        if len(output.shape) == 2:
            return output
        # The class token, and the average over all that is visible.
        average = keras.layers.GlobalAveragePooling1D()(output)
        return ops.concatenate([output[:, 0], average], axis=1)

    def hidden():
        return pool(masked(inputs, training=True, noise=noise))

    def alone():
        tokens = masked.stem(inputs, training=True)
        rows = []
        for row, (indices, seen) in enumerate(zip(kept, visible)):
            taken = ops.take(tokens[row : row + 1], indices[seen], axis=1)
            rows.append(pool(blocks(taken, training=True)))
        return ops.concatenate(rows, axis=0)

    weights = masked.trainable_variables
    direction = np.random.default_rng(1).normal(size=(2, 32)).astype("float32")

    def of(fn):
        output = fn()
        weighted = output * ops.convert_to_tensor(direction[:, : output.shape[1]])
        return ops.sum(weighted), output

    (hidden_output, one), (alone_output, other) = (
        value_and_gradients(lambda fn=fn: of(fn), weights) for fn in (hidden, alone)
    )
    assert_close(hidden_output, alone_output, 1e-5)
    assert sum(np.any(g != 0) for g in other) >= len(weights) - 4
    for weight, a, b in zip(weights, one, other):
        np.testing.assert_allclose(
            a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=weight.path
        )


# === Refusals ===


def bypassed(around):
    """An encoder with a path from the images to the output around the layer."""
    vit = functional_vit()
    start = {"images": vit.input, "tokens": vit.get_layer("positions").input}[around]
    other = keras.layers.Dense(16)(keras.layers.Flatten()(start))
    return keras.Model(vit.input, keras.layers.Add()([vit.output, other]))


def later(kind, prefix=0):
    """An encoder with a layer after "tokens" that takes not any tokens in any order."""
    vit = functional_vit(pool=False)
    x = vit.get_layer("positions").output
    if prefix:
        x = keras.layers.ZeroPadding1D((prefix, 0))(x)
    x = keras.layers.Activation("linear", name="tokens")(x)
    if kind == "positions":
        # As zeros, such positions would not show.
        x += keras_hub.layers.PositionEmbedding(32, initializer="zeros")(x)
    elif kind == "relative":
        x = keras.layers.Conv1D(16, 3, padding="same")(x)
    elif kind == "weights":
        x = AddPositions(name="late_positions")(x)
    elif kind == "attention":
        x = keras.layers.MultiHeadAttention(2, 8, name="mixed")(x, x)
    pool = keras.layers.Flatten if kind == "flatten" else keras.layers.GlobalMaxPool1D
    head = keras.layers.Dense(4, name="head")
    return keras.Model(vit.input, head(pool()(x)), name="later")


def nested(kind):
    vit, images = functional_vit(), keras.Input((16, 16, 3))
    return (
        kind([images, vit]) if kind is keras.Sequential else kind(images, vit(images))
    )


def masked_clip(around=False):
    encoder = clip_vision_encoder()
    masked = kcm.with_masking(encoder, kcm.RandomMasking(0.5))
    if around:
        return keras.Model(encoder.input, masked(encoder.input)[:, 0])
    return masked


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "layer", "match"),
    [
        (functional_vit, None, "`layer`.*'positions'"),
        # It returns no tokens.
        (functional_vit, "patches", "Candidates: 'reshape"),
        (clip_vision_encoder, "nothing", "Candidates.*'vision_encoder_embedding'"),
        (lambda: keras.layers.Dense(3), None, "`encoder`"),
        (lambda: keras.Sequential([keras.layers.Dense(3)]), None, "`encoder`"),
        *(
            (functools.partial(bypassed, x), "positions", "path")
            for x in ("tokens", "images")
        ),
        *(
            (functools.partial(later, kind), "tokens", f"`layer` {match}")
            for kind, match in (
                ("positions", "must be after the position.*order of tokens"),
                ("relative", "must be after the position.*order of tokens"),
                ("weights", "must be after the position"),
                ("flatten", ".*A head must pool tokens"),
            )
        ),
        *(
            (functools.partial(nested, kind), layer, "'own_vit'")
            for kind in (keras.Sequential, keras.Model)
            for layer in (None, "own_vit")
        ),
        # Class tokens cannot be seen after attention.
        (lambda: later("attention", prefix=1), "mixed", "`num_prefix_tokens` of"),
        (masked_clip, None, "`encoder` must have no masking"),
        (lambda: masked_clip(around=True), None, "`encoder` must have no masking"),
    ],
)
def test_an_encoder_that_cannot_be_masked_is_refused(make, layer, match):
    with pytest.raises(ValueError, match=rf"{match}.*Received: "):
        kcm.with_masking(make(), kcm.RandomMasking(), layer)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("masking", "match"),
    [
        (keras.layers.Dropout(0.5), "`masking`"),
        # The patch size is not that of the encoder.
        (kcm.ClusterMasking(patch_size=8), "`patch_size` .* must match the model"),
        (kcm.RandomMasking(num_prefix_tokens=1), "`num_prefix_tokens` must be 3"),
    ],
)
def test_a_masking_that_does_not_fit_is_refused(masking, match):
    with pytest.raises(ValueError, match=rf"{match}.*Received: "):
        kcm.with_masking(dino_encoder(), masking)


def of_any_size(prefix):
    """A sequential encoder for images of any size."""
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(16, 4, strides=4),
            keras.layers.Reshape((-1, 16)),
            keras.layers.ZeroPadding1D((prefix, 0), name="tokens"),
            keras.layers.GlobalMaxPool1D(),
        ]
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("make", [of_any_size, functools.partial(later, "attention")])
def test_tokens_that_do_not_depend_on_the_image_are_counted_as_the_prefix(
    make, prefix, policy
):
    keras.config.set_dtype_policy(policy)
    encoder, images = make(prefix), random_images(2)
    masked = kcm.with_masking(encoder, kcm.RandomMasking(), "tokens")
    assert masked.num_prefix_tokens == prefix
    assert_same_values(masked(images), encoder(images))
    assert masked(images, training=True).shape == encoder(images).shape
    assert ids_of(encoder.weights) <= ids_of(masked.weights)


# === In a model of the user's own ===


@pytest.mark.any_backend
def test_a_pooled_output_carries_no_mask_of_tokens():
    # A loss of Keras's own would take it for weights of the samples.
    masking = kcm.ClusterMasking(patch_size=4, min_mask_ratio=0.25, threshold=0.1)
    masked = kcm.with_masking(functional_vit(), masking, "positions")
    features = masked(random_images(4), training=True)
    assert tuple(features.shape) == (4, 16)
    assert getattr(features, "_keras_mask", None) is None
