"""Keras's progress bar, for which no step has to be waited for."""

import threading

import keras


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Shows the steps that are done, while the program prepares those that follow."""

    # See `Throughput`.
    async_safe = True

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._lock = threading.Lock()

    def on_train_batch_end(self, batch, logs=None):
        with self._lock:
            # A later step may have overtaken this one.
            if batch >= self.seen:
                super().on_train_batch_end(batch, logs)
