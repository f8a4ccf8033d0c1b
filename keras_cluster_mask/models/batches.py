"""Checks of what `fit`, `evaluate` and `predict` are given, before they start."""

import contextlib
import warnings

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.models.batch_stream import BatchStream

KEYS = ("images", "token_ids")
FOREIGN = (
    "`token_ids` must be in the text encoder's vocabulary, [0, {}). "
    "Were they made by another tokenizer?"
)
LONELY = (
    "A contrastive loss needs at least two pairs in a batch: the others are what a "
    "pair is told from."
)


def check_batches(data, vocabulary_size=None, batch_size=None):
    """Checks data for `ContrastiveModel` as far as can be done for free.

    Arrays are checked whole. A `tf.data.Dataset` and `ImageTextBatches` get a check of
    every batch, on the host, as part of their pipeline. Strings, such as keys and
    captions, are left out, as no model takes them. Other iterables are left as they
    are.

    Args:
        data: What the user passed as `x`, or as `validation_data`.
        vocabulary_size: Integer or `None`, the text encoder's.
        batch_size: Integer, the batch size that arrays are trained in; `None` if
            the data is not for training.

    Returns:
        The data, with a check added where it has to run per batch.
    """
    if isinstance(data, dict):
        _check_keys(data)
        if vocabulary_size is not None:
            check_ids(data["token_ids"], vocabulary_size)
        if batch_size is not None and len(data["images"]) % batch_size == 1:
            raise ValueError(
                f"{LONELY} The last batch of these arrays would be one. Received: "
                f"{len(data['images'])} pairs, batch_size={batch_size}"
            )
        if any(map(_holds_strings, data.values())):
            data = {k: v for k, v in data.items() if not _holds_strings(v)}
    elif isinstance(data, (tuple, list)) and data and isinstance(data[0], dict):
        data = (check_batches(data[0], vocabulary_size, batch_size), *data[1:])
    elif hasattr(data, "as_dataset") and keras.backend.backend() == "tensorflow":
        data = check_batches(data.as_dataset(), vocabulary_size, batch_size)
    elif hasattr(data, "as_dataset"):
        _check_keys(data.element_spec)
        training = batch_size is not None
        data = BatchStream(data, lambda b: _check_batch(b, vocabulary_size, training))
    elif hasattr(data, "element_spec") and isinstance(data.element_spec, dict):
        _check_keys(data.element_spec)
        if any(spec.dtype == "string" for spec in data.element_spec.values()):
            data = data.map(_without_strings)
        training = batch_size is not None
        if training or vocabulary_size is not None:
            data = data.map(lambda batch: _checked(batch, vocabulary_size, training))
    return data


@contextlib.contextmanager
def until_the_end():
    """Lets Keras take the end of data of unknown length for what it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data", UserWarning)
        yield


def check_input(inputs):
    """Checks the inputs of a call."""
    if not isinstance(inputs, dict):
        raise ValueError(
            "`inputs` must be a dictionary with the keys 'images' and 'token_ids'. "
            f"Received: inputs of type {type(inputs).__name__}"
        )
    _check_keys(inputs)


def _check_keys(batch):
    missing = [key for key in KEYS if key not in batch]
    if missing:
        raise ValueError(
            f"A batch must have the keys 'images' and 'token_ids'; missing: {missing}. "
            f"Received: keys={sorted(batch)}"
        )


def check_ids(ids, vocabulary_size):
    """Raises an error for token ids that a vocabulary does not have."""
    ids = ids if isinstance(ids, np.ndarray) else ops.convert_to_numpy(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
        raise ValueError(
            f"{FOREIGN.format(vocabulary_size)} "
            f"Received: ids from {ids.min()} to {ids.max()}"
        )


def _check_batch(batch, vocabulary_size, training):
    if vocabulary_size is not None:
        check_ids(batch["token_ids"], vocabulary_size)
    if training and len(batch["images"]) < 2:
        raise ValueError(f"{LONELY} Received: a batch of {len(batch['images'])}")


def _holds_strings(array):
    if isinstance(array, list):
        array = np.asarray(array)
    return isinstance(array, np.ndarray) and array.dtype.kind in "SUO"


def _without_strings(batch):
    return {key: value for key, value in batch.items() if value.dtype != "string"}


def _checked(batch, vocabulary_size, training):
    # Only reached with a tf.data.Dataset in hand, so tensorflow is there.
    import tensorflow as tf

    ids = batch["token_ids"]
    checks = []
    if vocabulary_size is not None:
        message = FOREIGN.format(vocabulary_size)
        wide = tf.cast(ids, "int64")
        checks.append(tf.debugging.assert_non_negative(wide, message=message))
        checks.append(
            tf.debugging.assert_less(
                wide, tf.constant(vocabulary_size, "int64"), message=message
            )
        )
    if training:
        size = tf.shape(ids)[0]
        checks.append(tf.debugging.assert_greater(size, 1, message=LONELY))
    with tf.control_dependencies(checks):
        return {**batch, "token_ids": tf.identity(ids)}
