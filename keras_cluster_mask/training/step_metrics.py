"""Metrics of training steps: means, and the norm of gradients."""

import threading

import keras
from keras import ops

from keras_cluster_mask.distribution.gradients import global_norm

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
