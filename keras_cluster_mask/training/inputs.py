"""Checks of what `fit`, `evaluate` and `predict` are given, before they start."""

import contextlib
import dataclasses
import warnings

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.distribution.processes import process_index_and_count

KEYS = ("images", "token_ids")
FOREIGN = (
    "`token_ids` must be in the text encoder's vocabulary, [0, {}). "
    "Were they made by another tokenizer?"
)
ENDLESS = (
    "`token_ids` must hold the end token, {}, in every row: texts are pooled there."
)
LONELY = (
    "A contrastive loss compares the pairs of a batch, so it needs at least two pairs."
)


def check_data(data, vocabulary_size=None, batch_size=None, end_token_id=None):
    """Checks data for a `ContrastiveModel`, and hands it over as Keras takes it.

    Arrays are checked whole. A `tf.data.Dataset` and an `ImageTextDataset` get a check
    of every batch, on the host, as part of their pipeline. Strings, such as keys and
    captions, are left out, as no model takes them. Other iterables are returned
    unchanged.

    Args:
        data: What the user passed as `x`, or as `validation_data`.
        vocabulary_size: Integer or `None`, the text encoder's.
        batch_size: Integer, the batch size that arrays are trained in; `None` if
            the data is not for training.
        end_token_id: Integer or `None`, the id that every text must hold.

    Returns:
        The data, with a check added where it has to run per batch. An
        `ImageTextDataset` becomes a `tf.data.Dataset` on TensorFlow, else a generator:
        one pass.
    """
    training = batch_size is not None
    rules = {"vocabulary_size": vocabulary_size, "end_token_id": end_token_id}
    has_rules = any(rule is not None for rule in rules.values())
    if isinstance(data, dict):
        check_keys(data)
        if has_rules:
            check_ids(data["token_ids"], **rules)
        if training and len(data["images"]) % batch_size == 1:
            raise ValueError(
                f"{LONELY} The last batch of these arrays would be one. Received: "
                f"{len(data['images'])} pairs, batch_size={batch_size}"
            )
        if any(map(_holds_strings, data.values())):
            data = {k: v for k, v in data.items() if not _holds_strings(v)}
    elif isinstance(data, (tuple, list)) and data and isinstance(data[0], dict):
        data = (check_data(data[0], batch_size=batch_size, **rules), *data[1:])
    elif hasattr(data, "as_dataset") and keras.backend.backend() == "tensorflow":
        data = check_data(data.as_dataset(), batch_size=batch_size, **rules)
    elif hasattr(data, "as_dataset"):
        check_keys(data.element_spec)
        data = _checked_stream(data, rules, training)
    elif hasattr(data, "element_spec") and isinstance(data.element_spec, dict):
        check_keys(data.element_spec)
        if any(spec.dtype == "string" for spec in data.element_spec.values()):
            data = data.map(_without_strings)
        if training or has_rules:
            data = data.map(lambda batch: _checked(batch, training, **rules))
    return data


def check_ends(data, steps):
    """Raises an error for endless data without a number of steps."""
    if steps is None and stream_of(data) is not None:
        raise ValueError(
            "Data that is evaluated or predicted must end: pass `training=False` to "
            "`image_text_dataset`, or `steps`. "
            f"Received: an endless {type(data).__name__}"
        )


@contextlib.contextmanager
def until_the_end():
    """Suppresses Keras's warning at the end of data of unknown length."""
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
    check_keys(inputs)


def check_keys(data):
    """Checks the keys of a batch, or of data as far as they are known."""
    batch = getattr(data, "element_spec", data)
    if not isinstance(batch, dict):
        return
    missing = [key for key in KEYS if key not in batch]
    if missing:
        raise ValueError(
            f"A batch must have the keys 'images' and 'token_ids'; missing: {missing}. "
            f"Received: keys={sorted(batch)}"
        )


def check_ids(ids, vocabulary_size: int | None = None, end_token_id: int | None = None):
    """Raises an error for token ids that a text encoder cannot take.

    Args:
        ids: `(batch, T)` ints.
        vocabulary_size: Integer, the number of ids that there are, or `None`.
        end_token_id: Integer, the id that every row must hold, or `None`.
    """
    ids = ids if isinstance(ids, np.ndarray) else ops.convert_to_numpy(ids)
    low, high = (ids.min(), ids.max()) if ids.size else (0, 0)
    if vocabulary_size is not None and (low < 0 or high >= vocabulary_size):
        raise ValueError(
            f"{FOREIGN.format(vocabulary_size)} Received: ids from {low} to {high}"
        )
    if end_token_id is not None:
        endless = np.flatnonzero(~np.any(ids == end_token_id, axis=-1))
        if endless.size:
            raise ValueError(
                f"{ENDLESS.format(end_token_id)} Received: {endless.size} rows "
                f"without it, the first of them row {endless[0]}"
            )


@dataclasses.dataclass(frozen=True)
class StepSize:
    """What a step trains on, as far as it is known in advance.

    Attributes:
        batch_size: Integer, the pairs of a step on all devices together.
        pairs: Integer, the pairs of an epoch, if the last batch may not be full.
        image_shape: tuple of the shape of an image, with `None` for unknown sides.
        text_length: Integer or `None`, the tokens of a text.
    """

    batch_size: int
    pairs: int | None
    image_shape: tuple
    text_length: int | None

    def samples(self, steps: int) -> int:
        """The pairs in so many steps of an epoch."""
        samples = steps * self.batch_size
        return samples if self.pairs is None else min(samples, self.pairs)

    @classmethod
    def of(cls, data, batch_size: int):
        """The step size of what is passed to `fit`, or `None` if it is not known.

        Args:
            data: A dictionary of arrays, a `tf.data.Dataset`, an `ImageTextDataset`, or
                anything else.
            batch_size: Integer, of arrays.
        """
        rows, pairs = rows_of(data), None
        if isinstance(data, dict):
            images, ids = data["images"], data["token_ids"]
            pairs = len(images)
            rows = min(batch_size, pairs)
        elif rows is not None:
            images, ids = (data.element_spec[key] for key in KEYS)
        else:
            return None
        _, processes = process_index_and_count(training=True)
        return cls(
            batch_size=rows * processes,
            pairs=None if pairs is None else pairs * processes,
            image_shape=tuple(images.shape[1:]),
            text_length=ids.shape[1],
        )


def rows_of(data) -> int | None:
    """The rows of a batch of data with an `element_spec`, or `None` if unknown."""
    spec = getattr(data, "element_spec", None)
    return spec["token_ids"].shape[0] if isinstance(spec, dict) else None


def _checked_stream(batches, rules, training):
    names = [k for k, spec in batches.element_spec.items() if spec.dtype != "string"]
    with contextlib.closing(iter(batches)) as batches:
        for batch in batches:
            check_ids(batch["token_ids"], **rules)
            rows = len(batch["images"])
            if training and rows < 2:
                raise ValueError(f"{LONELY} Received: a batch of {rows}")
            # Keras takes tuples alone from generators.
            yield ({name: batch[name] for name in names},)


def _holds_strings(array):
    if isinstance(array, list):
        array = np.asarray(array)
    return isinstance(array, np.ndarray) and array.dtype.kind in "SUO"


def _without_strings(batch):
    return {key: value for key, value in batch.items() if value.dtype != "string"}


def _checked(batch, training, vocabulary_size, end_token_id):
    # Only reached with a `tf.data.Dataset`, so tensorflow is installed.
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
    if end_token_id is not None:
        has_end = tf.reduce_any(ids == tf.cast(end_token_id, ids.dtype), axis=-1)
        message = ENDLESS.format(end_token_id)
        checks.append(tf.debugging.Assert(tf.reduce_all(has_end), [message]))
    if training:
        size = tf.shape(ids)[0]
        checks.append(tf.debugging.assert_greater(size, 1, message=LONELY))
    with tf.control_dependencies(checks):
        return {**batch, "token_ids": tf.identity(ids)}
