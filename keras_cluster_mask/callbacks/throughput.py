import collections
import threading
import time
from typing import Any

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.models.encoders import tokens_per_image
from keras_cluster_mask.training.input_rules import KEYS
from keras_cluster_mask.training.training_run import RunCallback


class Throughput(RunCallback):
    """Logs the number of training samples and tokens per second.

    Adds `samples_per_second` and `tokens_per_second` to the logs. The progress bar
    shows the rates of the last steps. The end of an epoch reports the rates of all
    steps except the first, which may include compilation. A sample is a pair; the pairs
    of all devices count. Tokens are the inputs of the transformer blocks: the class
    token and the kept patches of each view, and the text tokens including padding.
    Validation is not counted. This works for arrays and for datasets whose batches have
    a known size (`drop_remainder=True`); for other data nothing is reported.

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
        # Once: on JAX, each access to `model` copies the weights back to the model.
        model, data = self.model, self.run.data
        self._batch_size = data.batch_size
        self._tokens = None
        if self._batch_size is None:
            return
        images, ids = (tuple(data.spec[key].shape[1:]) for key in KEYS)
        if None not in (*images, *ids):
            tokens = tokens_per_image(model.image_encoder, images)
            if tokens is not None:
                self._tokens = model.views * tokens + ids[0]

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Pairs of a time and the number of steps done by then.
        self._first = (time.perf_counter(), 0)
        self._last = collections.deque(maxlen=self.window + 1)

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        done = batch + 1
        with self._lock:
            if not self._last or done > self._last[-1][1]:
                now = (time.perf_counter(), done)
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

    def _rates(self, start, end):
        if self._batch_size is None:
            return {}
        if start == end:
            # An epoch of one step: use its whole time.
            start = self._before
        samples = (end[1] - start[1]) * self._batch_size
        rate = samples / max(end[0] - start[0], 1e-9)
        rates = {"samples_per_second": rate}
        if self._tokens is not None:
            rates["tokens_per_second"] = rate * self._tokens
        return rates
