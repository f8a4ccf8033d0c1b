"""The loss in blocks of rows is the loss."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_cluster_mask import losses
from keras_cluster_mask.losses import batch_loss, caption_labels
from tests.helpers import to_numpy, value_and_gradients


def embeddings(batch=12, width=8):
    pair = np.random.default_rng(0).normal(size=(2, batch, width))
    return (pair / np.linalg.norm(pair, axis=-1, keepdims=True)).astype("float32")


LABELS = np.array([0, 1, 2, 0, 4, 5, 1, 0, 8, 9, 10, 11], "int32")


@pytest.mark.parametrize("block_size", [1, 3, 5, 12])
def test_any_block_size_gives_the_loss_and_accuracies_of_the_matrix(
    block_size, monkeypatch
):
    monkeypatch.setattr(losses, "MAX_PAIRS", 12 * block_size)
    pair = [ops.convert_to_tensor(x) for x in embeddings()]
    labels = ops.convert_to_tensor(LABELS)
    scale = ops.convert_to_tensor(14.3)
    found = batch_loss("softmax", [scale], *pair, labels)
    expected = losses.softmax_contrastive_loss(*pair, scale, labels)
    assert all(x.shape == (12,) for x in found)
    np.testing.assert_allclose(
        to_numpy(ops.mean(found[0])), to_numpy(expected), rtol=1e-6
    )
    accuracies = [float(ops.mean(x)) for x in found[1:]]
    images, texts = embeddings()
    positive = LABELS[:, None] == LABELS[None]
    for found, similarity in zip(accuracies, (images @ texts.T, texts @ images.T)):
        right = positive[np.arange(12), similarity.argmax(axis=1)]
        assert found == pytest.approx(right.mean())
        assert 0 < found < 1


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [7, 11, 13])
def test_a_batch_without_divisors_is_compared_in_large_blocks(loss, rows, monkeypatch):
    pair = [ops.convert_to_tensor(x) for x in embeddings(rows)]
    labels = ops.convert_to_tensor(np.arange(rows) // 2)
    weight = ops.convert_to_tensor(np.linspace(0.0, 2.0, rows).astype("float32"))
    scalars = [ops.convert_to_tensor(x) for x in (14.3, -5.0)][
        : 1 + (loss != "softmax")
    ]
    expected = batch_loss(loss, scalars, *pair, labels, weight)
    blocks = []
    compare = losses.compare

    def watched(block, everything):
        blocks.append(block[0].shape[0])
        return compare(block, everything)

    monkeypatch.setattr(losses, "compare", watched)
    monkeypatch.setattr(losses, "MAX_PAIRS", 4 * rows)
    found = batch_loss(loss, scalars, *pair, labels, weight)
    assert {*blocks} <= {3, 4}
    for one, other in zip(found, expected):
        np.testing.assert_allclose(to_numpy(one), to_numpy(other), rtol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="elsewhere a step sees its own rows"
)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_block_is_as_large_as_each_device_can_compare(devices, monkeypatch):
    blocks = []
    compare = losses.compare

    def watched(block, everything):
        blocks.append(block[0].shape[0])
        return compare(block, everything)

    monkeypatch.setattr(losses, "compare", watched)
    monkeypatch.setattr(losses, "MAX_PAIRS", 12 * 3)
    pair = [ops.convert_to_tensor(x) for x in embeddings()]
    distribution = keras.distribution.DataParallel(
        devices=[f"cpu:{index}" for index in range(devices)]
    )
    with distribution.scope():
        found = batch_loss("softmax", [14.3], *pair, ops.convert_to_tensor(LABELS))
    # Three rows of each device at a time: each further block is a round of collectives.
    assert {*blocks} == {min(12, 3 * devices)}
    expected = losses.softmax_contrastive_loss(*pair, 14.3, LABELS)
    np.testing.assert_allclose(ops.mean(found[0]), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_rows_that_fill_up_a_block_have_no_part_in_gradients(loss, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 30, (11, 5))
    labels = caption_labels(ops.convert_to_tensor(ids))
    scalars = [ops.convert_to_tensor(x) for x in (14.3, -5.0)][
        : 1 + (loss != "softmax")
    ]
    variables = [keras.Variable(x) for x in embeddings(11)]

    def gradients():
        def fn():
            pair = [variable.value for variable in variables]
            total = ops.sum(batch_loss(loss, scalars, *pair, labels)[0])
            return total, total

        return value_and_gradients(fn, variables)[1]

    expected = gradients()
    monkeypatch.setattr(losses, "MAX_PAIRS", 4 * 11)
    for one, other in zip(gradients(), expected):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_weights_count_in_both_directions(loss):
    # The reference: weighted sums over the rows and over the columns of one matrix.
    images, texts = (x.astype("float64") for x in embeddings())
    weight = np.array([0, 1, 2, 0.5, 1, 0, 3, 1, 1, 0.25, 1, 2])
    positive = LABELS[:, None] == LABELS[None]
    logits = 14.3 * images @ texts.T
    if loss == "softmax":
        targets = positive / positive.sum(axis=1, keepdims=True)

        def direction(logits):
            total = np.log(np.exp(logits).sum(axis=1, keepdims=True))
            return -(targets * (logits - total)).sum(axis=1) @ weight

        scalars = [14.3]
    else:
        logits = logits - 5.0

        def direction(logits):
            terms = np.logaddexp(0, np.where(positive, -logits, logits))
            return terms.sum(axis=1) @ weight

        scalars = [14.3, -5.0]
    expected = (direction(logits) + direction(logits.T)) / 2
    given = (*embeddings(), LABELS, weight.astype("float32"))
    found = batch_loss(
        loss,
        [ops.convert_to_tensor(x) for x in scalars],
        *map(ops.convert_to_tensor, given),
    )
    np.testing.assert_allclose(to_numpy(ops.sum(found[0])), expected, rtol=1e-5)


# === Captions as labels ===


def test_captions_have_equal_labels_exactly_if_they_are_equal():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, size=(400, 5)).astype("int32")
    labels = to_numpy_ints(caption_labels(ids))
    assert labels.shape == (400, 2)
    same = (ids[:, None] == ids[None]).all(axis=-1)
    assert 400 < same.sum() < 400**2
    np.testing.assert_array_equal((labels[:, None] == labels[None]).all(-1), same)


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
    labels = to_numpy_ints(caption_labels(ids))[:, column]
    # Of n^2 / 2 pairs one in 2^32 may share one of the two numbers.
    assert len(ids) - len(np.unique(labels)) <= 6


def to_numpy_ints(x):
    return np.array(ops.convert_to_numpy(x))
