import threading
import time
from typing import Any

from keras_cluster_mask.training.checkpoints import RunCallback


class Throughput(RunCallback):
    """Logs training samples per second, and the fraction of time spent waiting.

    Adds `samples_per_second` to the logs at the end of an epoch: the rate of all steps
    except the first, which may include compilation. A sample is a pair; the pairs of
    all devices count. Validation is not counted. The rate is reported only for arrays
    and for datasets with a known batch size (`drop_remainder=True`).

    For an `image_text_dataset`, it also adds `data_wait`, the fraction of the time that
    the program waits for the next batch. On JAX, and on TensorFlow, where another
    thread reads batches, earlier steps may run meanwhile. If the fraction is large,
    more `num_workers` may help.

    Put this callback before callbacks that write the logs, such as
    `keras.callbacks.CSVLogger`. It does not make the program wait for steps.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    model.compile(optimizer="adam")
    batch = {
        "images": np.random.randint(0, 256, (12, 32, 32, 3)).astype("uint8"),
        "token_ids": np.random.randint(1, 100, (12, 16)).astype("int32"),
    }
    history = model.fit(batch, batch_size=4, callbacks=[kcm.callbacks.Throughput()])
    print(history.history["samples_per_second"])
    ```
    """

    # `async_safe` is public in Keras but undocumented. Where the backend allows, Keras
    # calls `on_train_batch_end` in a background thread once the step is done, and the
    # program does not wait. Calls may come out of order. Subclasses inherit this.
    async_safe = True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        # Not in `__init__`, since callbacks may be copied, and locks cannot be.
        self._lock = threading.Lock()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._begin = self._last = self._state(steps=0)
        self._first = None

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        state = self._state(steps=batch + 1)
        with self._lock:
            self._first = self._first or state
            # A later step may have been reported first.
            self._last = max(self._last, state)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        data = self.run.data
        if self._first is None or data.batch_size is None:
            return
        # For an epoch of one step, use the whole time of this step.
        start = self._begin if self._first == self._last else self._first
        steps_before, time_before, waited_before = start
        steps, now, waited = self._last
        seconds = max(now - time_before, 1e-9)
        logs["samples_per_second"] = (steps - steps_before) * data.batch_size / seconds
        if hasattr(data.stream, "waited"):
            # A wait that began before the first step ended counts as a whole.
            logs["data_wait"] = min((waited - waited_before) / seconds, 1.0)

    def _state(self, steps):
        """Returns a number of steps, the time, and the seconds waited for data."""
        waited = getattr(self.run.data.stream, "waited", 0.0)
        return steps, time.perf_counter(), waited
