"""Averages of the weights of a model."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import assert_same_values, values

pytestmark = pytest.mark.any_backend


def test_batch_norm_statistics_are_averaged_unless_their_layer_is_frozen():
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (32, 4)), rng.normal(0, 1, (32, 2))
    frozen = keras.layers.BatchNormalization()
    model = keras.Sequential(
        [frozen, keras.layers.Dense(3), keras.layers.BatchNormalization()]
        + [keras.layers.Dense(2)]
    )
    expected = model.predict(x, verbose=0)
    frozen.trainable = False
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.get_weights()
    model.fit(x, y, epochs=3, verbose=0)
    assert np.abs(model.predict(x, verbose=0) - expected).max() > 0.1
    frozen.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    kcm.models.average_weights(model, before, share=1.0)
    assert_same_values(values([frozen.moving_mean]), [np.float32([1, 2, 3, 4])])
    frozen.moving_mean.assign(np.zeros(4))
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=1e-5)


def test_factors_of_lora_are_not_averaged():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match=r"`share` must be 0.*LoRA.*Received: share=0"):
        kcm.models.average_weights(model, model.get_weights(), share=0.5)
    kcm.models.average_weights(model, model.get_weights(), share=0)
