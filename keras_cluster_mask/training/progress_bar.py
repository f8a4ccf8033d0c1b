"""Keras's progress bar, without waiting for each step."""

import threading

import keras


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Shows finished steps while the program prepares the next ones."""

    # See `Throughput`.
    async_safe = True

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._lock = threading.Lock()

    def on_train_batch_end(self, batch, logs=None):
        with self._lock:
            # A later step may have been reported first.
            if batch >= self.seen:
                super().on_train_batch_end(batch, logs)
