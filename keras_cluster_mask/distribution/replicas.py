"""Replicas of one model that train together, each with its rows of the batch.

JAX sees the global batch whatever the number of devices, so there is one replica there;
TensorFlow and torch run the same step on every replica.
"""

import functools

import keras
from keras import ops


def num_replicas() -> int:
    """How many replicas train together, each with its rows of the batch."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        context = tensorflow_replica()
        return 1 if context is None else context.num_replicas_in_sync
    if backend == "torch" and torch_distributed() is not None:
        return torch_distributed().get_world_size()
    return 1


def replica_index():
    """The index of this replica."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        context = tensorflow_replica()
        return 0 if context is None else context.replica_id_in_sync_group
    if backend == "torch" and torch_distributed() is not None:
        return torch_distributed().get_rank()
    return 0


def batch_is_split(training):
    """Whether several replicas have different rows of one batch."""
    alone = keras.backend.backend() == "torch" and not training
    return num_replicas() > 1 and not alone


def rows_per_device(rows):
    """The number of rows per device, of `rows` rows in a step.

    On JAX a step sees the rows of all devices.
    """
    distribution = keras.distribution.distribution()
    known = keras.distribution.DataParallel, keras.distribution.ModelParallel
    if keras.backend.backend() != "jax" or not isinstance(distribution, known):
        return rows
    return -(-rows // distribution.num_model_replicas)


def all_gather(x):
    """The rows of all replicas, in their order, from those of this one.

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
    return _torch_gather()(x)


def local_rows(x):
    """The rows of this replica, from those of the global batch."""
    replicas = num_replicas()
    if replicas == 1:
        return x
    rows = x.shape[0] // replicas
    start = [replica_index() * rows] + [0] * (len(x.shape) - 1)
    return ops.slice(x, start, (rows, *x.shape[1:]))


def local_loss(loss):
    """A replica's loss, whose gradients and reported value are those of the batch.

    Keras expects replicas' losses to add up on TensorFlow, where it averages what it
    reports; on torch gradients are averaged here, and what is reported is left alone.
    """
    replicas = num_replicas()
    if replicas == 1:
        return loss
    if keras.backend.backend() == "tensorflow":
        return loss / replicas
    return loss + (replica_mean(loss) - loss).detach()


def replica_mean(x):
    """The mean over all replicas, where Keras's metrics see one replica alone."""
    if keras.backend.backend() != "torch" or num_replicas() == 1:
        return x
    return ops.mean(all_gather(ops.stop_gradient(x)[None]), axis=0)


def metric_rows(x):
    """The rows that a metric must see: all where Keras's see one replica alone."""
    if x is None or keras.backend.backend() != "torch":
        return x
    return all_gather(ops.stop_gradient(x))


def all_reduce_mean(variables):
    """Sets float variables to their mean over all replicas.

    Only torch needs it: TensorFlow aggregates variables when they are assigned.
    """
    if keras.backend.backend() == "torch" and num_replicas() > 1:
        for variable in variables:
            torch_distributed().all_reduce(variable.value.data)
            variable.value.data /= num_replicas()


def assign_equal(variable, value):
    """Assigns a value that every replica has computed, the same on each.

    TensorFlow refuses it where a variable has no rule of how to aggregate the values of
    replicas, as the weights of Keras's layers have none.
    """
    tensorflow = keras.backend.backend() == "tensorflow"
    replica = tensorflow_replica() if tensorflow else None
    if replica is None:
        variable.assign(value)
        return

    def assign(strategy, value):
        update = strategy.extended.update
        update(variable.value, lambda v, x: v.assign(x), args=(value,))

    replica.merge_call(assign, args=(value,))


def tensorflow_replica():
    """The context of a replica of several, or `None`."""
    import tensorflow as tf

    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    context = tf.distribute.get_replica_context()
    return context if context.num_replicas_in_sync > 1 else None


@functools.cache
def _torch_gather():
    """An `all_gather` with gradients: torch deprecates its own, without a successor."""
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            parts = [torch.empty_like(x) for _ in range(num_replicas())]
            torch.distributed.all_gather(parts, x.contiguous())
            return torch.cat(parts)

        @staticmethod
        def backward(context, gradient):
            gradient = gradient.contiguous()
            torch.distributed.all_reduce(gradient)
            return local_rows(gradient)

    return Gather.apply


def torch_distributed():
    """`torch.distributed` if processes train together, or `None`."""
    import torch

    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed if ready else None
