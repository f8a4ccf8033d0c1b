"""Metrics of training steps."""

import keras

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
