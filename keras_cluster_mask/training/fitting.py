"""Trains a `ContrastiveModel`: checks data, resumes, and calls Keras's own `fit`."""

import contextlib
import operator
import threading
import types
import typing
import warnings
from collections.abc import Container
from typing import Any

import keras

from keras_cluster_mask.checks import check_integer, check_range
from keras_cluster_mask.distribution.backends import (
    copy_values,
    print_backend,
    put_back,
    read_rng_state,
    start_values,
    write_rng_state,
)
from keras_cluster_mask.distribution.gradients import check_batch_size
from keras_cluster_mask.distribution.replicas import num_replicas, verbosity
from keras_cluster_mask.training.checkpoints import RunCallback, resume
from keras_cluster_mask.training.features import TowerFeatures
from keras_cluster_mask.training.input_rules import as_dictionary
from keras_cluster_mask.training.micro_batches import check_micro_batches
from keras_cluster_mask.training.model_tokenizer import adopt_tokenizer
from keras_cluster_mask.training.optimizers import (
    learning_rates,
    optimizer_parts,
    start_averages,
)
from keras_cluster_mask.training.training_data import (
    TrainingData,
    evaluation_data,
    rules_of,
    until_the_end,
)

# The maximum number of steps that have started on the device but not finished. Queued
# steps keep the device busy, but each holds its batch in device memory.
STEPS_AHEAD = 4


def fit(
    model,
    keras_fit,
    resume_from,
    *,
    x,
    y,
    sample_weight,
    class_weight,
    batch_size,
    epochs,
    verbose,
    callbacks,
    shuffle,
    initial_epoch,
    steps_per_epoch,
    validation_split,
    validation_data,
    validation_steps,
    validation_batch_size,
    validation_freq,
):
    """Trains a model, from a checkpoint if there is one.

    `TrainingData` checks the data and reads it from any epoch on. `TrainingRun` finds
    out where to start, and follows Keras's `fit` as its first callback. The other
    arguments are all those of Keras's `fit`.

    Args:
        model: A `ContrastiveModel`.
        keras_fit: Keras's `fit` of the model.
        resume_from: See `ContrastiveModel.fit`.

    Returns:
        A `keras.callbacks.History`.
    """
    batch_size = check_integer("batch_size", 32 if batch_size is None else batch_size)
    x = as_dictionary(x, y, sample_weight, class_weight)
    if isinstance(x, dict) and validation_split and validation_data is None:
        x, validation_data = _split(model.input_rules.check_keys(x), validation_split)
    is_features = isinstance(x, TowerFeatures)
    if is_features:
        x.check_model(model, training=True)
    data = TrainingData(
        x, rules_of(model), batch_size, shuffle, steps_per_epoch, initial_epoch
    )
    check_batch_size(model, data.rows)
    if data.batch_size and model.micro_batch_size and not is_features:
        check_micro_batches(data.batch_size, model.micro_batch_size, num_replicas())
    validation = Validation(
        data=validation_data,
        batch_size=validation_batch_size or batch_size,
        steps=validation_steps,
        frequency=validation_freq,
    )
    if verbose := verbosity(verbose):
        print_backend()
    run = TrainingRun(model, data, callbacks, validation)
    tokenizer, scaled = model.tokenizer, []
    try:
        adopt_tokenizer(model, x)
        validation.check(model, range(run.epoch, epochs))
        if resume_from is not None:
            resume(run, model, resume_from, verbose)
        # Projections keep the scaling that they were trained with first.
        if model.compiled:
            scaled = model.set_scaling(x if is_features else None)
        # Keras splits only arrays, and refuses to split other data.
        split = validation_split if validation_data is None else 0.0
        history = _train(model, keras_fit, run, epochs, verbose, split)
    except Exception:
        if not run.history:
            # Nothing was trained, so another tokenizer and scaling may still be used.
            model.tokenizer = tokenizer
            for layer in scaled:
                layer.is_set.assign(0.0)
        raise
    if any(getattr(x, "use_ema", False) for x in optimizer_parts(model.optimizer)):
        # Weights and averages are the same arrays now.
        copy_values(model.trainable_variables)
    history.rows = run.history
    history.epoch = [row["epoch"] for row in run.history]
    history.history = {}
    for row in run.history:
        for name, value in row["logs"].items():
            history.history.setdefault(name, []).append(value)
    return history


class Validation(typing.NamedTuple):
    """The evaluations in `fit`, each of which reads the data again.

    Keras would start one iterator over the data, and has none for a stream that ends.
    The arguments match Keras's `fit`.
    """

    data: Any
    batch_size: int
    steps: int | None
    frequency: int | Container[int]

    def check(self, model, epochs):
        """Raises an error for data that cannot be evaluated, before training begins.

        Args:
            model: A `ContrastiveModel`.
            epochs: Iterable of integers, the epochs to train.
        """
        check_integer("validation_steps", self.steps, or_none=True)
        if isinstance(self.frequency, str) or not isinstance(self.frequency, Container):
            check_integer("validation_freq", self.frequency)
        if not isinstance(self.data, types.GeneratorType):
            if self.data is not None:
                evaluation_data(model, self.data, steps=self.steps)
        elif sum(map(self._is_due, epochs)) > 1:
            raise ValueError(
                "`validation_data` must be data that can be read after each epoch, and "
                "not a generator: pass arrays, an `image_text_dataset`, a "
                "`tf.data.Dataset` or a `PyDataset`. Received: a generator"
            )

    def evaluate(self, model, epoch, callbacks):
        """Returns the metrics after an epoch, or an empty dictionary without any."""
        if self.data is None or not self._is_due(epoch):
            return {}
        logs = model.evaluate(
            x=self.data,
            batch_size=self.batch_size,
            steps=self.steps,
            verbose=0,
            callbacks=keras.callbacks.CallbackList(callbacks),
            return_dict=True,
        )
        return {f"val_{name}": value for name, value in logs.items()}

    def _is_due(self, epoch):
        """Returns whether there is an evaluation after an epoch."""
        every = self.frequency
        return not (epoch + 1) % every if isinstance(every, int) else epoch + 1 in every


def _split(x, validation_split):
    """Splits arrays as Keras does: the last ones are held out."""
    check_range("validation_split", validation_split, 0, 1, "[)")
    first = int(len(x["token_ids"]) * (1.0 - validation_split))
    return {k: v[:first] for k, v in x.items()}, {k: v[first:] for k, v in x.items()}


def _train(model, keras_fit, run, epochs, verbose, validation_split):
    """Calls Keras's `fit` from where a run is to the end, and returns its history.

    If training fails in its first step, the weights are restored.
    """
    if run.epoch >= epochs:
        if run.history:
            # As at the end of the fit that finished the run.
            model.optimizer.finalize_variable_values(model.trainable_weights)
        return keras.callbacks.History()
    x, steps = run.data.start_at(run.epoch), run.data.steps_per_epoch
    if model.compiled:
        is_sequence = isinstance(x, keras.utils.PyDataset)
        known = steps or (x.num_batches if is_sequence else operator.length_hint(x))
        _warn_of_rate_zero(model.optimizer, (epochs - run.epoch) * (known or 0))
    callbacks = [run, *run.callbacks]
    followers = [each for each in callbacks if isinstance(each, RunCallback)]
    for each in followers:
        each.run = run
    try:
        with until_the_end() if steps is None else contextlib.nullcontext():
            return keras_fit(
                x,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                shuffle=run.data.shuffle,
                initial_epoch=run.epoch,
                steps_per_epoch=steps,
            )
    except BaseException:
        put_back(run.start_values)
        raise
    finally:
        for each in followers:
            each.run = None
        if isinstance(x, types.GeneratorType):
            x.close()


def _warn_of_rate_zero(optimizer, steps):
    """Warns if a schedule ends before a `fit` of so many steps, or ended before it."""
    # Near the end of a schedule, a rate above 0 rounds to 0.
    ahead = int(0.99 * steps)
    for part in optimizer_parts(optimizer):
        made = part.variables[0]  # The number of steps.
        step = made.value + ahead
        with keras.StatelessScope([(made, step)]):
            rate = part.learning_rate
        # The first step of a warm-up has a rate of 0, too.
        if not isinstance(rate, keras.Variable) and step > 0 and not rate:
            warnings.warn(
                "A learning rate schedule reaches 0 before the end of this `fit`, and "
                "its weights no longer change after that: compile the model with a new "
                "optimizer and a schedule for all steps of the `fit`. Received: a rate "
                f"of 0 in step {int(step) + 1}, and a `fit` of {steps or 'unknown'} "
                "steps",
                stacklevel=5,
            )
            return


class TrainingRun(keras.callbacks.Callback):
    """Tracks the progress of `fit`, as the first callback of a `ContrastiveModel`.

    It also lets steps start while earlier ones run, but limits their number.

    Args:
        model: A `ContrastiveModel`.
        data: `TrainingData`, which knows the first epoch.
        callbacks: The other callbacks, as `fit` takes them.
        validation: `Validation`.

    Attributes:
        data: `TrainingData`.
        callbacks: List of the other callbacks.
        epoch: Integer, the current epoch; between epochs, the next one.
        history: List with a dictionary of `"epoch"` and `"logs"` for each epoch.
        is_partial: Boolean. Whether a callback stopped the last epoch early.
        rng_state: Dictionary of arrays, the random state at the end of the last epoch.
        first_rates: List, the `learning_rates` at the start of the run.
        start_values: List, the `start_values` of the model until a step ends.
    """

    # `async_safe` is public in Keras but undocumented. Where the backend allows, Keras
    # calls `on_train_batch_end` in a background thread once the step is done, and the
    # program does not wait. Calls may come out of order.
    async_safe = True

    def __init__(self, model, data, callbacks, validation):
        super().__init__()
        steps, executions = data.steps_per_epoch, model.steps_per_execution
        if steps is not None and steps % executions:
            raise ValueError(
                "`steps_per_execution` must divide the number of steps per epoch: pass "
                "another value to `compile`, or `steps_per_epoch` to `fit`. Received: "
                f"steps_per_execution={executions}, epochs of {steps} steps"
            )
        callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
        self.callbacks = [each for each in callbacks if each is not None]
        self.data, self.validation = data, validation
        self.epoch, *_ = data.origin
        self.history = []
        self.is_partial = False
        self.rng_state = {}
        self.first_rates = []
        self.start_values = []

    def on_train_begin(self, logs=None):
        # Those of a checkpoint are from the start of the run that saved it.
        self.first_rates = self.first_rates or learning_rates(self.model)
        start_averages(self.model.optimizer)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            # Keras begins a step before it knows whether there is another batch, so the
            # last one of an epoch does not end. Each epoch gets new slots.
            self._slots = threading.Semaphore(STEPS_AHEAD)
            self.start_values = start_values(self.model)
            # Layers without a seed draw from the global generator of torch, and so do
            # iterators over data when they start. A resumed run starts other iterators,
            # so the state at the end of the last epoch is restored before the first
            # step. Data with unknown batches may be a `DataLoader`, which shuffles by
            # this generator: with the restored state, it would repeat its order.
            if self.data.spec is not None:
                write_rng_state(self.rng_state)
        self._last = batch
        # With a timeout, since a step that fails does not end either; Keras raises its
        # error after the next step.
        self._slots.acquire(timeout=10)

    def on_train_batch_end(self, batch, logs=None):
        self.start_values = []
        self._slots.release()

    def on_epoch_end(self, epoch, logs=None):
        begun = self._last + self.model.steps_per_execution
        steps = self.params["steps"]
        self.is_partial = self.model.stop_training and (steps is None or begun < steps)
        logs.update(self.validation.evaluate(self.model, epoch, self.callbacks))
        # Later callbacks add to these logs.
        self.history.append({"epoch": epoch, "logs": logs})
        self.epoch = epoch + 1
        skipped = self.data.stream.skipped
        if skipped and (count := skipped.take_new()) and self.params["verbose"]:
            print(f"\nEpoch {self.epoch}: {count} broken samples, {skipped}")
        # The next pass may be one of another `fit`.
        self.data.start_at(self.epoch)
        self.rng_state = read_rng_state()
