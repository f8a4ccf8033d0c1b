import collections
import threading
import time
from typing import Any

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.training.training_run import RunCallback

# The share of time that steps wait for data, above which a remedy is printed.
TOO_LONG = 0.1


class Throughput(RunCallback):
    """Logs the number of training samples per second.

    Adds `samples_per_second` to the logs. The progress bar shows the rate of the last
    steps. The end of an epoch reports the rate of all steps except the first, which may
    include compilation. A sample is a pair; the pairs of all devices count. Validation
    is not counted. This works for arrays and for datasets whose batches have a known
    size (`drop_remainder=True`); for other data nothing is reported.

    For an `image_text_dataset`, it also adds `data_wait`, the share of time in which no
    step runs because the next batch has not been read. If that is more than a tenth of
    the first epoch, and more worker processes would help, it prints the `num_workers`
    to use, unless `verbose=0`.

    Put it before callbacks that write the logs, such as `keras.callbacks.CSVLogger`. It
    does not make the program wait for steps.

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

    Args:
        window: Integer. The number of steps that the progress bar averages over.
    """

    # `async_safe` is public in Keras but undocumented. Where the backend allows, Keras
    # calls `on_train_batch_end` in a background thread once the step is done, and the
    # program does not wait. Calls may come out of order. Subclasses inherit this.
    async_safe = True

    def __init__(self, window: int = 20):
        super().__init__()
        self.window = check_integer("window", window)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        super().on_train_begin(logs)
        # Not in `__init__`, since callbacks may be copied, and locks cannot be.
        self._lock = threading.Lock()
        data = self.run.data
        self._batch_size = data.batch_size
        # Each wait for data belongs to a step, in order.
        self._waits, self._waited = getattr(data.stream, "waits", None), 0.0
        self._is_first = True

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Tuples of a time, the number of steps done by then, and the seconds waited.
        self._first = (time.perf_counter(), 0, self._waited)
        self._last = collections.deque(maxlen=self.window + 1)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        done = batch + 1
        with self._lock:
            if not self._last or done > self._last[-1][1]:
                before, steps, _ = self._last[-1] if self._last else self._first
                for _ in range(min(done - steps, len(self._waits or ()))):
                    began, ended = self._waits.popleft()
                    self._waited += max(ended - max(began, before), 0.0)
                now = (time.perf_counter(), done, self._waited)
                if not self._last:
                    self._before, self._first = self._first, now
                self._last.append(now)
            # If a later step was reported first, these are its rates.
            if logs is not None:
                logs.update(self._rates(self._last[0], self._last[-1]))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._last or logs is None:
            return
        logs.update(self._rates(self._first, self._last[-1]))
        share = logs.get("data_wait", 0)
        is_first, self._is_first = self._is_first, False
        if is_first and share > TOO_LONG and self.params.get("verbose"):
            workers = self.run.data.stream.faster(share)
            if workers is not None:
                print(
                    f"\nSteps wait {share:.0%} of the time for data: pass "
                    f"`num_workers={workers}` to `image_text_dataset`."
                )

    def _rates(self, start, end):
        if self._batch_size is None:
            return {}
        if start == end:
            # An epoch of one step: use its whole time.
            start = self._before
        seconds = max(end[0] - start[0], 1e-9)
        rates = {"samples_per_second": (end[1] - start[1]) * self._batch_size / seconds}
        if self._waits is not None:
            rates["data_wait"] = (end[2] - start[2]) / seconds
        return rates
