"""`tf.data` datasets: made of batches that Python reads, and prepared for a step."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.distribution.backends import import_triton_first


def dataset_of(
    read: Callable[[], Iterator[dict]], specs: dict[str, Any], is_endless: bool = False
) -> Any:
    """Returns a `tf.data.Dataset` of dictionaries.

    Args:
        read: Function that returns an iterator over batches, for each iteration over
            the dataset.
        specs: Dictionary from the name of each entry of a batch to an object with its
            `shape`, with `None` for unknown sizes, and its `dtype`. Entries with the
            dtype `"object"` are dropped.
        is_endless: Boolean. Whether the dataset says that it never ends.

    Raises:
        ImportError: If TensorFlow is not installed.
    """
    tf = _import_tensorflow()
    specs = {
        name: tf.TensorSpec(spec.shape, spec.dtype)
        for name, spec in specs.items()
        if spec.dtype != "object"
    }

    def batches():
        with contextlib.closing(read()) as found:
            for batch in found:
                yield {name: batch[name] for name in specs}

    dataset = tf.data.Dataset.from_generator(batches, output_signature=specs)
    if is_endless:
        endless = tf.data.INFINITE_CARDINALITY
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(endless))
    options = tf.data.Options()
    # The samples come from Python, so `tf.distribute` has no files to shard.
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    # Nothing needs autotuning, and an epoch would wait up to a second for it.
    options.autotune.enabled = False
    return dataset.with_options(options).prefetch(1)


def prepared(
    dataset: Any,
    names: Sequence[str],
    check: Callable[[dict], None],
    cut: Callable[..., dict],
) -> Any:
    """Checks the first batch of a `tf.data.Dataset`, and cuts the texts of all batches.

    Args:
        dataset: A `tf.data.Dataset` of dictionaries.
        names: The entries that are checked.
        check: Function of a dictionary of arrays, which raises an error.
        cut: Function of a batch and a module with the functions of NumPy, here for
            tensors. Returns a batch.
    """
    import tensorflow as tf

    def check_arrays(*arrays):
        check(dict(zip(names, arrays)))
        return np.int32(0)

    def prepare(number, batch):
        values = [batch[name] for name in names]
        # No dataset is read twice for the check: one may have side effects.
        done = tf.cond(
            number == 0,
            lambda: tf.ensure_shape(
                tf.numpy_function(check_arrays, values, "int32"), ()
            ),
            lambda: 0,
        )
        with tf.control_dependencies([done]):
            batch = {**batch, "token_ids": tf.identity(batch["token_ids"])}
        return cut(batch, tf.experimental.numpy)

    return dataset.enumerate().map(prepare)


def _import_tensorflow():
    """Imports TensorFlow, without GPUs unless it is the Keras backend.

    It would otherwise take all GPU memory, which another backend needs.
    """
    import_triton_first()
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "`as_dataset` needs TensorFlow: `pip install tensorflow`, or iterate over "
            f"the dataset itself. Received: {error}"
        ) from error
    if keras.backend.backend() != "tensorflow":
        # If TensorFlow is already initialized, keep the devices that the user chose.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tf
