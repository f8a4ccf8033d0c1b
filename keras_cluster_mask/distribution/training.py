"""What `fit` must know about devices before and while it trains."""

import contextlib

import keras
from keras import tree

from keras_cluster_mask.distribution.processes import values_of_all
from keras_cluster_mask.distribution.replicas import (
    num_replicas,
    tensorflow_replica,
    torch_distributed,
)


def prepare(model):
    """Makes a compiled model ready to train on all replicas. Called by `fit`.

    Raises:
        ValueError: For a way of distribution under which Keras's `fit` does not work.
    """
    backend = keras.backend.backend()
    reduce, see = None, model.gradient_norm and model.gradient_norm.see
    if backend == "tensorflow":
        import tensorflow as tf

        strategy = model.distribute_strategy
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "On TensorFlow, training on several machines does not work with Keras "
                "3. Use `tf.distribute.MirroredStrategy` on one machine, or the JAX "
                "backend: `keras.distribution.initialize()`, then `keras.distribution."
                "set_distribution(keras.distribution.DataParallel())`. "
                f"Received: strategy={type(strategy).__name__}"
            )
        # Keras squares what a token gets from its several places before it has added it
        # up: norms, and the second moments of Adam, would come out wrong.
        reduce = _tensorflow_dense
        if strategy.num_replicas_in_sync > 1:
            reduce = _tensorflow_sums
            # They are added up already.
            inner_optimizer(model.optimizer)._all_reduce_sum_gradients = list
    elif backend == "torch" and num_replicas() > 1:
        for variable in [*model.variables, *model.optimizer.variables]:
            torch_distributed().broadcast(variable.value.data, src=0)
        reduce = _torch_means
    _give_global_gradients(model.optimizer, reduce, see)


def check_batch_size(model, batch_size, pairs=None):
    """Raises if the replicas cannot share batches of a size.

    Args:
        model: A compiled model.
        batch_size: Integer or `None`, the rows of this process.
        pairs: Integer or `None`, the number of pairs in this process's arrays.
    """
    if keras.backend.backend() == "torch":
        sizes = values_of_all((batch_size, pairs))
        if len({*sizes}) > 1:
            raise ValueError(
                "All processes must train on batches of the same size and, if on "
                "arrays, on equally many pairs. Received: (batch_size, pairs) "
                f"{sizes} by process"
            )
    if keras.backend.backend() != "tensorflow":
        return
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 and (batch_size is None or batch_size % replicas):
        raise ValueError(
            "The number of replicas must divide the batch size, which must be known: "
            "use a dataset with full batches, `dataset.batch(batch_size, "
            f"drop_remainder=True)`. Received: batch_size={batch_size}, {replicas} "
            "replicas"
        )


def once_there(data):
    """A context in which nothing runs before the data is there.

    In a step of TensorFlow's that finds a dataset at its end, what does not depend on
    the batch would still run: counters of steps and metrics would go on by one.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([x for x in tree.flatten(data) if x is not None])


def inner_optimizer(optimizer):
    """The one that updates weights, where another scales the loss around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _give_global_gradients(optimizer, reduce, see):
    # Before gradients are clipped, which must come out alike on all replicas. Keras
    # lets TensorFlow add up what was clipped on each, and torch nothing at all.
    name = "stateless_apply" if keras.backend.backend() == "jax" else "apply"
    vars(optimizer).pop(name, None)
    apply = getattr(optimizer, name)

    def reduce_and_apply(gradients, *args):
        gradients = list(gradients)
        if reduce:
            reduced = iter(reduce([x for x in gradients if x is not None]))
            gradients = [x if x is None else next(reduced) for x in gradients]
        if see:
            see(gradients)
        return apply(gradients, *args)

    def see_and_apply(variables, gradients, *args):
        with keras.StatelessScope(list(zip(optimizer.variables, variables))):
            see(gradients)
        return apply(variables, gradients, *args)

    if reduce or see:
        stateless = name == "stateless_apply"
        setattr(optimizer, name, see_and_apply if stateless else reduce_and_apply)


def _tensorflow_sums(gradients):
    import tensorflow as tf

    replica, total = tensorflow_replica(), tf.distribute.ReduceOp.SUM
    return replica.all_reduce(total, _tensorflow_dense(gradients))


def _tensorflow_dense(gradients):
    import tensorflow as tf

    return [tf.convert_to_tensor(x) for x in gradients]


def _torch_means(gradients):
    reduce = torch_distributed().all_reduce
    for work in [reduce(x, async_op=True) for x in gradients]:
        work.wait()
    return [x / num_replicas() for x in gradients]
