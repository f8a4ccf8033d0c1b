"""The TensorFlow code of the data pipeline. Only this module imports TensorFlow."""

import contextlib

from keras_cluster_mask.distribution.backends import import_triton_first


def import_tensorflow():
    """Imports TensorFlow, without GPUs unless it is the Keras backend.

    It would otherwise take all GPU memory, which another backend needs.

    Raises:
        ImportError: If TensorFlow is not installed.
    """
    import_triton_first()
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "`format='tf'` needs TensorFlow: `pip install tensorflow`, or use "
            f"`format='grain'`. Received: {error}"
        ) from error
    import keras

    if keras.backend.backend() != "tensorflow":
        # If TensorFlow is already initialized, keep the devices that the user chose.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tf


def as_dataset(stream):
    """Returns the batches of a stream as a `tf.data.Dataset`.

    Each iteration starts at the current `start` of the stream. Tuples of captions
    are left out, since a `tf.data.Dataset` cannot hold them.

    Args:
        stream: `ImageTextDataset`, or `ArrayBatches`.
    """
    tf = import_tensorflow()
    specs = {k: x for k, x in stream.element_spec.items() if x.dtype != "object"}

    def batches():
        iterator = iter(stream)
        try:
            for batch in iterator:
                yield {name: batch[name] for name in specs}
        finally:
            iterator.close()

    signature = {name: tf.TensorSpec(x.shape, x.dtype) for name, x in specs.items()}
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    options = tf.data.Options()
    # The samples come from Python, so `tf.distribute` has no files to shard.
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    # Nothing needs autotuning, and an epoch would wait up to a second for it.
    options.autotune.enabled = False
    dataset = dataset.with_options(options).prefetch(1)
    # TensorFlow does not know the length of a dataset from a generator.
    members = {
        "__len__": lambda self: len(stream),
        "steps_per_epoch": property(lambda self: stream.steps_per_epoch),
        "skipped": property(lambda self: stream.skipped),
    }
    dataset.__class__ = type("ImageTextDataset", (type(dataset),), members)
    dataset.stream = stream
    return dataset
