"""Strategies of TensorFlow: two devices of one process."""

import contextlib
import itertools

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import (
    assert_close,
    by_tower,
    model_with_log,
    random_pairs,
    small_model,
    stream,
    tiny_clip,
)

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="strategies of TensorFlow"
)


@pytest.fixture(scope="session")
def strategy():
    """Two devices, of which `tests/conftest.py` sets up the second.

    One for a process, which may run tests of other modules in between: a second
    strategy's collective operations have the first one's numbers.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def as_dataset(data, batch_size=8, drop_remainder=True):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(data)
    return dataset.batch(batch_size, drop_remainder=drop_remainder)


@pytest.mark.slow_to_compile
def test_replicas_see_each_batch_of_a_stream_once_and_in_order(strategy, write_pairs):
    shard = write_pairs("a.tar", 0, 14)
    with strategy.scope():
        model, log = model_with_log(steps=14)
        model.compile("sgd")
    data = stream(shard)
    model.fit(data, epochs=3, verbose=0)
    model.fit(data, steps_per_epoch=5, verbose=0)
    batches = itertools.islice(stream(shard), 14)
    expected = [batch["token_ids"][:, 0] for batch in batches]
    np.testing.assert_array_equal(log.seen_tokens(), expected)


@pytest.mark.slow_to_compile
@pytest.mark.parametrize("duplicates", ["positive", "negative"])
def test_replicas_without_rows_count_for_nothing_in_evaluation(duplicates, strategy):
    one = small_model(duplicates=duplicates)
    one.compile("sgd")
    with strategy.scope():
        two = small_model(duplicates=duplicates)
        two.compile("sgd")
    two.set_weights(one.get_weights())
    for count in (9, 11):
        weight = np.linspace(0, 2, count, dtype="float32")
        for weights in ({}, {"sample_weight": weight}):
            data = as_dataset(random_pairs(count) | weights, drop_remainder=False)
            found, expected = (x.evaluate(data, verbose=0) for x in (two, one))
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(count))


@pytest.mark.slow_to_compile
def test_a_model_is_trained_outside_of_the_scope_of_its_strategy(strategy):
    data, models = as_dataset(random_pairs(16)), []
    for scope in (contextlib.nullcontext(), strategy.scope()):
        keras.utils.set_random_seed(0)
        with scope:
            model = small_model()
            # Of a size at which rounding makes no step of Adam.
            model.compile(keras.optimizers.Adam(1e-2, epsilon=1e-2))
        model.fit(data, verbose=0)
        models.append(model)
    assert_close(*(x.trainable_variables for x in models), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("", 3, "must be known and divisible[^$]*Received: batch_size=3, 2 replicas"),
        (
            "unknown size",
            8,
            "must be known and divisible[^$]*Received: batch_size=None",
        ),
        ("executions", 8, "`steps_per_execution` must be 1 on several TensorFlow"),
        ("scaled", 8, "`gradient_accumulation_steps` must be 1.*Received: .*=2"),
        ("by tower", 8, "`gradient_accumulation_steps` must be 1.*Received: .*=2"),
        ("masking", 8, r"its masking, must be created in the scope[\s\S]*cluster_mas"),
    ],
)
def test_what_replicas_cannot_do_is_refused(kind, size, message, strategy):
    masking = None
    if kind == "masking":
        masking = kcm.ClusterMasking(patch_size=4, embedding_weight=0.5)
    with strategy.scope():
        model = kcm.ContrastiveModel.from_backbone(tiny_clip(), masking=masking)
        optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
        optimizer = {
            "scaled": keras.optimizers.LossScaleOptimizer(optimizer),
            "by tower": by_tower(model, "sgd", text=optimizer),
        }.get(kind, "sgd")
        model.compile(optimizer, steps_per_execution=1 + (kind == "executions"))
    with pytest.raises(ValueError, match=message):
        model.fit(as_dataset(random_pairs(16), size, kind != "unknown size"))
