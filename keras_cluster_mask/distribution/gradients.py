"""Gradients of the global batch, and the checks of devices before `fit`."""

import contextlib
import itertools

import keras
from keras import tree

from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.distribution.replicas import (
    num_replicas,
    tensorflow_replica,
    torch_distributed,
)


def prepare_replicas(model) -> None:
    """Gives all replicas the same weights before the first step of a `fit`.

    Raises:
        ValueError: If Keras's `fit` does not support the strategy or an option of
            `compile` on several devices, if a part of the model was not made in the
            scope of the strategy, or if the torch processes train different weights.
    """
    if keras.backend.backend() == "tensorflow":
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
        outside = []
        if strategy.num_replicas_in_sync > 1:
            # Every replica would update a variable made outside of the scope in each
            # step.
            outside = [
                variable.path
                for variable in model.variables
                if not strategy.extended.variable_created_in_scope(variable.value)
            ]
            for name, value in (
                ("steps_per_execution", model.steps_per_execution),
                (
                    "gradient_accumulation_steps",
                    getattr(model.optimizer, "gradient_accumulation_steps", None) or 1,
                ),
            ):
                if value > 1:
                    raise ValueError(
                        f"`{name}` must be 1 on several devices of TensorFlow, where "
                        f"Keras does not support more. Received: {name}={value}"
                    )
        if outside:
            raise ValueError(
                "All parts of a model, its masking too, must be made in the scope of "
                f"the strategy. Received: {outside[:3]}, {len(outside)} variables made "
                f"outside of the scope of {type(strategy).__name__}"
            )
    elif keras.backend.backend() == "torch" and num_replicas() > 1:
        trained = all_gather_object(
            # Not by name, since Keras numbers the layers that a process has made.
            [(tuple(v.shape), str(v.dtype)) for v in model.trainable_weights]
        )
        if any(weights != trained[0] for weights in trained):
            columns = itertools.zip_longest(*trained)
            first = next(x for x in columns if len({*x}) > 1)
            raise ValueError(
                "All processes must train the same weights: make the same model, and "
                "freeze the same layers, in each. Received: numbers of trainable "
                f"weights {[*map(len, trained)]} by process; the first that differ "
                f"are {[*first]}"
            )
        for variable in [*model.variables, *model.optimizer.variables]:
            torch_distributed().broadcast(variable.value.data, src=0)


def strategy_replicas(model) -> int:
    """Returns the replicas of a model's TensorFlow strategy; 1 on other backends."""
    if keras.backend.backend() != "tensorflow":
        return 1
    return model.distribute_strategy.num_replicas_in_sync


def must_reduce_gradients() -> bool:
    """Returns whether Keras's own gradients differ from those of the global batch.

    On TensorFlow, Keras clips each replica's gradients before it sums them. On torch,
    it does not reduce them.
    """
    return keras.backend.backend() == "tensorflow" or num_replicas() > 1


def around_step(model, data):
    """Returns the context in which a backend must run a training step.

    TensorFlow must wait for the data. On torch, old gradients must be removed: Keras
    finds weights by their paths, and misses those that share theirs with others, such
    as the weights of a teacher or of two towers without names. With several torch
    processes, gradients are reduced as they are found; `reduce_gradients` waits for the
    rest.
    """
    # One context, since torch cannot compile two around a step.
    if keras.backend.backend() == "tensorflow":
        return _wait_for(data)
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    for weight in model.trainable_weights:
        weight.value.grad = None
    if num_replicas() == 1:
        return contextlib.nullcontext()
    return model.gradient_buckets.filled([v.value for v in model.trainable_weights])


def reduce_gradients(model, gradients: list, variables: list) -> list:
    """Computes the gradients of the global batch from those of this replica.

    Args:
        model: The model that trains.
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
    return model.gradient_buckets.reduce(gradients, [v.value for v in variables])


def apply_method() -> str:
    """Returns the name of the optimizer method that Keras's training step calls."""
    return "stateless_apply" if keras.backend.backend() == "jax" else "apply"


def check_batch_size(model, batch_size: int | None, pairs: int | None = None) -> None:
    """Raises an error if the replicas cannot share batches of this size.

    Args:
        model: A compiled model.
        batch_size: Integer or `None`, the batch size of this process.
        pairs: Integer or `None`, the number of pairs in this process's arrays.
    """
    if keras.backend.backend() == "torch":
        sizes = all_gather_object((batch_size, pairs))
        if len({*sizes}) > 1:
            raise ValueError(
                "All processes must train on batches of the same size and, if on "
                "arrays, on equally many pairs. Received: (batch_size, pairs) "
                f"{sizes} by process"
            )
    replicas = strategy_replicas(model)
    if replicas > 1 and (batch_size is None or batch_size % replicas):
        raise ValueError(
            "The number of replicas must divide the batch size, which must be known: "
            "use a dataset with full batches, `dataset.batch(batch_size, "
            f"drop_remainder=True)`. Received: batch_size={batch_size}, {replicas} "
            "replicas"
        )


def _wait_for(data):
    """A context in which operations run only after the data is available.

    When a TensorFlow step reaches the end of a dataset, operations that do not depend
    on the batch would still run, and counters of steps and metrics would advance by
    one.
    """
    import tensorflow as tf

    return tf.control_dependencies([x for x in tree.flatten(data) if x is not None])
