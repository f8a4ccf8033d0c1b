"""Contrastive losses: their formulas, in blocks of rows, and labels of captions."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from numpy.linalg import norm
from scipy.optimize import approx_fprime
from scipy.special import log_softmax

from keras_cluster_mask import losses
from keras_cluster_mask.encoders.towers import l2_normalize
from keras_cluster_mask.losses import batch_loss, caption_labels
from tests.helpers import assert_close, to_numpy, value_and_gradients

BATCH, WIDTH = 12, 16
SCALE, BIAS = 14.3, -5.0
LABELS = {
    "none": None,
    "flat": np.array([0, 1, 2, 0, 4, 5, 1, 0, 8, 9, 10, 11], "int32"),
    "rows": np.random.default_rng(1).integers(0, 2, (BATCH, 3)).astype("int32"),
    "all_equal": np.zeros(BATCH, "int32"),
}
LOSSES = {
    "softmax": lambda images, texts, scale, bias, labels=None: (
        losses.softmax_contrastive_loss(images, texts, scale, labels)
    ),
    "sigmoid": losses.sigmoid_contrastive_loss,
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def embeddings(batch=BATCH, width=WIDTH, alike=0.5):
    pair = np.random.default_rng(0).normal(size=(2, batch, width))
    pair[1] += alike * pair[0]
    pair /= norm(pair, axis=-1, keepdims=True)
    return pair.astype("float32")


def positives_of(labels, batch):
    if labels is None:
        return np.eye(batch)
    labels = np.asarray(labels).reshape(batch, -1)
    return (labels[:, None] == labels[None]).all(axis=-1).astype("float64")


def hits_of(pair, labels=None):
    """Where the most similar text, and the most similar image, is a positive."""
    similarity, rows = pair[0] @ pair[1].T, np.arange(len(pair[0]))
    positives = positives_of(labels, len(rows))
    return np.stack([positives[rows, x.argmax(1)] for x in (similarity, similarity.T)])


def reference(loss, pair, scale=SCALE, bias=BIAS, labels=None, weight=None):
    """The sum over rows and columns of one matrix by their weights, or the mean."""
    images, texts = (x.astype("float64") for x in pair)
    positives = positives_of(labels, len(images))
    if weight is None:
        weight = np.full(len(images), 1 / len(images))
    logits = scale * images @ texts.T + (bias if loss == "sigmoid" else 0.0)

    def direction(logits):
        if loss == "softmax":
            targets = positives / positives.sum(axis=1, keepdims=True)
            terms = -targets * log_softmax(logits, axis=1)
        else:
            terms = np.logaddexp(0, np.where(positives, -logits, logits))
        return terms.sum(axis=1) @ weight

    return (direction(logits) + direction(logits.T)) / 2


# === Formulas ===


@each_loss
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (14.3, -10.0), (100.0, -20.0)])
def test_a_loss_is_the_plain_formula(loss, labels, scale, bias):
    pair, labels = embeddings(), LABELS[labels]
    found = to_numpy(LOSSES[loss](*pair, scale, bias, labels))
    expected = reference(loss, pair, scale, bias, labels)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.any_backend
def test_losses_are_those_of_open_clip():
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip.loss")
    pair = embeddings()
    tensors = [torch.tensor(x) for x in pair]
    for loss, expected in (
        ("softmax", open_clip.ClipLoss()(*tensors, SCALE)),
        ("sigmoid", open_clip.SigLipLoss()(*tensors, SCALE, BIAS)),
    ):
        found = to_numpy(LOSSES[loss](*pair, SCALE, BIAS))
        np.testing.assert_allclose(found, float(expected), rtol=1e-5)


@each_loss
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(loss, dtype):
    half = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    pair = embeddings().astype(half)
    found = LOSSES[loss](*pair, 100.0, -10.0)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    assert found.shape == ()
    expected = reference(loss, pair.astype("float32"), 100.0, -10.0)
    np.testing.assert_allclose(to_numpy(found), expected, rtol=2e-5)


@each_loss
@pytest.mark.parametrize("labels", ["none", "flat"])
def test_gradients_are_finite_even_at_zero_vectors_and_right(loss, labels):
    images, texts = embeddings()
    images[0], texts[3] = 0.0, 0.0
    variables = [keras.Variable(x) for x in (images, texts)]

    def fn():
        pair = [l2_normalize(variable.value) for variable in variables]
        value = LOSSES[loss](*pair, SCALE, BIAS, LABELS[labels])
        return value, value

    def expected(flat):
        pair = flat.reshape(images.shape), texts.astype("float64")
        pair = [x / np.maximum(norm(x, axis=1, keepdims=True), 1e-6) for x in pair]
        return reference(loss, pair, labels=LABELS[labels])

    _, gradients = value_and_gradients(fn, variables)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.abs(gradients[0][0]).max() > 0.0
    numeric = approx_fprime(images.ravel(), expected, 1e-7).reshape(images.shape)
    # The gradient at a vector of zeros is a million times as large.
    np.testing.assert_allclose(gradients[0][1:], numeric[1:], atol=1e-4, rtol=1e-3)


@pytest.mark.any_backend
@each_loss
@pytest.mark.parametrize("shape", [(4, 6), (5, 8), (4, 8, 1)])
def test_shapes_that_do_not_fit_are_refused(loss, shape):
    pair = np.ones(shape), np.ones((4, 8))
    with pytest.raises(ValueError, match=r"have the same shape.*Received: .*shape="):
        LOSSES[loss](*pair, 1.0, 0.0)


# === Blocks of rows ===


def unlike(batch=BATCH):
    return embeddings(batch=batch, width=8, alike=0.0)


@pytest.fixture
def blocks(monkeypatch):
    """The numbers of rows that are compared at a time."""
    found, compare = [], losses.compare

    def watched(block, everything):
        found.append(block[0].shape[0])
        return compare(block, everything)

    monkeypatch.setattr(losses, "compare", watched)
    return found


def in_blocks(loss, *arrays):
    scalars = [SCALE] if loss == "softmax" else [SCALE, BIAS]
    tensors = [ops.convert_to_tensor(x) for x in (*scalars, *arrays)]
    return batch_loss(loss, tensors[: len(scalars)], *tensors[len(scalars) :])


@pytest.mark.one_case
@pytest.mark.parametrize("block_size", [1, 3, 5, 12])
def test_any_block_size_gives_the_loss_and_accuracy_of_the_matrix(
    block_size, monkeypatch
):
    monkeypatch.setattr(losses, "MAX_PAIRS", BATCH * block_size)
    images, texts = unlike()
    labels = LABELS["flat"]
    found, accuracies = in_blocks("softmax", images, texts, labels)
    assert found.shape == accuracies.shape == (BATCH,)
    expected = losses.softmax_contrastive_loss(images, texts, SCALE, labels)
    np.testing.assert_allclose(to_numpy(found).mean(), to_numpy(expected), rtol=1e-6)
    hits = hits_of((images, texts), labels)
    np.testing.assert_array_equal(to_numpy(accuracies), hits.mean(axis=0))
    # Each direction has hits and misses, at other pairs.
    assert {*hits[0]} == {*hits[1]} == {0.0, 1.0}
    assert (hits[0] != hits[1]).any()


@pytest.mark.one_case
@each_loss
@pytest.mark.parametrize("rows", [7, 11, 13])
def test_a_batch_without_divisors_is_compared_in_large_blocks(
    loss, rows, blocks, monkeypatch
):
    weight = np.linspace(0.0, 2.0, rows).astype("float32")
    inputs = *unlike(rows), np.arange(rows) // 2, weight
    expected = in_blocks(loss, *inputs)
    blocks.clear()
    monkeypatch.setattr(losses, "MAX_PAIRS", 4 * rows)
    found = in_blocks(loss, *inputs)
    assert {*blocks} <= {3, 4}
    assert_close(found, expected, atol=0.0, rtol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="elsewhere a step sees its own rows"
)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_block_is_as_large_as_each_device_can_compare(devices, blocks, monkeypatch):
    monkeypatch.setattr(losses, "MAX_PAIRS", 12 * 3)
    pair, labels = unlike(), LABELS["flat"]
    distribution = keras.distribution.DataParallel(
        devices=[f"cpu:{index}" for index in range(devices)]
    )
    with distribution.scope():
        found = in_blocks("softmax", *pair, labels)
    # Three rows of each device at a time: each further block is a round of collectives.
    assert {*blocks} == {min(12, 3 * devices)}
    expected = losses.softmax_contrastive_loss(*pair, SCALE, labels)
    np.testing.assert_allclose(ops.mean(found[0]), expected, rtol=1e-6)


@each_loss
def test_rows_that_fill_up_a_block_have_no_part_in_gradients(loss, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 30, (11, 5))
    labels = caption_labels(ops.convert_to_tensor(ids))
    variables = [keras.Variable(x) for x in unlike(11)]

    def gradients():
        def fn():
            pair = [variable.value for variable in variables]
            total = ops.sum(in_blocks(loss, *pair, labels)[0])
            return total, total

        return value_and_gradients(fn, variables)[1]

    expected = gradients()
    assert all(np.any(gradient) for gradient in expected)
    monkeypatch.setattr(losses, "MAX_PAIRS", 4 * 11)
    assert_close(gradients(), expected, atol=1e-5, rtol=1e-4)


@each_loss
def test_weights_count_in_both_directions(loss):
    pair, labels = unlike(), LABELS["flat"]
    weight = np.array([0, 1, 2, 0.5, 1, 0, 3, 1, 1, 0.25, 1, 2])
    found, _ = in_blocks(loss, *pair, labels, weight.astype("float32"))
    expected = reference(loss, pair, labels=labels, weight=weight)
    np.testing.assert_allclose(to_numpy(ops.sum(found)), expected, rtol=1e-5)


# === Captions as labels ===


def labels_of(ids):
    return ops.convert_to_numpy(caption_labels(ids))


def test_captions_have_equal_labels_exactly_if_they_are_equal():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, size=(400, 5)).astype("int32")
    labels = labels_of(ids)
    assert labels.shape == (400, 2)
    same = positives_of(ids, 400)
    assert 400 < same.sum() < 400**2
    np.testing.assert_array_equal(positives_of(labels, 400), same)


@pytest.mark.any_backend
@pytest.mark.parametrize("column", [0, 1])
def test_labels_of_captions_that_hardly_differ_do_not_collide(column):
    # One token changed, two tokens swapped, moved by one place, large ids.
    base = np.zeros((1, 77), "int32")
    changed = np.repeat(base, 49408, axis=0)
    changed[:, 5] = np.arange(49408)
    swapped = np.repeat(base, 76, axis=0)
    swapped[np.arange(76), np.arange(76)] = 320
    swapped[np.arange(76), np.arange(76) + 1] = 640
    moved = np.roll(swapped, 2, axis=1)
    ids = np.unique(np.concatenate([changed, swapped, moved, 49407 - changed]), axis=0)
    labels = labels_of(ids)[:, column]
    # Of n^2 / 2 pairs one in 2^32 may share one of the two numbers.
    assert len(ids) - len(np.unique(labels)) <= 6


@pytest.mark.any_backend
@pytest.mark.parametrize("labels", [np.zeros(1), np.zeros((1, 6)), np.zeros(5)])
def test_labels_of_another_length_are_refused(labels):
    pair = [np.eye(6, 8, dtype="float32")] * 2
    with pytest.raises(ValueError, match=r"`labels` must have one row.*Received: "):
        losses.softmax_contrastive_loss(*pair, 10.0, labels)
