"""Checks of what `fit`, `evaluate` and `predict` are given, before they start."""

import numpy as np
from keras import ops

KEYS = ("images", "token_ids")


def check_batches(data, vocabulary_size=None):
    """Checks data for `ContrastiveModel` as far as can be done for free.

    Arrays are checked whole. A `tf.data.Dataset` gets a check of every batch, on
    the host, as part of its pipeline. Other iterables are left as they are.

    Args:
        data: What the user passed as `x`.
        vocabulary_size: Integer or `None`, the text encoder's.

    Returns:
        The data, with a check added where it has to run per batch.
    """
    if isinstance(data, dict):
        _check_keys(data)
        if vocabulary_size is not None:
            ids = data["token_ids"]
            ids = ids if isinstance(ids, np.ndarray) else ops.convert_to_numpy(ids)
            if ids.size and (ids.min() < 0 or ids.max() >= vocabulary_size):
                raise ValueError(
                    f"{_vocabulary_message(vocabulary_size)} "
                    f"Received: ids from {ids.min()} to {ids.max()}"
                )
        return data
    if isinstance(data, (tuple, list)) and data and isinstance(data[0], dict):
        return (check_batches(data[0], vocabulary_size), *data[1:])
    if hasattr(data, "element_spec") and hasattr(data, "map"):
        if isinstance(data.element_spec, dict):
            _check_keys(data.element_spec)
            if vocabulary_size is not None:
                return data.map(lambda batch: _checked(batch, vocabulary_size))
        return data
    return data


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


def _checked(batch, vocabulary_size):
    # Only reached with a tf.data.Dataset in hand, so tensorflow is there.
    import tensorflow as tf

    ids = batch["token_ids"]
    message = _vocabulary_message(vocabulary_size)
    with tf.control_dependencies(
        [
            tf.debugging.assert_less(
                ids, tf.cast(vocabulary_size, ids.dtype), message=message
            ),
            tf.debugging.assert_non_negative(ids, message=message),
        ]
    ):
        return {**batch, "token_ids": tf.identity(ids)}


def _vocabulary_message(vocabulary_size):
    return (
        "`token_ids` must be in the text encoder's vocabulary, "
        f"[0, {vocabulary_size}). Were they made by another tokenizer?"
    )
