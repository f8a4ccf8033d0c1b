"""Gradients of the global batch, and the checks of devices before `fit`."""

import contextlib
import functools
import types

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
    from keras_cluster_mask.distribution import torch_data_parallel, torch_updates


def wrap_optimizer(optimizer, inner, parts) -> None:
    """Replaces the methods of an optimizer that must work differently, at `compile`.

    Nothing else in the package replaces methods of an optimizer. Keras has no hooks for
    what the new methods do:

    - Before anything else, `apply` reduces the gradients over all replicas, so that all
      of them clip alike. Keras clips each replica's gradients before it sums them on
      TensorFlow, and does not reduce them on torch.
    - On TensorFlow, Keras does not sum the gradients a second time.
    - On torch, Keras's optimizers clip and update in-place (`torch_updates.py`).
    - An optimizer within another one has no state of its own in a file. Keras would
      save the state twice: with the whole, and separately.

    The methods are bound to one optimizer and call those of its class, so an optimizer
    can be compiled any number of times, in any place. Some of the methods are private.
    A test fails if a version of Keras does not call one of them.

    Args:
        optimizer: The compiled optimizer of a model.
        inner: The same, or the optimizer in a `LossScaleOptimizer`.
        parts: List of the optimizers that update weights, several in a
            `MultiOptimizer`.
    """
    backend = keras.backend.backend()
    if inner is not optimizer and inner not in parts:
        # Keras's callbacks change the learning rate of each of these.
        optimizer.optimizers = parts
    for each in {optimizer, inner, *parts}:
        methods = {}
        if each is not optimizer:
            methods |= {"save_own_variables": _skip, "load_own_variables": _skip}
        elif backend == "tensorflow" or num_replicas() > 1:
            methods["apply"] = _reduce_and_apply
        if each in parts and backend == "tensorflow":
            methods["_all_reduce_sum_gradients"] = _reduced_before
        elif each in parts and backend == "torch":
            methods |= torch_updates.methods(each)
        # It may have been wrapped before, in another place.
        wrapped = [k for k, x in vars(each).items() if isinstance(x, types.MethodType)]
        for name in wrapped:
            delattr(each, name)
        for name, method in methods.items():
            setattr(each, name, types.MethodType(method, each))


def _skip(optimizer, store):
    """Saves or loads no variable."""


def _reduce_and_apply(optimizer, gradients, trainable_variables=None):
    given = [x for x in gradients if x is not None]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Make gradients dense. In sparse ones Keras squares the contributions of a
        # repeated token before it sums them, so norms and Adam's second moments would
        # be wrong.
        given = [tf.convert_to_tensor(x) for x in given]
        replica = tensorflow_replica()
        if replica is not None:
            given = replica.all_reduce(tf.distribute.ReduceOp.SUM, given)
    else:
        given = torch_data_parallel.all_reduce_mean(given)
    reduced = iter(given)
    gradients = [x if x is None else next(reduced) for x in gradients]
    type(optimizer).apply(optimizer, gradients, trainable_variables)


def _reduced_before(optimizer, gradients_and_variables):
    return list(gradients_and_variables)


def prepare_replicas(model, parts) -> None:
    """Gives all replicas the same weights before the first step of a `fit`.

    Args:
        model: A compiled `keras.Model`.
        parts: List of the optimizers that update its weights.

    Raises:
        ValueError: If Keras's `fit` does not support an option of `compile` on several
            devices, if a part of the model was not made in the scope of the strategy,
            if the torch processes train different weights, or if the model was compiled
            before they were joined.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow" and model.distribute_strategy.num_replicas_in_sync > 1:
        _check_strategy(model, parts)
    elif backend == "torch" and num_replicas() > 1:
        if "apply" not in vars(model.optimizer):
            raise ValueError(
                "The model must be compiled after `kcm.distribution.initialize()`: "
                "call `initialize` at the start of the program. Received: a model that "
                "was compiled before"
            )
        torch_data_parallel.check_and_broadcast(model)


def _check_strategy(model, parts):
    strategy = model.distribute_strategy
    accumulated = max(each.gradient_accumulation_steps or 1 for each in parts)
    for name, value in (
        ("steps_per_execution", model.steps_per_execution),
        ("gradient_accumulation_steps", accumulated),
    ):
        if value > 1:
            raise ValueError(
                f"`{name}` must be 1 on several TensorFlow devices, because Keras "
                f"supports no other value there. Received: {name}={value}"
            )
    # Every replica would update a variable made outside of the scope in each step.
    outside = [
        variable.path
        for variable in model.variables
        if not strategy.extended.variable_created_in_scope(variable.value)
    ]
    if outside:
        raise ValueError(
            "All parts of a model, including its masking, must be created in the scope "
            f"of the strategy. Received: {outside[:3]}, {len(outside)} variables "
            f"created outside the scope of {type(strategy).__name__}"
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
            "The batch size must be known and divisible by the number of replicas: use "
            "a dataset with full batches, `dataset.batch(batch_size, "
            f"drop_remainder=True)`. Received: batch_size={batch_size}, {replicas} "
            "replicas"
        )
