"""What the data pipeline does with TensorFlow, which nothing else here imports."""

import contextlib

from keras_cluster_mask.distribution.tensorflow_import import import_triton_first


def import_tensorflow(purpose, remedy):
    """TensorFlow, which sees no GPU unless Keras uses it as its backend.

    It would take all memory of every GPU that another backend needs.

    Args:
        purpose: str, for the error.
        remedy: str, what does without TensorFlow.

    Raises:
        ImportError: If TensorFlow is not installed.
    """
    import_triton_first()
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs TensorFlow: `pip install tensorflow`, or use {remedy}. "
            f"Received: {error}"
        ) from error
    import keras

    if keras.backend.backend() != "tensorflow":
        # A TensorFlow that is in use already sees what the user has decided.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tf


def as_dataset(stream):
    """The batches of a stream as a `tf.data.Dataset`.

    Each iteration starts at the `start` that the stream has then.

    Args:
        stream: `ImageTextDataset`, or `ArrayBatches`.
    """
    tf = import_tensorflow("`format='tf'`", "`format='grain'`")
    if "captions" in stream.element_spec and stream.element_spec["captions"].dtype != (
        "string"
    ):
        raise ValueError(
            "`include_captions='all'` needs `format='grain'`: a `tf.data.Dataset` "
            "holds no tuples of strings. Received: include_captions='all', format='tf'"
        )

    def batches():
        iterator = iter(stream)
        try:
            yield from iterator
        finally:
            iterator.close()

    signature = {
        name: tf.TensorSpec(spec.shape, spec.dtype)
        for name, spec in stream.element_spec.items()
    }
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    options = tf.data.Options()
    options.deterministic = True
    # The samples come from Python, so `tf.distribute` has no files to distribute.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # There is nothing to tune, and an epoch would wait up to a second for the tuner.
    options.autotune.enabled = False
    dataset = dataset.with_options(options).prefetch(1)
    # TensorFlow gives no length to an endless stream.
    members = {
        "__len__": lambda self: len(stream),
        "steps_per_epoch": property(lambda self: stream.steps_per_epoch),
    }
    if hasattr(stream, "skipped"):
        members["skipped"] = property(lambda self: stream.skipped)
    dataset.__class__ = type("ImageTextDataset", (type(dataset),), members)
    dataset.stream = stream
    return dataset
