"""Small differences between the backends."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.distribution.replicas import take_rows
from keras_cluster_mask.losses import batch_loss
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    random_pairs,
    small_model,
    to_numpy,
    value_and_gradients,
)

on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX alone multiplies in other precisions"
)

# === Rows of a batch, gathered in the way of each backend ===


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
        assert_same_values(to_numpy(found), reference(to_numpy(values), indices))


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
    assert_close(gradient, expected)


def test_a_batch_of_unknown_size_is_gathered_too():
    inputs = [keras.Input((5, 4)), keras.Input((2,), dtype="int32")]
    layer = keras.layers.Lambda(lambda x: take_rows(*x), output_shape=(2, 4))
    model = keras.Model(inputs, layer(inputs))
    values = np.random.default_rng(2).normal(size=(3, 5, 4)).astype("float32")
    indices = np.array([[4, 0], [1, 1], [2, 3]], "int32")
    found = model.predict([values, indices], verbose=0)
    assert_same_values(found, reference(values, indices))


# === Precision of the products that decide which patch stays ===


IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
EMBEDDINGS = np.eye(4, 8, dtype="float32")


def products_of(function, *arrays):
    """The precisions of the products of matrices in a compiled function."""
    import jax

    text = jax.jit(function).lower(*arrays).as_text()
    return [
        "HIGHEST" in line for line in re.findall(r".*stablehlo\.dot_general.*", text)
    ]


@on_jax
def test_another_product_has_the_default_precision():
    assert products_of(ops.matmul, EMBEDDINGS, EMBEDDINGS.T) == [False]


@on_jax
@pytest.mark.parametrize(
    "masking",
    [
        kcm.ClusterMasking(0.5, patch_size=4),
        kcm.ClusterMasking(0.5, patch_size=4, embedding_weight=0.5),
        kcm.KMeansMasking(0.5, patch_size=4, num_clusters=3),
        kcm.EdgeMasking(0.5, patch_size=4),
    ],
    ids=lambda masking: f"{type(masking).__name__}-{masking.embedding_weight}",
)
def test_similarity_of_patches_has_that_of_float32(masking):
    noise = np.random.default_rng(1).random((2, 16), dtype="float32")
    tokens = np.random.default_rng(2).normal(size=(2, 16, 8)).astype("float32")
    masking.num_prefix_tokens = 0
    found = products_of(
        lambda *arrays: masking.select(*arrays)[0], IMAGES, tokens, noise
    )
    assert found
    assert all(found)


@on_jax
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_similarity_of_embeddings_and_its_gradient_have_that_of_float32(loss):
    import jax

    weights = [10.0] if loss == "softmax" else [10.0, -10.0]

    def mean_loss(images, texts):
        losses, _ = batch_loss(loss, weights, images, texts, np.arange(4))
        return ops.mean(losses)

    found = products_of(jax.grad(mean_loss, (0, 1)), EMBEDDINGS, EMBEDDINGS)
    assert len(found) >= 3
    assert all(found)


# === A model keeps its weights where evaluating it fails ===


PAIRS = random_pairs(4)


def batches(data):
    """A stream whose last batch cannot be read."""
    yield from [(data,)] * 3
    raise OSError("a damaged file")


def failing(call, model):
    data = batches(PAIRS["images"] if call == "tower" else PAIRS)
    if call == "tower":
        return model.image_tower.predict(data, verbose=0)
    if call != "fit":
        return getattr(model, call)(data, verbose=0)
    options = dict(batch_size=4, validation_steps=5, verbose=0)
    return model.fit(PAIRS, validation_data=data, **options)


@pytest.mark.parametrize("call", ["evaluate", "predict", "tower", "fit"])
def test_weights_are_kept_where_a_batch_of_evaluation_cannot_be_read(call):
    keras.utils.set_random_seed(0)
    model, expected = small_model(), small_model()
    expected.set_weights(model.get_weights())
    for each in (model, expected):
        each.compile(keras.optimizers.SGD(0.05), **FAST)
        each.fit(PAIRS, batch_size=4, shuffle=False, verbose=0)
    if call == "fit":
        expected.fit(PAIRS, batch_size=4, verbose=0)
    with pytest.raises(Exception, match="a damaged file"):
        failing(call, model)
    assert_close(model.weights, expected.weights)
    # And training continues.
    model.fit(PAIRS, batch_size=4, verbose=0)


# === Imports ===


@pytest.mark.slow
@pytest.mark.any_backend
def test_triton_is_imported_before_tensorflow(tmp_path):
    # The other way around, the real one ends the program.
    stand_in = "import sys; print('tensorflow' in sys.modules, end='')"
    (tmp_path / "triton.py").write_text(stand_in)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    module = "keras_cluster_mask.distribution.backends"
    done = subprocess.run(
        [sys.executable, "-c", f"import {module} as first; first.import_keras_hub()"],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False"
