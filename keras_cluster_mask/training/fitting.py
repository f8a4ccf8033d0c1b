"""Trains a `ContrastiveModel`: checks data, resumes, and calls Keras's own `fit`."""

import contextlib
import dataclasses
import inspect
import operator
import os
import types
import warnings

import keras

from keras_cluster_mask.checks import check_integer, check_range
from keras_cluster_mask.distribution.backends import copy_values
from keras_cluster_mask.distribution.gradients import check_batch_size
from keras_cluster_mask.distribution.processes import verbosity
from keras_cluster_mask.distribution.replicas import num_replicas
from keras_cluster_mask.training.checkpoints import read_resumable
from keras_cluster_mask.training.features import TowerFeatures
from keras_cluster_mask.training.input_rules import as_dictionary
from keras_cluster_mask.training.micro_batches import check_micro_batches
from keras_cluster_mask.training.optimizers import optimizer_parts
from keras_cluster_mask.training.tokens import remembered_tokenizer
from keras_cluster_mask.training.training_data import (
    TrainingData,
    evaluation_data,
    until_the_end,
)
from keras_cluster_mask.training.training_run import ProgressBar, TrainingRun


def fit(model, keras_fit, resume_from, *args, **kwargs):
    """Trains a model, from a checkpoint if there is one, in three parts.

    The data is checked and made readable from any epoch; the run finds out where it
    starts; then Keras's `fit` trains to the end.

    Args:
        model: A `ContrastiveModel`.
        keras_fit: Keras's `fit` of the model.
        resume_from: See `ContrastiveModel.fit`.
        *args: Arguments of Keras's `fit`, as those by name.
        **kwargs: Arguments of Keras's `fit` by name.

    Returns:
        A `keras.callbacks.History`.
    """
    bound = inspect.signature(keras_fit).bind(*args, **kwargs)
    # Unless asked for, Keras shuffles no batches, since it cannot shuffle most data.
    bound.arguments.setdefault("shuffle", None)
    bound.apply_defaults()
    options = bound.arguments
    batch_size = options.pop("batch_size")
    batch_size = check_integer("batch_size", 32 if batch_size is None else batch_size)
    callbacks = options.pop("callbacks")
    callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    callbacks = [each for each in callbacks if each is not None]
    options["verbose"] = verbosity(options["verbose"])

    # === The data ===
    x = as_dictionary(
        x=options.pop("x"),
        y=options.pop("y"),
        sample_weight=options.pop("sample_weight"),
        class_weight=options.pop("class_weight"),
    )
    split, held_out = options["validation_split"], options["validation_data"]
    options["validation_batch_size"] = options["validation_batch_size"] or batch_size
    if isinstance(x, dict) and split and held_out is None:
        # Keras splits arrays alone, and gets batches.
        x, options["validation_data"] = _split(model.input_rules.check_keys(x), split)
    data = _prepare_data(
        model,
        x,
        batch_size=batch_size,
        shuffle=options.pop("shuffle"),
        steps_per_epoch=options.pop("steps_per_epoch"),
        first_epoch=options.pop("initial_epoch"),
    )

    # === The run ===
    run = TrainingRun(model, data, callbacks)
    with remembered_tokenizer(model, x, run):
        options["validation_data"] = evaluation_data(
            model,
            options["validation_data"],
            steps=options["validation_steps"],
            passes_once=False,
        )
        _resume(run, model, resume_from, options["verbose"])

        # === Training ===
        if run.epoch < options["epochs"]:
            history = _train(model, keras_fit, run, options)
        else:
            history = keras.callbacks.History()
            if run.history:
                # As at the end of the fit that finished the run.
                model.optimizer.finalize_variable_values(model.trainable_weights)
    if any(getattr(x, "use_ema", False) for x in optimizer_parts(model.optimizer)):
        # Weights and averages are the same arrays now.
        copy_values(model.trainable_variables)
    history.epoch = [row["epoch"] for row in run.history]
    history.history = {}
    for row in run.history:
        for name, value in row["logs"].items():
            history.history.setdefault(name, []).append(value)
    return history


def _prepare_data(model, x, batch_size, shuffle, steps_per_epoch, first_epoch):
    """Checks training data, and returns it as `TrainingData`."""
    first_epoch = check_integer("initial_epoch", first_epoch, 0)
    steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch, or_none=True)
    rules = dataclasses.replace(model.input_rules, training=True)
    is_features = isinstance(x, TowerFeatures)
    if is_features:
        x.check_model(model, training=True)
    data = TrainingData(
        x,
        rules,
        batch_size=batch_size,
        shuffle=shuffle,
        steps_per_epoch=steps_per_epoch,
        first_epoch=first_epoch,
    )
    data.check_same_everywhere()
    check_batch_size(model, data.rows)
    if data.batch_size and model.micro_batch_size and not is_features:
        check_micro_batches(data.batch_size, model.micro_batch_size, num_replicas())
    _check_executions(model.steps_per_execution, data.steps_per_epoch)
    # Projections keep the scaling that they were trained with first.
    if model.compiled:
        model.head.set_scaling(x.statistics if is_features else None)
    return data


def _resume(run, model, resume_from, verbose):
    """Resumes a run from a checkpoint, if there is one."""
    if resume_from is None:
        return
    found = read_resumable(resume_from)
    if found is not None:
        run.resume(model, found)
    if verbose and found is None:
        print(f"No checkpoint in {os.fspath(resume_from)}: starting at the beginning.")
    elif verbose:
        print(f"Resuming from {found[0]}: epoch {run.epoch + 1}.")


def _train(model, keras_fit, run, options):
    """Calls Keras's `fit` from where a run is to the end, and returns its history."""
    x = run.data.from_step(run.data.steps_before(run.epoch))
    if model.compiled:
        steps = run.data.steps_per_epoch or getattr(x, "num_batches", None)
        steps = steps or operator.length_hint(x)
        epochs = options["epochs"] - run.epoch
        _warn_of_rate_zero(model.optimizer, epochs * steps)
    options["callbacks"] = [run, *run.callbacks]
    bars = [isinstance(each, keras.callbacks.ProgbarLogger) for each in run.callbacks]
    if options["verbose"] and not any(bars):
        options["callbacks"].append(ProgressBar())
    steps, no_end = run.data.steps_per_epoch, contextlib.nullcontext()
    try:
        with run.followed(), until_the_end() if steps is None else no_end:
            return keras_fit(
                x=x,
                initial_epoch=run.epoch,
                steps_per_epoch=steps,
                shuffle=run.data.shuffle,
                **options,
            )
    finally:
        if isinstance(x, types.GeneratorType):
            x.close()


def _check_executions(steps_per_execution, steps_per_epoch):
    """Raises if an epoch would end within an execution, which takes steps of the next.

    Args:
        steps_per_execution: Integer.
        steps_per_epoch: Integer, of data that continues over the ends of epochs, or
            `None`.
    """
    if steps_per_epoch is not None and steps_per_epoch % steps_per_execution:
        raise ValueError(
            "`steps_per_execution` must divide the steps of an epoch, or it would take "
            "steps of the next one: pass another to `compile`, or `steps_per_epoch` to "
            f"`fit`. Received: steps_per_execution={steps_per_execution}, epochs of "
            f"{steps_per_epoch} steps"
        )


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
                "The schedule of a learning rate reaches 0 before the end of this "
                "`fit`, and its weights no longer change: compile the model with a new "
                "optimizer, whose schedule has as many steps. Received: a rate of 0 in "
                f"step {int(step) + 1}, and a `fit` of {steps or 'unknown'} steps",
                stacklevel=5,
            )
            return


def _split(x, validation_split):
    """Splits arrays as Keras does: the last ones are held out."""
    check_range("validation_split", validation_split, 0, 1, "[)")
    first = int(len(x["token_ids"]) * (1.0 - validation_split))
    return {k: v[:first] for k, v in x.items()}, {k: v[first:] for k, v in x.items()}
