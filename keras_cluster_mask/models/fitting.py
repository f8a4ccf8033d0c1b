"""What `ContrastiveModel.fit` does before and around Keras's own `fit`."""

import keras

from keras_cluster_mask import distribution
from keras_cluster_mask.models.batches import check_batches


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
    model.array_batch_size = None if hasattr(x, "element_spec") else batch_size
    goes_on = samples_per_epoch is not None or hasattr(x, "position")

    def run(x, initial_epoch, epochs, steps_done=0):
        if steps is not None and goes_on:
            x = x.repeat()
        x = check_batches(x, model.vocabulary_size, batch_size)
        pairs = len(x["images"]) if isinstance(x, dict) else None
        distribution.check_batch_size(model, _rows(x) or batch_size, pairs)
        given = dict(options, initial_epoch=initial_epoch, epochs=epochs)
        if steps is not None:
            given["steps_per_epoch"] = steps - steps_done
        return keras_fit(x, **given)

    initial_epoch, epochs = options.pop("initial_epoch"), options.pop("epochs")
    callbacks = options["callbacks"]
    for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
        if hasattr(callback, "fit_from_last"):
            place = dict(
                batch_size=batch_size,
                shuffle=options.get("shuffle", True),
                steps_per_epoch=steps,
                initial_epoch=initial_epoch,
                epochs=epochs,
            )
            return callback.fit_from_last(model, x, place, run)
    return run(x, initial_epoch, epochs)


def _steps_of(samples_per_epoch, x, steps):
    if steps is not None:
        raise ValueError(
            "Pass `samples_per_epoch` or `steps_per_epoch`, not both. Received: "
            f"samples_per_epoch={samples_per_epoch}, steps_per_epoch={steps}"
        )
    rows = _rows(x)
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


def _rows(x):
    """The rows of a batch of a `tf.data.Dataset`, or `None` if that is not known."""
    spec = getattr(x, "element_spec", None)
    return spec["token_ids"].shape[0] if isinstance(spec, dict) else None
