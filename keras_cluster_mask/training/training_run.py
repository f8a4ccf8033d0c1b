"""Where a `fit` is, and how it resumes from a checkpoint."""

import threading
from typing import Any

import keras

from keras_cluster_mask.distribution.rng_state import read_rng_state, write_rng_state
from keras_cluster_mask.distribution.start_values import StartValues
from keras_cluster_mask.training.run_state import (
    describe,
    differences,
    learning_rates,
    restore_learning_rates,
    write_state,
)

# The maximum number of steps on the device that have started but not finished. One that
# waits keeps the device busy; each holds its batch on the device, so there are few.
STEPS_AHEAD = 4


class TrainingRun(keras.callbacks.Callback):
    """Where a `fit` is. The first callback of every `fit` of a `ContrastiveModel`.

    Steps begin while others still run, but only a few.

    Args:
        model: A `ContrastiveModel`.
        data: `TrainingData`, which knows the first epoch.
        step_size: `StepSize` or `None`.

    Attributes:
        data: `TrainingData`.
        step_size: `StepSize` or `None`.
        epoch: Integer, the running epoch; between epochs, the next.
        history: List of a dictionary with `"epoch"` and `"logs"` for each epoch.
        is_partial: Boolean. Whether a callback has stopped the last epoch before its
            end.
        rng_state: Dictionary of arrays, the random state at the end of the last epoch.
        first_rates: List of floats, the learning rates with which the run started.
    """

    # The end of a step is told in a thread, see `Throughput`.
    async_safe = True

    def __init__(self, model, data, step_size):
        super().__init__()
        self.data = data
        self.step_size = step_size
        self.epoch = data.first_epoch
        self.history = []
        self.is_partial = False
        self.rng_state = {}
        self.first_rates = learning_rates(model)
        self._start_values = None

    def facts(self, model) -> dict[str, Any]:
        """What a checkpoint holds besides arrays, as a dictionary of JSON values."""
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
        """Continues from a checkpoint, as `read_resumable` returns it."""
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
                f"resume_from={path}, with " + "; ".join(differing)
            )
        write_state(model, arrays)
        self.first_rates = restore_learning_rates(model, arrays, facts["first_rates"])
        self.rng_state = {k: v for k, v in arrays.items() if "generators/" in k}
        self.epoch, self.history = facts["epoch"], facts["history"]
        self.data.origin = tuple(facts["data_origin"])

    def undo_first_step(self):
        """Called if training fails: the model keeps its weights."""
        if self._start_values is not None:
            self._start_values.put_back()

    def on_train_begin(self, logs=None):
        self._start_values = StartValues(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        self.model.finite_steps.restart()
        # A step that has no batch begins, but does not end.
        self._slots = threading.Semaphore(STEPS_AHEAD)

    def on_train_batch_begin(self, batch, logs=None):
        # Data loaders draw from the generators that layers without a seed draw from.
        # How often they do between two epochs depends on where a run was interrupted,
        # so these draws are undone; but a shuffle would repeat its order.
        if batch == 0 and self.data.has_known_order:
            write_rng_state(self.rng_state)
        self._last = batch
        # Continues after a while, as a step that fails does not end either; Keras
        # raises its error after the next.
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
        self.data.seek(self.epoch)
        self.rng_state = read_rng_state()
