"""Metrics of training steps: means, finite losses, and the norm of gradients."""

import threading

import keras
from keras import ops

from keras_cluster_mask.distribution.gradients import global_norm
from keras_cluster_mask.distribution.replicas import all_gather

# Of retrieval within a batch.
DIRECTIONS = "image_to_text", "text_to_image"


class StepMean(keras.metrics.Mean):
    """A mean over steps, which the logs leave out if no step updates it."""

    is_updated = False

    def update_state(self, values, sample_weight=None):
        self.is_updated = True
        super().update_state(values, sample_weight)

    def result(self):
        return super().result() if self.is_updated else {}


class FiniteSteps(keras.metrics.Metric):
    """Counts the steps of an epoch, and the steps before the first non-finite loss.

    Checking the loss of each step would make the program wait for each step. These
    counters are read only occasionally, and still identify the step. This is a metric
    because steps update metrics on every backend, but the logs do not show it.

    All replicas count the same: a loss that is not finite on one replica counts for
    all.

    Attributes:
        steps: Integer variable, the number of steps in the epoch.
        finite: Integer variable, the number of steps before the first non-finite loss.
        loss: Float variable, the mean loss of the epoch up to the step with the first
            non-finite loss, or up to the last step if all are finite.
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
            loss: Scalar, the mean loss of the epoch so far. It stays NaN or infinite
                after the first step with a NaN or infinite loss.
        """
        # On torch it is already the same unless `compute_loss` is overridden.
        loss = ops.mean(all_gather(ops.reshape(ops.cast(loss, "float32"), (1,))))
        # A callback that resets the model's metrics also resets the mean loss, so a
        # non-finite value is kept here.
        last = ops.convert_to_tensor(self.loss)
        loss = ops.where(ops.isfinite(last), loss, last)
        self.loss.assign(loss)
        self.finite.assign_add(ops.cast(ops.isfinite(loss), self.finite.dtype))
        self.steps.assign_add(1)

    def reset_state(self):
        """Does nothing, since a callback may reset the model's metrics."""

    def restart(self):
        """Starts counting a new epoch."""
        super().reset_state()

    def result(self):
        """Returns no entries for the logs."""
        return {}

    def read(self):
        """Waits for the device; returns `(steps, finite, loss)` as Python numbers."""
        variables = self.steps, self.finite, self.loss
        return tuple(ops.convert_to_numpy(v).item() for v in variables)


class GradientNorm:
    """The L2 norm of the gradients of a step, averaged over steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.metric = keras.metrics.Mean(name="gradient_norm")
        # TensorFlow runs the step of each replica in its own thread.
        self._step = threading.local()

    def record(self, gradients):
        """Records the gradients of the global batch before they are applied."""
        gradients = [x for x in gradients if x is not None]
        self._step.norm = global_norm(gradients, self.optimizer.scale_loss(1.0))

    def update_metric(self):
        """Adds the norm of a training step to the metric."""
        # Removed, since it may be a symbolic tensor of a traced function.
        norm = vars(self._step).pop("norm", None)
        if norm is None:
            # No weight is trained.
            return
        counts = ops.ones_like(norm)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            counts = ops.cast(ops.isfinite(norm), norm.dtype)
        self.metric.update_state(ops.where(counts > 0, norm, 0.0), counts)
