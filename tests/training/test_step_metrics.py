"""Steps are counted where they run, up to the first loss that is not finite."""

import keras
import numpy as np
import pytest

from keras_cluster_mask.training.step_metrics import FiniteSteps
from tests.helpers import FAST, random_pairs, small_model


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], (0, 0, 0.0)),
        ([2.0, 1.0], (2, 2, 1.0)),
        ([2.0, np.nan, np.nan], (3, 1, np.nan)),
        # What came first is told, also when a later epoch starts with a finite loss.
        ([2.0, 1.0, np.inf, np.nan, 3.0], (5, 2, np.inf)),
        ([-np.inf], (1, 0, -np.inf)),
    ],
)
def test_the_first_loss_that_is_not_finite_is_found(losses, expected):
    record = FiniteSteps()
    for loss in losses:
        record.update_state(np.float32(loss))
    np.testing.assert_equal(record.read(), expected)


def compiled(**options):
    model = small_model()
    model.compile("sgd", **FAST, **options)
    return model


def test_a_callback_that_resets_metrics_does_not_hide_a_loss():
    class Reset(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()

    pairs = random_pairs(20)
    pairs["images"] = pairs["images"] / np.float32(64) - 2
    pairs["images"][9] = np.nan
    model = compiled()
    # A rate of 0 keeps weights finite, and with them the losses that follow.
    model.optimizer.learning_rate = 0.0
    model.fit(pairs, batch_size=4, shuffle=False, verbose=0, callbacks=[Reset()])
    steps, finite, loss = model.finite_steps.read()
    assert (steps, finite) == (5, 2)
    assert np.isnan(loss)
