"""Where a `fit` is, and how it resumes from a checkpoint."""

import threading
import types
import typing
import warnings

import keras
import numpy as np

from keras_cluster_mask.distribution.processes import to_numpy
from keras_cluster_mask.distribution.rng_state import read_rng_state, write_rng_state
from keras_cluster_mask.distribution.start_values import StartValues
from keras_cluster_mask.training.run_state import (
    describe,
    differences,
    write_learning_rates,
    write_state,
)

# The maximum number of steps on the device that have started but not finished. One that
# waits keeps the device busy; each holds its batch on the device, so there are few.
STEPS_AHEAD = 4


class TrainingRun(keras.callbacks.Callback):
    """Where a `fit` is. The first callback of every `fit` of a `ContrastiveModel`.

    Steps begin while others still run, but only a few.

    Args:
        data: `RemainingData`, which knows the first epoch.
        step_size: `StepSize` or `None`.

    Attributes:
        data: `RemainingData`.
        step_size: `StepSize` or `None`.
        epoch: Integer, the running epoch; between epochs, the next.
        step: Integer, the steps of it that were done before this Keras fit.
        history: List of a dictionary with `"epoch"` and `"logs"` for each epoch.
        unfinished: List of such a dictionary for the epoch within which a callback has
            stopped training, if it continues there; else empty.
    """

    # The end of a step is told in a thread, see `Throughput`.
    async_safe = True

    def __init__(self, data, step_size):
        super().__init__()
        self.data = data
        self.step_size = step_size
        self.epoch, self.step = data.origin[0], 0
        self.history, self.unfinished = [], []
        self._seeks = False
        self._start_values = None

    def start(self, x):
        """Called before each of Keras's fits, with the data that it is given."""
        # A generator starts at its place; Keras may have read from a dataset before.
        self._seeks = not isinstance(x, types.GeneratorType)

    def note_rng_state(self):
        """Called at the end of a step; on JAX and TensorFlow when it is compiled."""

    def undo_first_step(self):
        """Called if training fails: the model keeps its weights."""
        if self._start_values is not None:
            self._start_values.put_back()

    def on_train_begin(self, logs=None):
        if self._seeks:
            self.data.seek(self.epoch, self.step)
        self._start_values = StartValues(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        # A step may begin that has no batch, and so no end.
        self._slots = threading.Semaphore(STEPS_AHEAD)

    def on_train_batch_begin(self, batch, logs=None):
        # Continues after a while, as a step that fails has no end either; Keras raises
        # its error after the next.
        self._slots.acquire(timeout=10)

    def on_train_batch_end(self, batch, logs=None):
        self._start_values = None
        self._slots.release()

    def on_epoch_end(self, epoch, logs=None):
        # Later callbacks add to these logs.
        self.history.append({"epoch": epoch, "logs": {} if logs is None else logs})
        self.epoch, self.step = epoch + 1, 0
        self.data.seek(self.epoch, 0)


class NonFiniteLoss(typing.NamedTuple):
    """Where a loss was not finite.

    Attributes:
        loss: Float, the mean loss of the epoch up to this step.
        total_steps: Integer, the step, counted from 1 over all epochs.
        epoch: Integer, counted from 0.
        step: Integer, the step, counted from 1 in its epoch.
    """

    loss: float
    total_steps: int
    epoch: int
    step: int


class ResumableRun(TrainingRun):
    """A `TrainingRun` that is saved, or resumed, within epochs.

    Steps are counted as they begin. Where it matters, `count_steps` asks the device how
    many there were, as an execution of several steps may end with the data.

    Args:
        compiled: Dictionary, `describe_compile` of the model before `fit` changes it.
        skips_validation: Function from an epoch to whether there is validation data
            that is not evaluated at its end.

    Attributes:
        compiled: The dictionary.
        skips_validation: The function.
        step: Integer, the steps of the running epoch that came before.
        total_steps: Integer, the steps that came before in all, before a resume
            included.
        rng_state: Dictionary of arrays, the random state after the last step.
        non_finite: `NonFiniteLoss` or `None`, as of the last `count_steps`.
    """

    def __init__(self, data, step_size, compiled, skips_validation):
        super().__init__(data, step_size)
        self.compiled = compiled
        self.skips_validation = skips_validation
        self.total_steps = 0
        self.rng_state = {}
        self.non_finite = None
        self._metrics = self._weights = None

    def resume(self, model, found):
        """Continues from a checkpoint, as `read_resumable` returns it."""
        if not model.built or not model.compiled:
            raise ValueError(
                "`resume_from` needs a compiled and built model: compile it with an "
                "optimizer, and call it on a batch. "
                f"Received: built={model.built}, compiled={model.compiled}"
            )
        path, arrays, facts = found
        wanted = {**describe(model), **self.data.describe()}
        differing = differences(facts["description"], wanted)
        if differing:
            raise ValueError(
                "`resume_from` must be a checkpoint of the same model and data. Use "
                "another folder, or make model and data as they were. Received: "
                f"resume_from={path}, with " + "; ".join(differing)
            )
        write_state(model, arrays)
        changed = write_learning_rates(model, arrays, facts["compiled"], self.compiled)
        if changed:
            warnings.warn(
                "The options of `compile` differ from those of the checkpoint "
                f"{path}. The model's are used, with the optimizer's state of the "
                "checkpoint. Received: " + "; ".join(changed),
                stacklevel=2,
            )
        self.rng_state = {k: v for k, v in arrays.items() if "generators/" in k}
        self.epoch, self.step = facts["epoch"], facts["epoch_step"]
        self.total_steps, self.history = facts["step"], facts["history"]
        self.data.origin = tuple(facts["data_origin"])
        # Those of an epoch that was reported are of its validation.
        self._metrics = arrays if self.step and not facts["unfinished"] else None

    def start(self, x):
        super().start(x)
        self._before = self.step
        self._weights = None

    def restore_weights(self):
        """Undoes the end of a Keras fit, which replaces weights by their averages."""
        for variable, value in zip(self.model.trainable_variables, self._weights):
            variable.assign(value)

    def note_rng_state(self):
        self.rng_state = read_rng_state()

    def count_steps(self):
        """Waits for the steps so far, and counts them as the device did.

        Raises:
            RuntimeError: If steps do not count themselves.
        """
        steps, finite, loss = self.model.finite_steps.read()
        # Keras begins a step before it knows that the data has another batch.
        if not steps and self._num_begun > 1:
            raise RuntimeError(
                "A `train_step` or `compute_metrics` that is overridden must call that "
                "of `ContrastiveModel`, which counts the steps that a checkpoint is "
                f"named by. Received: a {type(self.model).__name__} that counted none"
            )
        self.total_steps = self._before_fit + steps
        self.step = self.total_steps - self._before_epoch
        if finite < steps:
            total = self._before_fit + finite + 1
            step = total - self._before_epoch
            self.non_finite = NonFiniteLoss(loss, total, self.epoch, step)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._before_fit = self.total_steps
        self._num_begun = 0
        self.non_finite = None
        self.model.finite_steps.restart()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch, self.step = epoch, self._before
        self._before_epoch = self.total_steps - self.step
        if self._metrics is not None:
            write_state(self.model, self._metrics, groups=("metrics",))
            self._metrics = None

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch, logs)
        # Data loaders draw from the generators that layers without a seed draw from.
        # How often they do between two epochs depends on where a run was interrupted,
        # so these draws are undone; but a shuffle would repeat its order.
        if batch == 0 and self.data.has_known_order:
            write_rng_state(self.rng_state)
        self._num_begun += 1
        self.step = self._before + batch
        self.total_steps = self._before_epoch + self.step

    def on_epoch_end(self, epoch, logs=None):
        self.count_steps()
        if self.model.stop_training and self.data.has_more(epoch, self.step):
            # A callback has stopped it within the epoch, where it continues.
            self.unfinished = [{"epoch": epoch, "logs": {} if logs is None else logs}]
            self.data.seek(epoch, self.step)
            return
        super().on_epoch_end(epoch, logs)
        if self._before:
            # The rest of an interrupted epoch, which was a Keras fit of its own.
            self._weights = [
                np.array(to_numpy(v)) for v in self.model.trainable_variables
            ]
        self._before = 0
