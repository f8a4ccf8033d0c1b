"""Gradients of the global batch, and the checks of devices before `fit`."""

import contextlib
import functools

import keras
from keras import tree

from keras_cluster_mask.distribution.replicas import (
    num_replicas,
    parts_of_batch,
    process_index_and_count,
    replica_mean,
    tensorflow_replica,
)

if keras.backend.backend() == "torch":
    from keras_cluster_mask.distribution.missing_in_keras import (
        data_parallel,
        in_place_updates,
    )


def prepare_replicas(model, optimizers) -> None:
    """Gives all replicas the same weights before the first step of a `fit`.

    Args:
        model: A compiled `keras.Model`.
        optimizers: List of the optimizers that its optimizer consists of.

    Raises:
        ValueError: If Keras's `fit` does not support an option of `compile` on several
            devices, if a part of the model was not made in the scope of the strategy,
            or if the torch processes train different weights.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow" and model.distribute_strategy.num_replicas_in_sync > 1:
        _check_strategy(model, optimizers)
        for each in optimizers:
            # `reduce_gradients` sums the gradients, so Keras must not sum them again.
            each._all_reduce_sum_gradients = list
    elif backend == "torch" and num_replicas() > 1:
        data_parallel.check_and_broadcast(model)


def _check_strategy(model, optimizers):
    strategy = model.distribute_strategy
    accumulated = max(each.gradient_accumulation_steps or 1 for each in optimizers)
    for name, value in (
        ("steps_per_execution", model.steps_per_execution),
        ("gradient_accumulation_steps", accumulated),
    ):
        if value > 1:
            raise ValueError(
                f"`{name}` must be 1 on several devices of TensorFlow, where Keras "
                f"does not support more. Received: {name}={value}"
            )
    # Every replica would update a variable made outside of the scope in each step.
    outside = [
        variable.path
        for variable in model.variables
        if not strategy.extended.variable_created_in_scope(variable.value)
    ]
    if outside:
        raise ValueError(
            "All parts of a model, its masking too, must be made in the scope of "
            f"the strategy. Received: {outside[:3]}, {len(outside)} variables made "
            f"outside of the scope of {type(strategy).__name__}"
        )


def strategy_scope(model):
    """Returns a context in which a model's TensorFlow strategy owns new variables."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


# The entries of a batch with a row for each pair.
PAIRED = "images", "token_ids", "padding_mask", "segment_ids", "sample_weight"


def waits_for_data(train_step):
    """Decorates a training step, so that on TensorFlow it runs after the data arrives.

    The step also learns the number of rows of the entries in `PAIRED`.

    When a TensorFlow step reaches the end of a dataset, operations that do not depend
    on the batch would still run, and counters of steps and metrics would advance by
    one.
    """
    if keras.backend.backend() != "tensorflow":
        return train_step

    @functools.wraps(train_step)
    def wrapped(self, *data):
        import tensorflow as tf

        tensors = [x for x in tree.flatten(data) if x is not None]
        # If one entry of the batches has a free dimension, `tf.distribute` keeps only
        # the number of rows of this entry. Other entries may have no row a pair.
        batch, *_ = keras.utils.unpack_x_y_sample_weight(data[0])
        batched = [batch[k] for k in PAIRED if k in batch]
        batched = [x for x in batched if tf.is_symbolic_tensor(x)]
        rows = {x.shape[0] for x in batched} - {None}
        for x in batched if len(rows) == 1 else ():
            x.set_shape([*rows, *x.shape[1:]])
        with tf.control_dependencies(tensors):
            return train_step(self, *data)

    return wrapped


def over_processes(train_function, model, averaged):
    """Wraps a new train function of Keras as torch needs it.

    Old gradients must be removed: Keras finds weights by their paths, and misses those
    that share theirs with others, such as the weights of two towers without names.

    Args:
        train_function: Keras's train function.
        model: The `keras.Model` that it trains.
        averaged: The variables that each replica updates from its own rows; none for a
            single replica.
    """
    if keras.backend.backend() != "torch":
        return train_function

    @functools.wraps(train_function)
    def wrapped(data):
        # From Keras 3.16 on, the batches of `steps_per_execution` steps; else one.
        for batch in data:
            for weight in model.trainable_weights:
                weight.value.grad = None
            logs = train_function([batch])
            for variable in averaged:
                variable.assign(replica_mean(variable.value))
        return logs

    return wrapped


def update_in_place(optimizer) -> None:
    """Makes an optimizer update in-place on torch, see `in_place_updates`."""
    if keras.backend.backend() == "torch":
        in_place_updates.update_in_place(optimizer)


def apply_global_gradients(model) -> None:
    """Makes the optimizer of a model apply the gradients of the global batch.

    On TensorFlow, Keras clips each replica's gradients before it sums them. On torch,
    it does not reduce them. Here they are reduced first, so that all replicas clip
    alike.

    Args:
        model: A compiled `keras.Model`.
    """
    optimizer = model.optimizer
    vars(optimizer).pop("apply", None)
    apply = optimizer.apply

    def reduce_and_apply(gradients, variables=None):
        reduced = model.trainable_weights if variables is None else variables
        return apply(reduce_gradients(list(gradients), reduced), variables)

    if keras.backend.backend() == "tensorflow" or num_replicas() > 1:
        optimizer.apply = reduce_and_apply


def reduce_gradients(gradients: list, variables: list) -> list:
    """Computes the gradients of the global batch from this replica's gradients.

    Args:
        gradients: List of tensors, `None` for a variable without a gradient.
        variables: List of the variables that the gradients belong to.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Make gradients dense. In sparse ones Keras squares the contributions of a
        # repeated token before it sums them, so norms and Adam's second moments would
        # be wrong.
        given = [tf.convert_to_tensor(x) for x in gradients if x is not None]
        replica = tensorflow_replica()
        if replica is not None:
            given = replica.all_reduce(tf.distribute.ReduceOp.SUM, given)
        reduced = iter(given)
        return [x if x is None else next(reduced) for x in gradients]
    if num_replicas() == 1:
        return gradients
    return data_parallel.reduce_gradients(gradients, [v.value for v in variables])


def check_batch_size(model, batch_size: int | None) -> None:
    """Raises an error if the replicas cannot share batches of this size.

    Args:
        model: A compiled model.
        batch_size: Integer or `None`, the batch size of this process.
    """
    backend, replicas = keras.backend.backend(), 1
    if backend == "tensorflow":
        replicas = model.distribute_strategy.num_replicas_in_sync
    elif backend == "jax":
        replicas = parts_of_batch() // process_index_and_count(training=True)[1]
    is_unknown = backend == "tensorflow" and batch_size is None
    if replicas > 1 and (is_unknown or (batch_size or 0) % replicas):
        raise ValueError(
            "The number of replicas must divide the batch size, which must be known: "
            "use a dataset with full batches, `dataset.batch(batch_size, "
            f"drop_remainder=True)`. Received: batch_size={batch_size}, {replicas} "
            "replicas"
        )
