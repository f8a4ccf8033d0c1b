"""A count of steps on the device, which tells where a loss stopped being finite."""

import keras
from keras import ops

from keras_cluster_mask.distribution.replicas import all_gather


class FiniteSteps(keras.metrics.Metric):
    """Counts the steps of an epoch, and those before the first loss that is not finite.

    To look at the loss of each step, the program would have to wait for each step. This
    is read now and then instead, and still names the step. It is a metric because steps
    update metrics on every backend, but the logs do not show it.

    All replicas count alike: a loss that is not finite on one of them is so for all.

    Attributes:
        steps: Integer variable, the steps of the epoch.
        finite: Integer variable, those before the first loss that was not finite.
        loss: Float variable, the mean loss of an epoch up to that step; of the last
            step if all are finite.
    """

    def __init__(self, name="finite_steps"):
        super().__init__(name=name)
        options = {"initializer": "zeros", "aggregation": "only_first_replica"}
        self.steps = self.add_variable((), dtype="int", name="steps", **options)
        self.finite = self.add_variable((), dtype="int", name="finite", **options)
        self.loss = self.add_variable((), dtype="float32", name="loss", **options)

    def update_state(self, loss):
        """Counts a step.

        Args:
            loss: Scalar, the mean loss of the steps of an epoch. It stays NaN or
                infinite from the first step on whose loss is.
        """
        # On torch it is, unless `compute_loss` is overridden, the same already.
        loss = ops.mean(all_gather(ops.reshape(ops.cast(loss, "float32"), (1,))))
        # The mean is reset if a callback resets the model's metrics; this stays.
        last = ops.convert_to_tensor(self.loss)
        loss = ops.where(ops.isfinite(last), loss, last)
        self.loss.assign(loss)
        self.finite.assign_add(ops.cast(ops.isfinite(loss), self.finite.dtype))
        self.steps.assign_add(1)

    def reset_state(self):
        """Does nothing, as a callback may reset the model's metrics."""

    def restart(self):
        """Starts to count an epoch."""
        super().reset_state()

    def result(self):
        """No entry of the logs."""
        return {}

    def read(self):
        """Waits for the device: `(steps, finite, loss)`, two integers and a float."""
        steps, finite, loss = map(
            ops.convert_to_numpy, (self.steps, self.finite, self.loss)
        )
        return int(steps), int(finite), float(loss)
