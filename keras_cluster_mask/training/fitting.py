"""What `ContrastiveModel.fit` does before, between and after Keras's own `fit`."""

import contextlib
import os
import pathlib
import types

import keras
import numpy as np

from keras_cluster_mask.distribution.gradients import check_batch_size
from keras_cluster_mask.distribution.processes import (
    all_gather_object,
    is_main_process,
    to_numpy,
)
from keras_cluster_mask.distribution.rng_state import read_rng_state, write_rng_state
from keras_cluster_mask.training.checkpoints import (
    SUFFIX,
    CheckpointFiles,
    describe,
    differences,
    read_checkpoint,
    write_state,
)
from keras_cluster_mask.training.inputs import (
    StepSize,
    check_data,
    rows_of,
    until_the_end,
)
from keras_cluster_mask.training.remaining_data import RemainingData


def fit(model, keras_fit, x, options, resume_from=None):
    """Trains a model, from a checkpoint on if there is one.

    Args:
        model: A `ContrastiveModel`.
        keras_fit: Keras's `fit` of the model.
        x: The training data.
        options: Dictionary of the other arguments of Keras's `fit`.
        resume_from: See `ContrastiveModel.fit`.

    Returns:
        A `keras.callbacks.History`.
    """
    options = dict(options)
    epochs, verbose = options.pop("epochs"), options["verbose"]
    if not is_main_process():
        options["verbose"] = 0
    batch_size = options["batch_size"] or 32
    if isinstance(x, dict) and options["validation_split"]:
        # Not by Keras, which would split the rest of an interrupted epoch again.
        x, held_out = _split(x, options.pop("validation_split"))
        if options["validation_data"] is None:
            options["validation_data"] = held_out
    validation = Validation(model, options, batch_size)
    steps = options.pop("steps_per_epoch")
    if steps is None and hasattr(x, "position"):
        steps = x.position.steps_per_epoch()
    check_data(x, model.vocabulary_size, batch_size)
    rows = rows_of(x) if hasattr(x, "element_spec") else batch_size
    check_batch_size(model, rows, len(x["images"]) if isinstance(x, dict) else None)

    data = RemainingData(x, batch_size, options.get("shuffle", True), steps)
    run = TrainingRun(data, options.pop("initial_epoch"), StepSize.of(x, batch_size))
    model.training_run = run
    if resume_from is not None:
        message = run.resume(model, resume_from)
        if verbose and is_main_process():
            print(message)
    callbacks = options.pop("callbacks")
    callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    callbacks = [each for each in callbacks if each is not None]
    if hasattr(validation.data, "as_dataset"):
        # Data of unknown length, which Keras would take as a generator: one pass.
        callbacks = [validation, *callbacks]
        options["validation_data"] = None

    history = None
    while run.epoch < epochs:
        if run.step and data.is_over(run.epoch, run.step):
            # Interrupted after the last step of an epoch, before its report.
            _end_epoch(model, run, validation, [run, *callbacks], epochs)
            continue
        # The rest of an interrupted epoch is a fit of its own, since Keras takes the
        # number of steps of the first epoch for all epochs.
        last = run.epoch + 1 if run.step else epochs
        rest = data.after(run.epoch, run.step)
        given = dict(
            options,
            x=check_data(rest, model.vocabulary_size, batch_size),
            initial_epoch=run.epoch,
            epochs=last,
            callbacks=[run, *callbacks],
        )
        if hasattr(x, "element_spec"):
            # Datasets have their own order; Keras warns of its default.
            given.setdefault("shuffle", False)
        if steps is not None:
            given["steps_per_epoch"] = steps - run.step
        run.start(given["x"], keep_weights=last < epochs)
        history = _run(keras_fit, given)
        if last == epochs or model.stop_training:
            break
        run.restore_weights(model)
    if history is None:
        history = keras.callbacks.History()
        if run.total_steps:
            # As at the end of the fit that finished the run.
            model.optimizer.finalize_variable_values(model.trainable_weights)
    history.epoch = [row["epoch"] for row in run.history]
    history.history = {}
    for row in run.history:
        for name, value in row["logs"].items():
            history.history.setdefault(name, []).append(value)
    return history


def _run(keras_fit, options):
    ends = "steps_per_epoch" not in options
    try:
        with until_the_end() if ends else contextlib.nullcontext():
            return keras_fit(**options)
    finally:
        if isinstance(options["x"], types.GeneratorType):
            options["x"].close()


class TrainingRun(keras.callbacks.Callback):
    """Where a `fit` is. The first callback of every `fit` of a `ContrastiveModel`.

    Args:
        data: `RemainingData`.
        epoch: Integer, the first epoch.
        step_size: `StepSize` or `None`.

    Attributes:
        data: `RemainingData`.
        step_size: `StepSize` or `None`.
        epoch: Integer, the running epoch; between epochs, the next.
        step: Integer, the steps done of it.
        total_steps: Integer, the steps done in all, before a resume included.
        history: List of a dictionary with `"epoch"` and `"logs"` for each epoch.
        rng_state: Dictionary of arrays, the random state after the last step.
    """

    def __init__(self, data, epoch, step_size):
        super().__init__()
        self.data = data
        self.step_size = step_size
        self.epoch, self.step, self.total_steps = epoch, 0, 0
        self.history = []
        self.rng_state = {}
        self._metrics = None
        self._weights = None

    def resume(self, model, path):
        """Continues from a checkpoint: a file, or the last one of a folder.

        Returns:
            A sentence that says from where.
        """
        if not model.built or not model.compiled:
            raise ValueError(
                "`resume_from` needs a compiled and built model: compile it with an "
                "optimizer, and call it on a batch. "
                f"Received: built={model.built}, compiled={model.compiled}"
            )
        found = _read(path)
        if found is None:
            return f"No checkpoint in {os.fspath(path)}: starting from the beginning."
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
        self.rng_state = {k: v for k, v in arrays.items() if "generators/" in k}
        self.epoch, self.step = facts["epoch"], facts["epoch_step"]
        self.total_steps, self.history = facts["step"], facts["history"]
        self.data.pairs = facts["pairs"]
        self._metrics = arrays if self.step else None
        return f"Resuming from {path}: epoch {self.epoch + 1}, step {self.step}."

    def start(self, x, keep_weights):
        """Called before each of Keras's fits."""
        self._before = self.step
        # A generator has its place already; Keras may iterate a dataset before.
        self._seeks = not isinstance(x, types.GeneratorType)
        self._keep_weights = keep_weights

    def restore_weights(self, model):
        """Undoes the end of a Keras fit, which replaces weights by their averages."""
        for variable, value in zip(model.trainable_variables, self._weights):
            variable.assign(value)

    def on_train_begin(self, logs=None):
        if self._seeks:
            self.data.seek(self.epoch, self.step)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.step = epoch, self._before
        if self._metrics is not None:
            write_state(self.model, self._metrics, groups=("metrics",))
            self._metrics = None
        self._seen, self._is_first_step = 0, True

    def on_train_batch_begin(self, batch, logs=None):
        # Data loaders draw from the generators that layers without a seed draw from.
        # How often they do between two epochs depends on where a run was interrupted,
        # so these draws are undone; but a shuffle by Keras would repeat its order.
        if self._is_first_step and self.data.is_reproducible:
            write_rng_state(self.rng_state)
        self._is_first_step = False

    def on_train_batch_end(self, batch, logs=None):
        self.total_steps += batch + 1 - self._seen
        self._seen = batch + 1
        self.step = self._before + self._seen
        self.rng_state = read_rng_state()

    def on_epoch_end(self, epoch, logs=None):
        # Later callbacks add to these logs.
        self.history.append({"epoch": epoch, "logs": {} if logs is None else logs})
        self.epoch, self.step, self._before = epoch + 1, 0, 0
        self.data.mark_trained(self.epoch, 0)
        if self._keep_weights:
            self._weights = [
                np.array(to_numpy(v)) for v in self.model.trainable_variables
            ]


class Validation(keras.callbacks.Callback):
    """Evaluates a model at the end of epochs, as Keras's `fit` does.

    Args:
        model: A `ContrastiveModel`.
        options: Dictionary of the arguments of `fit`.
        batch_size: Integer.
    """

    def __init__(self, model, options, batch_size):
        super().__init__()
        self.data = options["validation_data"]
        if self.data is not None:
            checked = check_data(self.data, model.vocabulary_size)
            if not isinstance(checked, types.GeneratorType):
                options["validation_data"] = checked
        self.every = options.get("validation_freq", 1)
        self.options = {"steps": options.get("validation_steps")}
        data = self.data[0] if isinstance(self.data, (tuple, list)) else self.data
        self.data = data
        if data is not None and not hasattr(data, "element_spec"):
            size = options.get("validation_batch_size")
            self.options["batch_size"] = size or batch_size

    def on_epoch_end(self, epoch, logs=None):
        due = (epoch + 1) % self.every == 0
        if isinstance(self.every, (tuple, list, set)):
            due = epoch + 1 in self.every
        if due and logs is not None and self.data is not None:
            found = self.model.evaluate(
                self.data, verbose=0, return_dict=True, **self.options
            )
            logs.update({f"val_{name}": value for name, value in found.items()})


def _end_epoch(model, run, validation, callbacks, epochs):
    """A fit without steps: the end of an epoch that was trained to its last step."""
    if validation not in callbacks:
        callbacks = [callbacks[0], validation, *callbacks[1:]]
    callbacks = keras.callbacks.CallbackList(
        callbacks, model=model, epochs=epochs, steps=0, verbose=0
    )
    run.start(run.data.data, keep_weights=False)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(run.epoch)
    logs = model.get_metrics_result()
    callbacks.on_epoch_end(run.epoch, dict(logs))
    callbacks.on_train_end(logs)


def _read(path):
    """The checkpoint to resume from, the same on all processes, or `None`."""
    path = pathlib.Path(path).expanduser()
    # The first process may still be writing what all are to read.
    all_gather_object(0)
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise FileNotFoundError(
                "`resume_from` must be a checkpoint that exists, or a folder. "
                f"Received: resume_from={path}"
            )
        found = path, *read_checkpoint(path)
    else:
        found = CheckpointFiles(path).read_last()
    steps = all_gather_object(-1 if found is None else found[2]["step"])
    if len({*steps}) > 1:
        raise ValueError(
            "`resume_from` must be a folder that all processes see. Received: "
            f"resume_from={path}, last steps {steps} by process"
        )
    return found


def _split(x, validation_split):
    """Splits arrays as Keras does: the last ones are held out."""
    pairs = len(x["token_ids"])
    first = int(pairs * (1.0 - validation_split))
    if not 0 < first < pairs:
        raise ValueError(
            "`validation_split` must leave pairs on both sides. Received: "
            f"validation_split={validation_split}, {pairs} pairs"
        )
    return ({k: v[:first] for k, v in x.items()}, {k: v[first:] for k, v in x.items()})
