"""Micro-batches: the gradients of the whole batch, at the memory of a part of it."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from torch.utils.data import DataLoader, default_collate

import keras_cluster_mask as kcm
from keras_cluster_mask import losses
from keras_cluster_mask.training.micro_batches import (
    check_micro_batches,
)
from tests.encoders.test_families import model_of as model_of_bert
from tests.encoders.test_families import texts
from tests.helpers import (
    FAST,
    MASKINGS,
    assert_close,
    dino_3_encoder,
    functional_vit,
    largest_error,
    loss_and_gradients,
    masked_vit,
    memory_of_gradients,
    random_pairs,
    small_model,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
)
from tests.models.test_backbones import metaclip_pairs
from tests.test_losses import reference
from tests.training.test_training_data import KINDS as DATA
from tests.training.test_training_data import rows

BATCH = 12


def pooled(encoder):
    return keras.Model(encoder.input, encoder.output[:, 0], name="pooled")


def hidden_padding(**options):
    return kcm.ClusterMasking(
        patch_size=4, min_mask_ratio=0.25, threshold=0.05, **options
    )


def make_model(masking=MASKINGS["cluster"], dropout=False, **kwargs):
    keras.utils.set_random_seed(0)
    mix = keras.layers.Dropout(0.3, seed=5) if dropout else None
    encoder = masked_vit(masking(num_prefix_tokens=0, seed=1), mix=mix)
    text_encoder = text_bag()
    if dropout:
        text_encoder = keras.Model(text_encoder.input, Untold()(text_encoder.output))
    return kcm.ContrastiveModel(encoder, text_encoder, **kwargs)


class Untold(keras.layers.Layer):
    """Its dropout is not told that it trains, except by Keras."""

    def __init__(self):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.3, seed=6)

    def call(self, features):
        return self.dropout(features)


class Called(keras.layers.Layer):
    """A function as a layer that trains."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, pairs, training=True):
        return self.function(pairs)


def in_chunks_by_hand(model, num_chunks):
    """One chunk after another, as Keras would, with nothing forgotten."""

    def embed(pairs):
        noise, parts = model.image_tower.draw_noise(pairs["images"]), []
        for index in range(num_chunks):
            chunk = {key: value[index::num_chunks] for key, value in pairs.items()}
            parts.append(model._embed(chunk, True, noise[index::num_chunks]))
        return {
            key: ops.reshape(ops.stack([x[key] for x in parts], axis=1), (BATCH, -1))
            for key in parts[0]
        }

    return Called(embed)


# === The same gradients ===


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    ("masking", "loss"),
    [
        pytest.param(hidden_padding, "sigmoid", id="hidden_padding"),
        # It has a threshold that moves.
        pytest.param(MASKINGS["threshold"], "softmax", id="threshold"),
        *(
            pytest.param(MASKINGS[name], "softmax", id=name, marks=pytest.mark.slow)
            for name in MASKINGS
            if name != "threshold"
        ),
    ],
)
def test_gradients_are_those_of_the_whole_batch(masking, loss, monkeypatch):
    pairs = random_pairs(BATCH)
    whole = make_model(masking, loss=loss)
    expected = loss_and_gradients(whole, pairs)
    for micro_batch_size, block_size in ((2, 3), (6, BATCH)):
        monkeypatch.setattr(losses, "MAX_PAIRS", BATCH * block_size)
        model = make_model(masking, micro_batch_size=micro_batch_size, loss=loss)
        found = loss_and_gradients(model, pairs)
        assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
        assert largest_error(found[1], expected[1]) < 1e-5


@pytest.mark.slow_to_compile
def test_gradients_with_dropout_are_those_of_the_same_chunks_remembered():
    # In the image encoder, after the text encoder, and in the projections.
    pairs, options = random_pairs(BATCH), {"head": "mlp", "projection_dim": 8}
    reference = make_model(dropout=True, **options)
    expected = loss_and_gradients(reference, pairs, in_chunks_by_hand(reference, 3))
    model = make_model(dropout=True, micro_batch_size=4, **options)
    found = loss_and_gradients(model, pairs)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert largest_error(found[1], expected[1]) < 1e-5


def model_of_layers(*layers, **options):
    """A model, the last layers of whose image encoder are given."""
    images = keras.Input((16, 16, 3))
    encoder = keras.Sequential([images, keras.layers.GlobalAveragePooling2D(), *layers])
    return kcm.ContrastiveModel(encoder, text_bag(), **options)


def test_a_batch_normalization_remembers_the_whole_batch():
    # Deviations within chunks differ, but the mean of means is the batch's.
    means = []
    for micro_batch_size in (None, 4):
        norm = keras.layers.BatchNormalization()
        layers = norm, keras.layers.Dense(16)
        model = model_of_layers(*layers, micro_batch_size=micro_batch_size)
        model(random_pairs(BATCH), training=True)
        means.append(to_numpy(norm.moving_mean))
    assert np.abs(means[0]).max() > 1e-4
    np.testing.assert_allclose(means[1], means[0], rtol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_losses_that_layers_add_count_and_are_averaged(micro_batch_size):
    regularizer = keras.regularizers.L2(3.0)
    first = keras.layers.Dense(8, activity_regularizer=regularizer)
    last = keras.layers.Dense(16, kernel_regularizer=regularizer)
    model = model_of_layers(first, last, micro_batch_size=micro_batch_size)
    model.compile(keras.optimizers.SGD(0.0), **FAST)
    pairs = random_pairs(BATCH)
    pair = [to_numpy(value) for value in model(pairs).values()]
    pixels = model.image_tower.prepare(pairs["images"])
    activity = to_numpy(first(ops.mean(pixels, axis=(1, 2))))
    penalty = np.sum(activity**2) / BATCH + np.sum(to_numpy(last.kernel) ** 2)
    expected = reference("softmax", pair, 1 / 0.07) + 3.0 * penalty
    fit = dict(batch_size=BATCH, shuffle=False, epochs=2, verbose=0)
    found = model.fit(pairs, **fit).history["loss"]
    assert found == pytest.approx([expected] * 2, rel=1e-5)


def of_backbone(make, *dtype, **options):
    masking = kcm.RandomMasking(0.5, seed=1)
    return kcm.ContrastiveModel.from_backbone(make(*dtype), masking=masking, **options)


def of_dino_3(**options):
    encoder = pooled(dino_3_encoder(2))
    masked = kcm.with_masking(encoder, kcm.RandomMasking(0.5, seed=1))
    return kcm.ContrastiveModel(masked, text_bag(), **options)


KINDS = {
    "clip": (functools.partial(of_backbone, tiny_clip), random_pairs),
    "siglip": (functools.partial(of_backbone, tiny_siglip), random_pairs),
    "metaclip": (functools.partial(of_backbone, tiny_metaclip), metaclip_pairs),
    "dino_3": (of_dino_3, random_pairs),
    "bert": (model_of_bert, texts),
}


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_train_a_model_of_any_kind_as_the_whole_batch_does(kind):
    make, make_pairs = KINDS[kind]
    found = []
    for size in (None, 4):
        keras.utils.set_random_seed(0)
        model = make(micro_batch_size=size)
        model.compile(keras.optimizers.SGD(0.1), **FAST)
        pairs = {**make_pairs(8), "label": np.arange(8)}
        model.fit(pairs, batch_size=8, shuffle=False, verbose=0)
        found.append(values(model.trainable_variables))
    assert_close(*found, 1e-5)


def loader(pairs):
    # Keras takes dictionaries of a `DataLoader` on torch alone, and tuples anywhere.
    return DataLoader(rows(pairs), 4, collate_fn=lambda x: (default_collate(x),))


@pytest.mark.parametrize("make", [DATA["PyDataset"], DATA["generator"], loader])
def test_batches_of_sizes_that_a_graph_does_not_know_are_split(make):
    def train(data, size):
        keras.utils.set_random_seed(0)
        model = small_model(micro_batch_size=size)
        model.compile(keras.optimizers.SGD(0.1))
        history = model.fit(data, batch_size=4, shuffle=False).history
        return [history["loss"], *model.trainable_variables]

    whole, partial = random_pairs(8), random_pairs(10)
    assert_close(train(make(whole), 2), train(whole, 2), 1e-5)
    assert_close(train(make(partial), 2), train(make(partial), None), 1e-5)
    uneven = random_pairs(11)
    if keras.backend.backend() == "tensorflow":
        # The graph does not know their number, and takes the last 3 pairs at once.
        assert_close(train(make(uneven), 2), train(make(uneven), None), 1e-5)
        return
    with pytest.raises(ValueError, match=r"`micro_batch_size` must .* a batch of 3"):
        train(make(uneven), 2)


@pytest.mark.any_backend
def test_bfloat16_trains_like_whole_batches():
    losses = []
    for micro_batch_size in (None, 4):
        keras.utils.set_random_seed(0)
        options = {"micro_batch_size": micro_batch_size}
        model = of_backbone(tiny_clip, "mixed_bfloat16", **options)
        model.compile(keras.optimizers.SGD(0.05), **FAST)
        fit = dict(batch_size=BATCH, shuffle=False, epochs=3, verbose=0)
        losses.append(model.fit(random_pairs(BATCH), **fit).history["loss"])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# === Memory ===


@pytest.mark.slow_to_compile
def test_memory_is_that_of_a_micro_batch():
    """Growing the batch eightfold at the same micro-batch costs hardly any memory."""
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow does not tell what a step keeps; see benchmarks.")
    sizes = {}
    for batch, micro in ((8, 8), (64, 8), (64, None)):
        keras.utils.set_random_seed(0)
        encoder = functional_vit(width=64, num_layers=2)
        model = kcm.ContrastiveModel(encoder, text_bag(64), micro_batch_size=micro)
        embeddings = 4 * batch * 64 * 4
        sizes[batch, micro] = (
            memory_of_gradients(model, random_pairs(batch)) - embeddings
        )
    assert sizes[64, 8] < 1.3 * sizes[8, 8]
    # The measure sees what there is to see.
    assert sizes[64, None] > 4 * sizes[8, 8]


@pytest.mark.slow_to_compile
def test_the_graph_does_not_grow_with_the_number_of_chunks():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("JAX has a loop, torch no graph.")
    sizes = []
    for micro_batch_size in (6, 2):
        model = make_model(micro_batch_size=micro_batch_size)
        sizes.append(_nodes_of_gradients(model))
    assert sizes[0] == sizes[1]


@pytest.mark.slow_to_compile
def test_frozen_weights_have_no_gradients_computed():
    """Nor are they part of the sums over chunks."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Elsewhere no gradient is computed that nobody reads.")
    sizes = []
    for frozen in (True, False):
        model = make_model(micro_batch_size=4)
        model.image_encoder.trainable = not frozen
        sizes.append(_nodes_of_gradients(model))
    import tensorflow as tf

    images = ops.convert_to_tensor(random_pairs(4)["images"])

    def forward():
        noise = model.image_tower.draw_noise(images)
        return model.image_tower.features(images, True, noise)

    def backward():
        with tf.GradientTape() as tape:
            total = ops.sum(forward())
        weights = model.image_encoder.trainable_variables
        return tape.gradient(total, [v.value for v in weights])

    # Of three chunks; parts of their graphs are shared.
    assert sizes[1] - sizes[0] > 2 * (_nodes(backward) - _nodes(forward))


def _nodes_of_gradients(model):
    """The number of operations in TensorFlow's graph of a batch's gradients."""
    import tensorflow as tf

    pairs = {k: ops.convert_to_tensor(v) for k, v in random_pairs(BATCH).items()}
    loss_and_gradients(model, pairs)

    def gradients():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=pairs, y_pred=model(pairs, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    return _nodes(gradients)


def _nodes(function):
    import tensorflow as tf

    graph = tf.function(function).get_concrete_function().graph.as_graph_def()
    bodies = [f.node_def for f in graph.library.function]
    return len(graph.node) + sum(map(len, bodies))


# === Refusals and saving ===


@pytest.mark.any_backend
def test_micro_batches_that_replicas_cannot_share_are_refused():
    check_micro_batches(12, 4, 2)
    with pytest.raises(ValueError, match=r"`micro_batch_size` must divide.*Received:"):
        check_micro_batches(12, 3, 2)
