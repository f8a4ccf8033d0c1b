"""Checks the data passed to `fit`, `evaluate` and `predict` before they start."""

import contextlib
import copy
import dataclasses
import types
import warnings

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.distribution.processes import process_index_and_count
from keras_cluster_mask.training.input_rules import KEYS
from keras_cluster_mask.training.tokens import check_tokenizer_of

SAMPLE_WEIGHT = "sample_weight"


def as_dictionary(x, y=None, sample_weight=None, class_weight=None):
    """Merges arrays and their sample weights into one dictionary.

    Args:
        x: Data, or a tuple of data and the labels and sample weights after it, as in
            Keras. Data other than arrays is returned as it is.
        y: Must be `None`.
        sample_weight: `(pairs,)` floats, for arrays only.
        class_weight: Must be `None`.
    """
    if isinstance(x, tuple) and x and isinstance(x[0], dict):
        x, *rest = x
        own_y, own_weight = [*rest, None, None][:2]
        y = own_y if y is None else y
        sample_weight = own_weight if sample_weight is None else sample_weight
    check_no_labels(y=y, class_weight=class_weight)
    spec = getattr(x, "element_spec", None)
    if isinstance(spec, tuple) and len(spec) == 1 and isinstance(spec[0], dict):
        # A `tf.data.Dataset` of one-element tuples, each with a dictionary.
        x = x.map(lambda batch: batch)
    if isinstance(x, dict):
        x = {name: _array_of(v) for name, v in x.items() if v is not None}
    if sample_weight is None:
        return x
    if not isinstance(x, dict) or SAMPLE_WEIGHT in x:
        raise ValueError(
            "`sample_weight` is for arrays; other data holds the weights of its rows "
            "in its batches, under the key 'sample_weight'. "
            f"Received: sample_weight of type {type(sample_weight).__name__}, data of "
            f"type {type(x).__name__}"
        )
    return {**x, SAMPLE_WEIGHT: _array_of(sample_weight)}


def _array_of(values):
    """Converts a list of numbers to an array; returns other values as they are."""
    is_list = isinstance(values, list) and not holds_strings(values)
    return np.asarray(values) if is_list else values


def check_no_labels(**labels):
    """Raises an error for labels, which a contrastive loss does not use."""
    for name, value in labels.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be None: a contrastive loss needs no labels. To weight "
                "pairs, put 'sample_weight' into the batches. "
                f"Received: {name} of type {type(value).__name__}"
            )


def check_no_losses(options: dict):
    """Raises an error for `compile` arguments that the model sets itself."""
    for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
        if options.get(name) is not None:
            raise ValueError(
                f"`{name}` must not be given: the loss is the argument `loss` of the "
                "model, and the metrics are built in. "
                f"Received: {name}={options[name]!r}"
            )


def sample_weights(batch, given=None):
    """Returns the sample weights of a batch as `(batch,)` float32, or `None`."""
    # Keras passes its own argument only with labels, or for a single batch.
    weights = batch.get(SAMPLE_WEIGHT) if given is None else given
    if weights is None:
        return None
    if len(weights.shape) != 1:
        raise ValueError(
            "`sample_weight` must have shape (batch,). "
            f"Received: sample_weight.shape={tuple(weights.shape)}"
        )
    return ops.cast(weights, "float32")


def evaluation_data(model, data, steps=None, passes_once=True):
    """Checks data for evaluation or prediction, and prepares it for Keras."""
    check_ends(data, steps)
    check_tokenizer_of(model, data)
    return check_data(data, model.input_rules, passes_once=passes_once)


def check_data(data, rules, training=False, passes_once=True):
    """Checks data for a `ContrastiveModel`, and prepares it for Keras.

    Arrays are checked as a whole. For other data, a check of every batch is added to
    the pipeline, on the host. Strings, such as keys and captions, are removed, since
    models do not take them.

    Args:
        data: The user's `x` or `validation_data`.
        rules: The `InputRules` of the model.
        training: Boolean. Whether the data is for training.
        passes_once: Boolean. Whether Keras reads the data in a single pass. Keras
            starts worker processes once for a generator, and twice for a grain dataset.

    Returns:
        The data, with a check added where it has to run per batch. A stream becomes a
        `tf.data.Dataset` on TensorFlow; on other backends, it becomes a generator if
        there is a single pass.
    """
    if isinstance(data, dict):
        check_keys(data, rules.keys)
        rules.check(data, training)
        if any(map(holds_strings, data.values())):
            data = {k: v for k, v in data.items() if not holds_strings(v)}
    elif hasattr(data, "as_dataset") and keras.backend.backend() == "tensorflow":
        data = check_data(data.as_dataset(), rules, training)
    elif hasattr(data, "as_dataset"):
        _check_spec(data, rules)
        check = _Check(rules, training)
        data = _generator(data, check) if passes_once else data.map(check)
    elif hasattr(data, "element_spec") and isinstance(data.element_spec, dict):
        _check_spec(data, rules)
        if any(spec.dtype == "string" for spec in data.element_spec.values()):
            data = data.map(_without_strings)
        data = data.map(lambda batch: _checked(batch, rules, training))
    elif isinstance(data, types.GeneratorType):
        check = _Check(rules, training)
        data = (check(batch) for batch in data)
    elif isinstance(data, keras.utils.PyDataset):
        data = _CheckedBatches(data, _Check(rules, training))
    elif hasattr(data, "collate_fn"):
        # A torch `DataLoader`. The copy leaves the user's own unchanged.
        data = copy.copy(data)
        data.collate_fn = _Check(rules, training, data.collate_fn)
    elif any(x.__module__.split(".")[0] == "grain" for x in type(data).__mro__):
        data = data.map(_Check(rules, training))
    return data


def stream_for_keras(stream):
    """Converts a stream to a `tf.data.Dataset` or to a single-pass generator."""
    if keras.backend.backend() == "tensorflow":
        return stream.as_dataset()
    return _generator(stream)


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


def check_input(inputs, keys=KEYS):
    """Checks the inputs of a call."""
    if not isinstance(inputs, dict):
        raise ValueError(
            "`inputs` must be a dictionary with the keys 'images' and 'token_ids'. "
            f"Received: inputs of type {type(inputs).__name__}"
        )
    check_keys(inputs, keys)


def check_keys(data, keys=KEYS):
    """Checks the keys of a batch, or of a dataset whose keys are known."""
    batch = getattr(data, "element_spec", data)
    if not isinstance(batch, dict):
        return
    missing = [key for key in keys if key not in batch]
    if missing:
        raise ValueError(
            f"A batch must have the keys {' and '.join(map(repr, keys))}; "
            f"missing: {missing}. Received: keys={sorted(batch)}"
        )
    if "sample_weights" in batch:
        raise ValueError(
            "The weights of pairs must be in the batch as 'sample_weight'. "
            f"Received: keys={sorted(batch)}"
        )


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The size of a training step's batch, as far as it is known in advance.

    Attributes:
        batch_size: Integer, the number of pairs per step on all devices together.
        image_shape: tuple, the shape of an image, with `None` for unknown sides.
        text_length: Integer or `None`, the number of tokens per text.
    """

    batch_size: int
    image_shape: tuple
    text_length: int | None

    @classmethod
    def of(cls, data):
        """Returns the step size of training data, or `None` if it is unknown."""
        rows = rows_of(data)
        if rows is None:
            return None
        images, ids = (data.element_spec[key] for key in KEYS)
        _, processes = process_index_and_count(training=True)
        return cls(
            batch_size=rows * processes,
            image_shape=tuple(images.shape[1:]),
            text_length=ids.shape[1],
        )


def rows_of(data) -> int | None:
    """Returns the rows per batch of data with an `element_spec`, or `None`."""
    spec = getattr(data, "element_spec", None)
    return spec["token_ids"].shape[0] if isinstance(spec, dict) else None


def _check_spec(data, rules):
    check_keys(data.element_spec, rules.keys)
    rules.check_type(data.element_spec["images"])


def _generator(stream, check=None):
    names = [k for k, spec in stream.element_spec.items() if spec.dtype != "string"]
    with contextlib.closing(iter(stream)) as batches:
        for batch in batches:
            if check is not None:
                check(batch)
            # Keras accepts only tuples from generators.
            yield ({name: batch[name] for name in names},)


def _checked(batch, rules, training):
    # Called only for a `tf.data.Dataset`, so tensorflow is installed.
    import tensorflow as tf

    # Images that are not floats are checked by their type alone, since copies take
    # time.
    names = {*KEYS, SAMPLE_WEIGHT, "padding_mask"} & batch.keys()
    if not batch["images"].dtype.is_floating:
        names.remove("images")
    names = sorted(names)
    check = _Check(rules, training)

    def check_arrays(*arrays):
        check.check_values(dict(zip(names, arrays)))
        return np.False_

    done = tf.numpy_function(check_arrays, [batch[name] for name in names], "bool")
    with tf.control_dependencies([done]):
        return {**batch, "token_ids": tf.identity(batch["token_ids"])}


class _Check:
    """Checks batches one after another, and returns them.

    Args:
        rules: The `InputRules` of the model.
        training: Boolean. Whether the batches are for training.
        collate: Function that makes a batch from its input, or `None`.
    """

    def __init__(self, rules, training, collate=None):
        self.rules, self.training, self.collate = rules, training, collate
        # A batch of bright normalized images may look like pixels. Once a batch shows
        # that the images are normalized, later batches are not checked.
        self.is_normalized = False

    def __call__(self, batch):
        batch = batch if self.collate is None else self.collate(batch)
        given = as_dictionary(batch)
        check_input(given, self.rules.keys)
        given = {k: v for k, v in given.items() if not holds_strings(v)}
        self.check_values(given)
        # In `given`, lists have become arrays.
        return given if isinstance(batch, dict) else batch

    def check_values(self, arrays):
        """Checks a dictionary of arrays. Images may be missing if they are uint8."""
        if self.rules.check(arrays, self.training, not self.is_normalized):
            self.is_normalized = True


class _CheckedBatches(keras.utils.PyDataset):
    def __init__(self, data, check):
        super().__init__(
            workers=data.workers,
            use_multiprocessing=data.use_multiprocessing,
            max_queue_size=data.max_queue_size,
        )
        self.data, self.check = data, check

    @property
    def num_batches(self):
        return self.data.num_batches

    def __getitem__(self, index):
        return self.check(self.data[index])

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()


def holds_strings(values) -> bool:
    """Returns whether an array or a list holds strings, such as names."""
    if isinstance(values, list):
        return any(isinstance(x, (str, bytes)) for x in keras.tree.flatten(values))
    return isinstance(values, np.ndarray) and values.dtype.kind in "SUO"


def _without_strings(batch):
    return {key: value for key, value in batch.items() if value.dtype != "string"}
