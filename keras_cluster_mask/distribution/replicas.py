"""Rows of a batch: by data parallel replica, and by sample.

A JAX step sees the global batch whatever the number of devices, so it has one replica.
TensorFlow and torch run the same step on every replica.
"""

from typing import Any

import keras
from keras import ops

if keras.backend.backend() == "torch":
    from torch import distributed

    from keras_cluster_mask.distribution import torch_data_parallel


class OwnReduction:
    """A mixin before `keras.Model` for models that only this package reduces on torch.

    From Keras 3.16 on, a model that trains or predicts after torch processes have
    joined is wrapped in `DistributedDataParallel`, and its metrics are summed over
    processes. It would reduce all gradients twice. A frozen tower could not predict,
    and a single process that evaluates would wait for the others. Keras 3.15 does
    neither.
    """

    # Keras wraps a model where this is `None`, and calls the model itself where it is
    # false. It has no documented switch.
    ddp_model = property(lambda self: False, lambda self, value: None)

    def get_metrics_result(self) -> dict[str, Any]:
        results = {}
        for metric in self.metrics:
            value = metric.result()
            results |= value if isinstance(value, dict) else {metric.name: value}
        return results


def num_replicas() -> int:
    """Returns the number of replicas that train together on the rows of a batch."""
    return index_and_count()[1]


def replica_index():
    """Returns the index of this replica."""
    return index_and_count()[0]


def index_and_count():
    """Returns the index of this replica, and the number of replicas."""
    backend = keras.backend.backend()
    if backend == "tensorflow" and (context := tensorflow_replica()) is not None:
        return context.replica_id_in_sync_group, context.num_replicas_in_sync
    on_torch = backend == "torch" and distributed.is_available()
    if on_torch and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def process_index_and_count(training):
    """Returns the index of this process and the number that share the data, as ints.

    In evaluation each torch process reads all data: with shards of different sizes,
    some processes would wait for the others.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    if keras.backend.backend() == "torch" and training:
        return index_and_count()
    return 0, 1


def is_main_process() -> bool:
    """Returns whether this process should print and write files."""
    return process_index_and_count(training=True)[0] == 0


def verbosity(verbose):
    """Returns `verbose` in the main process, and 0 in others, which print nothing."""
    return verbose if is_main_process() else 0


def batch_is_split(training):
    """Returns whether several replicas have different rows of one batch."""
    return num_replicas() > 1 and (training or keras.backend.backend() != "torch")


def parts_of_batch():
    """Returns the number of parts that a distribution of JAX splits a batch into."""
    distribution = keras.distribution.distribution()
    known = keras.distribution.DataParallel, keras.distribution.ModelParallel
    if keras.backend.backend() != "jax" or not isinstance(distribution, known):
        return 1
    return distribution.num_model_replicas


def all_gather(x):
    """Gathers the rows of all replicas, in the order of replicas.

    Gradients flow back to the replica that a row came from.

    Args:
        x: `(rows, ...)` tensor, of the same shape on every replica.

    Returns:
        `(replicas * rows, ...)` tensor.
    """
    if num_replicas() == 1:
        return x
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        rows = None if x.shape[0] is None else num_replicas() * x.shape[0]
        gathered = tensorflow_replica().all_gather(x, axis=0)
        return tf.ensure_shape(gathered, (rows, *x.shape[1:]))
    return torch_data_parallel.Gather.apply(x)


def local_rows(x):
    """Returns this replica's rows of the global batch."""
    replicas = num_replicas()
    if replicas == 1:
        return x
    rows = x.shape[0] // replicas
    start = [replica_index() * rows] + [0] * (len(x.shape) - 1)
    return ops.slice(x, start, (rows, *x.shape[1:]))


def local_loss(loss):
    """Adjusts a replica's loss so that gradients and logs match the batch.

    On TensorFlow, Keras sums the losses of replicas, and averages the values that it
    reports. On torch, gradients are averaged in this package, and reported values are
    not.
    """
    replicas = num_replicas()
    if replicas == 1:
        return loss
    if keras.backend.backend() == "tensorflow":
        return loss / replicas
    return loss + (replica_mean(loss) - loss).detach()


def replica_mean(x):
    """Averages over all replicas where Keras's metrics see one replica only."""
    if keras.backend.backend() != "torch" or num_replicas() == 1:
        return x
    return ops.mean(all_gather(ops.stop_gradient(x)[None]), axis=0)


def metric_rows(x):
    """Gathers rows for a metric where Keras's metrics see one replica only."""
    if x is None or keras.backend.backend() != "torch":
        return x
    return all_gather(ops.stop_gradient(x))


def tensorflow_replica():
    """Returns the context of this replica if there are several, or `None`."""
    import tensorflow as tf

    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    context = tf.distribute.get_replica_context()
    return context if context.num_replicas_in_sync > 1 else None


def take_rows(values, indices):
    """Gathers rows of each sample in a batch, by indices for each sample.

    It equals `ops.take_along_axis(values, indices[..., None], axis=1)`. With that,
    TensorFlow and torch would read one number for each index and column. Here they read
    whole rows, and add whole rows in the gradient. JAX already reads rows, and keeps
    them on the device that holds their part of the batch.

    Args:
        values: `(batch, N, ...)` tensor.
        indices: `(batch, K)` int tensor, from 0 to N - 1.

    Returns:
        `(batch, K, ...)` tensor.
    """
    if keras.backend.backend() == "jax":
        for axis in range(2, len(values.shape)):
            indices = ops.expand_dims(indices, axis)
        return ops.take_along_axis(values, indices, axis=1)
    shape, num_indices = values.shape[1:], indices.shape[1]
    first = ops.arange(ops.shape(indices)[0], dtype="int32")[:, None] * shape[0]
    rows = ops.reshape(ops.cast(indices, "int32") + first, (-1,))
    taken = ops.take(ops.reshape(values, (-1, *shape[1:])), rows, axis=0)
    return ops.reshape(taken, (-1, num_indices, *shape[1:]))
