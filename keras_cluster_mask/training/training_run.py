"""Callbacks of every `fit`: tracks and resumes a run, and shows its progress."""

import contextlib
import threading
from typing import Any

import keras

from keras_cluster_mask.distribution.backends import (
    StartValues,
    read_rng_state,
    write_rng_state,
)
from keras_cluster_mask.training.run_state import (
    describe,
    differences,
    learning_rates,
    restore_learning_rates,
    write_state,
)
from keras_cluster_mask.training.step_metrics import DIRECTIONS

# The maximum number of steps that have started on the device but not finished. Queued
# steps keep the device busy, but each holds its batch in device memory.
STEPS_AHEAD = 4


class RunCallback(keras.callbacks.Callback):
    """A callback for the `fit` of a `ContrastiveModel`.

    Attributes:
        run: `TrainingRun`, which `fit` sets until it ends: a run holds the data.
    """

    run = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self.run is None:
            raise ValueError(
                f"`{type(self).__name__}` must be in the `callbacks` of the `fit` of a "
                f"`ContrastiveModel`. Received: `fit` of a {type(self.model).__name__}"
            )


class TrainingRun(keras.callbacks.Callback):
    """Tracks the progress of `fit`, as the first callback of a `ContrastiveModel`.

    It also lets steps start while earlier ones run, but limits their number.

    Args:
        model: A `ContrastiveModel`.
        data: `TrainingData`, which knows the first epoch.
        callbacks: List of the other callbacks.

    Attributes:
        data: `TrainingData`.
        callbacks: List of the other callbacks.
        epoch: Integer, the current epoch; between epochs, the next one.
        history: List with a dictionary of `"epoch"` and `"logs"` for each epoch.
        is_partial: Boolean. Whether a callback stopped the last epoch early.
        rng_state: Dictionary of arrays, the random state at the end of the last epoch.
        first_rates: Dictionary of floats, the learning rates at the start of the run.
    """

    # Keras reports the end of a step in a background thread, see `Throughput`.
    async_safe = True

    def __init__(self, model, data, callbacks=()):
        super().__init__()
        self.data = data
        self.callbacks = callbacks
        self.epoch = data.first_epoch
        self.history = []
        self.is_partial = False
        self.rng_state = {}
        self.first_rates = learning_rates(model)
        self._start_values = None

    def facts(self, model) -> dict[str, Any]:
        """Returns the part of a checkpoint without arrays, as JSON values."""
        return {
            "epoch": self.epoch,
            "data_origin": self.data.origin,
            "history": [
                {**row, "logs": {k: float(v) for k, v in row["logs"].items()}}
                for row in self.history
            ],
            "first_rates": self.first_rates,
            "description": {**describe(model), **self.data.description},
        }

    def resume(self, model, found):
        """Resumes from a checkpoint that `read_resumable` returned."""
        if not model.built or not model.compiled:
            raise ValueError(
                "`resume_from` needs a compiled and built model: compile it with an "
                "optimizer, and call it on a batch. "
                f"Received: built={model.built}, compiled={model.compiled}"
            )
        path, arrays, facts = found
        wanted = {**describe(model), **self.data.description}
        differing = differences(facts["description"], wanted)
        if differing:
            raise ValueError(
                "`resume_from` must be a checkpoint of the same model and data. Use "
                "another folder, or make model and data as they were. Received: "
                f"resume_from={path}, {len(differing)} differences, with "
                + "; ".join(differing[:10])
            )
        write_state(model, arrays)
        self.first_rates = restore_learning_rates(model, arrays, facts["first_rates"])
        self.rng_state = {k: v for k, v in arrays.items() if "generators/" in k}
        self.epoch, self.history = facts["epoch"], facts["history"]
        self.data.origin = tuple(facts["data_origin"])

    @contextlib.contextmanager
    def followed(self):
        """A context in which callbacks know the run.

        If training fails in its first step, the weights are restored.
        """
        followers = [x for x in self.callbacks if isinstance(x, RunCallback)]
        for each in followers:
            each.run = self
        try:
            yield
        except BaseException:
            if self._start_values is not None:
                self._start_values.put_back()
            raise
        finally:
            for each in followers:
                each.run = None

    def on_train_begin(self, logs=None):
        self._start_values = StartValues(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        # Keras begins a step before it knows whether there is another batch, so the
        # last one of an epoch does not end. Each epoch gets new slots.
        self._slots = threading.Semaphore(STEPS_AHEAD)

    def on_train_batch_begin(self, batch, logs=None):
        # Layers without a seed draw from the global generator of torch, and so do
        # iterators over data when they start. A resumed run starts other iterators, so
        # the state at the end of the last epoch is restored before the first step. Data
        # whose batches are not known may be a `DataLoader`, which shuffles by this
        # generator: with the restored state, it would repeat its order.
        if batch == 0 and self.data.spec is not None:
            write_rng_state(self.rng_state)
        if batch == 0:
            self.model._check_options()
        self._last = batch
        # With a timeout, since a step that fails does not end either; Keras raises its
        # error after the next step.
        self._slots.acquire(timeout=10)

    def on_train_batch_end(self, batch, logs=None):
        self._start_values = None
        self._slots.release()

    def on_epoch_end(self, epoch, logs=None):
        begun = self._last + self.model.steps_per_execution
        steps = self.params["steps"]
        self.is_partial = self.model.stop_training and (steps is None or begun < steps)
        # Later callbacks add to these logs.
        self.history.append({"epoch": epoch, "logs": {} if logs is None else logs})
        self.epoch = epoch + 1
        skipped = getattr(self.data.stream, "skipped", None)
        if skipped and (count := skipped.take_new()) and self.params["verbose"]:
            print(f"\nEpoch {self.epoch}: {count} broken samples, {skipped}")
        self.data.seek(self.data.steps_before(self.epoch))
        self.rng_state = read_rng_state()


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Shows finished steps while the program prepares the next ones.

    To fit on a line, it shows the mean of both accuracies, as `acc`. It leaves out the
    temperature, and a `mask_ratio` that does not change.
    """

    # See `Throughput`.
    async_safe = True

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._lock = threading.Lock()
        # Once, as in `Throughput`.
        hides_tokens = any(masking.hides_tokens for masking in self.model.maskings)
        self._left_out = "temperature", *([] if hides_tokens else ["mask_ratio"])

    def on_train_batch_end(self, batch, logs=None):
        with self._lock:
            # A later step may have been reported first.
            if batch >= self.seen:
                super().on_train_batch_end(batch, self._shown(logs))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self._shown(logs))

    def _shown(self, logs):
        logs = logs or {}
        shown = {k: v for k, v in logs.items() if not k.endswith(self._left_out)}
        for prefix in ("", "val_"):
            both = [shown.pop(f"{prefix}{x}_accuracy", None) for x in DIRECTIONS]
            if None not in both:
                shown[f"{prefix}acc"] = sum(both) / 2
        return shown
