"""Rows of a batch, gathered in the way of each backend."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_cluster_mask.distribution.gathers import take_rows
from tests.helpers import to_numpy, value_and_gradients


def reference(values, indices):
    return np.stack([rows[index] for rows, index in zip(values, indices)])


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 5, 2, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_rows_and_their_order_are_those_of_the_indices(shape, dtype):
    rng = np.random.default_rng(0)
    values = ops.cast(rng.integers(0, 2 if dtype == "bool" else 99, shape), dtype)
    # Some rows several times, some never; also as the int64 of torch's sorts.
    indices = rng.integers(0, 5, (3, 7))
    for index in (indices.astype("int32"), indices):
        found = take_rows(values, ops.convert_to_tensor(index))
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        np.testing.assert_array_equal(
            to_numpy(found), reference(to_numpy(values), indices)
        )


def test_the_gradient_of_a_row_is_the_sum_of_those_of_its_copies():
    rng = np.random.default_rng(1)
    values = keras.Variable(rng.normal(size=(3, 5, 4)).astype("float32"))
    indices = rng.integers(0, 5, (3, 7)).astype("int32")
    weights = rng.normal(size=(3, 7, 4)).astype("float32")

    def loss():
        total = ops.sum(take_rows(values, indices) * ops.convert_to_tensor(weights))
        return total, ops.stop_gradient(total)

    _, (gradient,) = value_and_gradients(loss, [values])
    expected = np.zeros((3, 5, 4))
    np.add.at(expected, (np.arange(3)[:, None], indices), weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_batch_of_unknown_size_is_gathered_too():
    inputs = [keras.Input((5, 4)), keras.Input((2,), dtype="int32")]
    layer = keras.layers.Lambda(lambda x: take_rows(*x), output_shape=(2, 4))
    model = keras.Model(inputs, layer(inputs))
    values = np.random.default_rng(2).normal(size=(3, 5, 4)).astype("float32")
    indices = np.array([[4, 0], [1, 1], [2, 3]], "int32")
    found = model.predict([values, indices], verbose=0)
    np.testing.assert_array_equal(found, reference(values, indices))
