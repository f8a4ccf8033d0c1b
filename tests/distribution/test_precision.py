"""Products that decide which patch stays, or are scaled, are those of float32."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.losses import batch_loss

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX alone multiplies in other precisions"
)

IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
EMBEDDINGS = np.eye(4, 8, dtype="float32")


def products_of(function, *arrays):
    """The precisions of the products of matrices in a compiled function."""
    import jax

    text = jax.jit(function).lower(*arrays).as_text()
    return [
        "HIGHEST" in line for line in re.findall(r".*stablehlo\.dot_general.*", text)
    ]


def test_another_product_has_the_default_precision():
    assert products_of(ops.matmul, EMBEDDINGS, EMBEDDINGS.T) == [False]


@pytest.mark.parametrize(
    "masking",
    [
        kcm.ClusterMasking(4, 0.5),
        kcm.ClusterMasking(4, 0.5, embedding_weight=0.5),
        kcm.KMeansMasking(4, 0.5, num_clusters=3),
        kcm.EdgeMasking(4, 0.5),
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


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_similarity_of_embeddings_and_its_gradient_have_that_of_float32(loss):
    import jax

    weights = [10.0] if loss == "softmax" else [10.0, -10.0]

    def mean_loss(images, texts):
        losses, *_ = batch_loss(loss, weights, images, texts, np.arange(4))
        return ops.mean(losses)

    found = products_of(jax.grad(mean_loss, (0, 1)), EMBEDDINGS, EMBEDDINGS)
    assert len(found) >= 3
    assert all(found)
