"""What `ContrastiveModel.fit` does before, between and after Keras's own `fit`."""

import contextlib
import os
import types
import warnings

import keras
from keras import ops

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.distribution.gradients import check_batch_size
from keras_cluster_mask.distribution.processes import is_main_process
from keras_cluster_mask.training import inputs
from keras_cluster_mask.training.arrays import ArrayBatches
from keras_cluster_mask.training.checkpoints import (
    finish_writing_everywhere,
    read_resumable,
    writing_error,
)
from keras_cluster_mask.training.micro_batches import check_micro_batches
from keras_cluster_mask.training.optimizers import optimizer_parts
from keras_cluster_mask.training.progress_bar import ProgressBar
from keras_cluster_mask.training.remaining_data import (
    RemainingData,
    check_same_everywhere,
)
from keras_cluster_mask.training.run_state import describe_compile
from keras_cluster_mask.training.tokens import check_tokenizer_of
from keras_cluster_mask.training.training_run import ResumableRun, TrainingRun


def fit(
    model,
    keras_fit,
    resume_from,
    x,
    y=None,
    batch_size=None,
    epochs=1,
    verbose="auto",
    callbacks=None,
    validation_split=0.0,
    validation_data=None,
    shuffle=None,
    class_weight=None,
    sample_weight=None,
    initial_epoch=0,
    steps_per_epoch=None,
    validation_steps=None,
    validation_batch_size=None,
    validation_freq=1,
):
    """Trains a model, from a checkpoint on if there is one.

    Args:
        model: A `ContrastiveModel`.
        keras_fit: Keras's `fit` of the model.
        resume_from: See `ContrastiveModel.fit`.
        others: Those of Keras's `fit`.

    Returns:
        A `keras.callbacks.History`.
    """
    x = inputs.as_dictionary(x, y, sample_weight, class_weight)
    if isinstance(x, dict) and validation_split:
        # Not by Keras, which would split the rest of an interrupted epoch again.
        x, validation_data = _split(x, validation_split, validation_data)
        validation_split = 0.0
    validation_data = inputs.as_dictionary(validation_data)
    # An error says how many pairs a batch needs.
    batch_size = check_integer(
        "batch_size", 32 if batch_size is None else batch_size, 0
    )
    initial_epoch = check_integer("initial_epoch", initial_epoch, 0)
    steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch, or_none=True)
    callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    callbacks = [each for each in callbacks if each is not None]
    saves = [each for each in callbacks if getattr(each, "saves_training_state", False)]
    options = {
        "verbose": verbose if is_main_process() else 0,
        "validation_split": validation_split,
        "validation_steps": validation_steps,
        "validation_batch_size": validation_batch_size or batch_size,
        "validation_freq": validation_freq,
    }
    validation = Validation(validation_data, callbacks, options)
    inputs.check_ends(validation_data, validation_steps)
    check_tokenizer_of(model, validation_data)
    options["callbacks"] = callbacks
    if hasattr(validation_data, "as_dataset"):
        # Data of unknown length, which Keras would take as a generator: one pass.
        options["callbacks"] = [validation, *callbacks]
    else:
        options["validation_data"] = inputs.check_data(
            validation_data, model.input_rules
        )

    inputs.check_keys(x)
    pairs = None
    if isinstance(x, dict):
        model.input_rules.check(x)
        x = ArrayBatches(x, batch_size, True if shuffle is None else shuffle)
        pairs, shuffle = x.pairs, None
    # Datasets have their own order; Keras warns of its default.
    own_order = hasattr(x, "element_spec")
    options["shuffle"] = not own_order if shuffle is None else shuffle
    check_batch_size(model, inputs.rows_of(x), pairs)
    step_size = inputs.StepSize.of(x)
    if step_size is not None:
        check_micro_batches(step_size.batch_size, model.micro_batch_size)

    found = None if resume_from is None else read_resumable(resume_from)
    stream = stream_of(x)
    if stream is not None:
        check_same_everywhere(stream.description)
        if steps_per_epoch is None:
            steps_per_epoch = stream.steps_per_epoch
    if saves:
        _check_no_swaps(callbacks)
    data = RemainingData(x, steps_per_epoch, initial_epoch, remembers_ids=bool(saves))
    if resume_from is None and not saves:
        run = TrainingRun(data, step_size)
    else:
        # Callbacks may change the learning rate once training has begun.
        compiled = describe_compile(model)
        run = ResumableRun(data, step_size, compiled, validation.is_skipped)
    if found is not None:
        run.resume(model, found)
    _check_executions(model.steps_per_execution, data.steps_per_epoch, run.step)
    if model.compiled and run.epoch < epochs:
        _warn_of_rate_zero(model.optimizer)
    if resume_from is not None and options["verbose"]:
        if found is None:
            folder = os.fspath(resume_from)
            print(f"No checkpoint in {folder}: starting from the beginning.")
        else:
            place = f"epoch {run.epoch + 1}, step {run.step}"
            print(f"Resuming from {found[0]}: {place}.")
    model.training_run = run
    options["callbacks"] = [run, *options["callbacks"]]
    bars = [x for x in callbacks if isinstance(x, keras.callbacks.ProgbarLogger)]
    if options["verbose"] and not bars:
        options["callbacks"].append(ProgressBar())
    try:
        history = _fit_from(model, keras_fit, run, validation, options, epochs)
    except BaseException as error:
        run.undo_first_step()
        if (failed := writing_error()) is not None:
            error.add_note(f"A checkpoint could not be written either: {failed!r}")
        raise
    if saves:
        finish_writing_everywhere()
    return history


def _fit_from(model, keras_fit, run, validation, options, epochs):
    """Calls Keras's `fit` from where a run is to the end.

    The rest of an interrupted epoch is a fit of its own, since Keras takes the number
    of steps of the first epoch for all epochs.
    """
    history, data = None, run.data
    while run.epoch < epochs:
        if run.step and data.is_over(run.epoch, run.step):
            # Saved after the last step of an epoch, before its report: where the length
            # of data is unknown, Keras begins one step too many.
            _end_epoch(model, run, validation, options["callbacks"], epochs)
            if model.stop_training:
                break
            continue
        last = run.epoch + 1 if run.step else epochs
        x = data.after(run.epoch, run.step)
        if isinstance(x, ArrayBatches):
            # They have been checked whole.
            x = inputs.stream_for_keras(x)
        else:
            x = inputs.check_data(x, model.input_rules, training=True)
        given = dict(options, x=x, initial_epoch=run.epoch, epochs=last)
        if data.steps_per_epoch is not None:
            given["steps_per_epoch"] = data.steps_per_epoch - run.step
        run.start(x)
        history = _run(keras_fit, given)
        if last == epochs or model.stop_training:
            break
        run.restore_weights()
    if history is None:
        history = keras.callbacks.History()
        if run.history:
            # As at the end of the fit that finished the run.
            model.optimizer.finalize_variable_values(model.trainable_weights)
    if any(getattr(x, "use_ema", False) for x in optimizer_parts(model.optimizer)):
        # On JAX, weights and averages are the same arrays now, which cannot be updated.
        for variable in model.trainable_variables:
            variable.assign(ops.copy(variable))
    rows = [*run.history, *run.unfinished]
    history.epoch = [row["epoch"] for row in rows]
    history.history = {}
    for row in rows:
        for name, value in row["logs"].items():
            history.history.setdefault(name, []).append(value)
    return history


def _run(keras_fit, options):
    has_steps = "steps_per_epoch" in options
    try:
        with contextlib.nullcontext() if has_steps else inputs.until_the_end():
            return keras_fit(**options)
    finally:
        if isinstance(options["x"], types.GeneratorType):
            options["x"].close()


def _end_epoch(model, run, validation, callbacks, epochs):
    """A fit without steps: the end of an epoch that was trained to its last step."""
    if validation not in callbacks:
        callbacks = [run, validation, *callbacks[1:]]
    callbacks = keras.callbacks.CallbackList(
        callbacks, model=model, epochs=epochs, steps=0, verbose=0
    )
    model.stop_training = False
    run.start(run.data.data)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(run.epoch)
    logs = model.get_metrics_result()
    callbacks.on_epoch_end(run.epoch, dict(logs))
    callbacks.on_train_end(logs)


class Validation(keras.callbacks.Callback):
    """Evaluates a model at the end of epochs, as Keras's `fit` does.

    Args:
        data: The validation data, or `None`.
        callbacks: List of the callbacks that are told of it.
        options: Dictionary of the other arguments of `fit` on validation.
    """

    def __init__(self, data, callbacks, options):
        super().__init__()
        self.data = data
        self.callbacks = callbacks
        self.every = options["validation_freq"]
        self.options = {"steps": options["validation_steps"]}
        if not hasattr(data, "element_spec"):
            self.options["batch_size"] = options["validation_batch_size"]

    def is_skipped(self, epoch):
        """Whether there is data that is not evaluated at the end of this epoch."""
        if isinstance(self.every, int):
            return self.data is not None and (epoch + 1) % self.every != 0
        return self.data is not None and epoch + 1 not in self.every

    def on_epoch_end(self, epoch, logs=None):
        if self.data is None or self.is_skipped(epoch):
            return
        if logs is not None:
            # Without parameters: the callbacks keep those of the fit.
            callbacks = keras.callbacks.CallbackList(self.callbacks, model=self.model)
            found = self.model.evaluate(
                self.data,
                verbose=0,
                return_dict=True,
                callbacks=callbacks,
                **self.options,
            )
            logs.update({f"val_{name}": value for name, value in found.items()})


def _check_executions(steps_per_execution, steps_per_epoch, step):
    """Raises if an epoch would end within an execution, which takes steps of the next.

    Args:
        steps_per_execution: Integer.
        steps_per_epoch: Integer, of data that continues over the ends of epochs, or
            `None`.
        step: Integer, the steps of the first epoch that were done.
    """
    if steps_per_epoch is None:
        return
    if steps_per_epoch % steps_per_execution or step % steps_per_execution:
        done = f", of which {step} were done" if step else ""
        raise ValueError(
            "`steps_per_execution` must divide the steps of an epoch, or it would take "
            "steps of the next one: pass another to `compile`, or `steps_per_epoch` to "
            f"`fit`. Received: steps_per_execution={steps_per_execution}, epochs of "
            f"{steps_per_epoch} steps{done}"
        )


def _warn_of_rate_zero(optimizer):
    """Warns if nothing will be learned, as the schedule of a previous `fit` is over."""
    if optimizer is None:
        return
    steps = int(ops.convert_to_numpy(optimizer.iterations))
    rates = [
        float(ops.convert_to_numpy(each.learning_rate))
        for each in optimizer_parts(optimizer)
    ]
    # The first step of a warm-up has a rate of 0, too.
    if steps and rates and not any(rates):
        warnings.warn(
            "The learning rate is 0 at the start of this `fit`, and no weight changes "
            "unless its schedule or a callback raises it: after a schedule has ended, "
            "compile the model with a new "
            f"optimizer. Received: an optimizer that has made {steps} steps",
            stacklevel=4,
        )


def _check_no_swaps(callbacks):
    for each in callbacks:
        if isinstance(each, keras.callbacks.SwapEMAWeights) and each.swap_on_epoch:
            raise ValueError(
                "`callbacks` must not hold a `Checkpoint` together with "
                "`SwapEMAWeights(swap_on_epoch=True)`, which exchanges weights and "
                "averages while they are saved: pass `swap_on_epoch=False`. "
                f"Received: callbacks of types {[type(x).__name__ for x in callbacks]}"
            )


def _split(x, validation_split, validation_data):
    """Splits arrays as Keras does: the last ones are held out."""
    if validation_data is not None:
        raise ValueError(
            "`validation_split` must be 0 if there is `validation_data`. Received: "
            f"validation_split={validation_split}, and validation_data of type "
            f"{type(validation_data).__name__}"
        )
    pairs = len(x["token_ids"])
    first = int(pairs * (1.0 - validation_split))
    if not 0 < first < pairs:
        raise ValueError(
            "`validation_split` must leave pairs on both sides. Received: "
            f"validation_split={validation_split}, {pairs} pairs"
        )
    return ({k: v[:first] for k, v in x.items()}, {k: v[first:] for k, v in x.items()})
