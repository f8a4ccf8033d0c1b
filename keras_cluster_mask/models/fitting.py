"""What `ContrastiveModel.fit` does before and around Keras's own `fit`."""

import keras

from keras_cluster_mask import distribution
from keras_cluster_mask.models.batches import check_batches, until_the_end
from keras_cluster_mask.models.step_size import StepSize, rows_of


def fit(model, keras_fit, x, options, samples_per_epoch=None):
    """Trains a model, from a callback's checkpoint on if there is one.

    Args:
        model: A `ContrastiveModel`.
        keras_fit: Keras's `fit` of the model.
        x: The training data.
        options: Dictionary of the other arguments of `fit`.
        samples_per_epoch: Integer or `None`.

    Returns:
        A `keras.callbacks.History`.
    """
    options = dict(options)
    if isinstance(x, dict) and options["validation_split"]:
        # Here rather than by Keras, which would split the rest of an epoch anew.
        x, held_out = split(x, options.pop("validation_split"))
        if options["validation_data"] is None:
            options["validation_data"] = held_out
    if options["validation_data"] is not None:
        options["validation_data"] = check_batches(
            options["validation_data"], model.vocabulary_size
        )
    if not distribution.is_main_process():
        options["verbose"] = 0
    batch_size = options["batch_size"] or 32
    steps = options.pop("steps_per_epoch")
    if samples_per_epoch is not None:
        steps = _steps_of(samples_per_epoch, x, steps)
    goes_on = samples_per_epoch is not None or hasattr(x, "position")
    callbacks = options.pop("callbacks")
    callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    options["callbacks"] = callbacks = [each for each in callbacks if each is not None]

    def run(x, initial_epoch, epochs, steps_done=0):
        if steps is not None and goes_on:
            x = x.repeat()
        x = check_batches(x, model.vocabulary_size, batch_size)
        rows = rows_of(x) if hasattr(x, "element_spec") else batch_size
        pairs = len(x["images"]) if isinstance(x, dict) else None
        distribution.check_batch_size(model, rows, pairs)
        model.step_size = StepSize.of(x, batch_size)
        given = dict(options, initial_epoch=initial_epoch, epochs=epochs)
        if hasattr(x, "element_spec"):
            # It is in the order it is meant to be in, and Keras would say so.
            given.setdefault("shuffle", False)
        if steps is not None:
            given["steps_per_epoch"] = steps - steps_done
            return keras_fit(x, **given)
        with until_the_end():
            return keras_fit(x, **given)

    def evaluate():
        validation = {"x": options["validation_data"], "verbose": 0}
        if isinstance(validation["x"], (tuple, list)):
            validation["x"] = validation["x"][0]
        if validation["x"] is None:
            return {}
        if not hasattr(validation["x"], "element_spec"):
            validation["batch_size"] = (
                options.get("validation_batch_size") or batch_size
            )
        logs = model.evaluate(return_dict=True, **validation)
        return {f"val_{name}": value for name, value in logs.items()}

    initial_epoch, epochs = options.pop("initial_epoch"), options.pop("epochs")
    for callback in callbacks:
        if hasattr(callback, "fit_from_last"):
            place = dict(
                batch_size=batch_size,
                shuffle=options.get("shuffle", True),
                steps_per_epoch=steps,
                initial_epoch=initial_epoch,
                epochs=epochs,
            )
            return callback.fit_from_last(model, x, place, run, evaluate)
    if hasattr(x, "position"):
        callbacks.append(InOrder(x.position, steps))
    return run(x, initial_epoch, epochs)


class InOrder(keras.callbacks.Callback):
    """Lets `fit` read on from where it stopped, whatever else has read the data."""

    def __init__(self, position, steps_per_epoch):
        super().__init__()
        self.position = position
        self.steps_per_epoch = steps_per_epoch

    def on_train_begin(self, logs=None):
        self.steps = 0
        if self.steps_per_epoch is not None:
            self.position.seek(*self.position.trained)

    def on_epoch_begin(self, epoch, logs=None):
        if self.steps_per_epoch is None:
            self.position.seek(*self.position.trained)

    def on_epoch_end(self, epoch, logs=None):
        if self.steps_per_epoch is None:
            self.position.trained = self.position.trained[0] + 1, 0
            return
        steps = self.position.before(*self.position.trained) + self.steps_per_epoch
        self.position.trained = self.position.after(steps)


def split(x, validation_split):
    """Splits arrays as Keras does: the last ones are held out."""
    pairs = len(x["token_ids"])
    first = int(pairs * (1.0 - validation_split))
    if not 0 < first < pairs:
        raise ValueError(
            "`validation_split` must leave pairs on both sides. Received: "
            f"validation_split={validation_split}, {pairs} pairs"
        )
    return ({k: v[:first] for k, v in x.items()}, {k: v[first:] for k, v in x.items()})


def _steps_of(samples_per_epoch, x, steps):
    if steps is not None:
        raise ValueError(
            "Pass `samples_per_epoch` or `steps_per_epoch`, not both. Received: "
            f"samples_per_epoch={samples_per_epoch}, steps_per_epoch={steps}"
        )
    check_batches(x)
    rows = rows_of(x)
    if rows is None:
        raise ValueError(
            "`samples_per_epoch` needs a `tf.data.Dataset` of full batches, such as an "
            "`image_text_dataset` for training or `dataset.batch(batch_size, "
            "drop_remainder=True)`. Received: data of type "
            f"{type(x).__name__}"
        )
    batch_size = rows * distribution.process(training=True)[1]
    if samples_per_epoch < batch_size:
        raise ValueError(
            "`samples_per_epoch` must be at least the batch size. Received: "
            f"samples_per_epoch={samples_per_epoch}, batch_size={batch_size}"
        )
    return samples_per_epoch // batch_size
