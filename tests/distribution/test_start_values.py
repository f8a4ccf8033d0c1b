"""A model keeps its weights where evaluating it fails."""

import keras
import numpy as np
import pytest

from tests.helpers import FAST, random_pairs, small_model, values

PAIRS = random_pairs(4)


def batches(data, good):
    """A stream whose batch after the good ones cannot be read."""
    for _ in range(good):
        yield (data,)
    raise OSError("a damaged file")


def failing(call, model, good):
    if call == "evaluate":
        return model.evaluate(batches(PAIRS, good), verbose=0)
    if call == "predict":
        return model.predict(batches(PAIRS, good), verbose=0)
    if call == "tower":
        return model.image_tower.predict(batches(PAIRS["images"], good), verbose=0)
    return model.fit(
        PAIRS,
        batch_size=4,
        validation_data=batches(PAIRS, good),
        validation_steps=5,
        verbose=0,
    )


@pytest.mark.parametrize("good", [1, 3])
@pytest.mark.parametrize("call", ["evaluate", "predict", "tower", "fit"])
def test_weights_are_kept_where_a_batch_of_evaluation_cannot_be_read(call, good):
    keras.utils.set_random_seed(0)
    model, expected = small_model(), small_model()
    expected.set_weights(model.get_weights())
    for each in (model, expected):
        each.compile(keras.optimizers.SGD(0.05), **FAST)
        each.fit(PAIRS, batch_size=4, shuffle=False, verbose=0)
    if call == "fit":
        expected.fit(PAIRS, batch_size=4, verbose=0)
    with pytest.raises(Exception, match="a damaged file"):
        failing(call, model, good)
    for one, other in zip(values(model.weights), values(expected.weights)):
        np.testing.assert_allclose(one, other, atol=1e-6)
    # And training continues.
    model.fit(PAIRS, batch_size=4, verbose=0)
