"""Extends the Keras optimizer of a `ContrastiveModel`.

The optimizer decays only matrices, applies the gradients of the global batch, records
their norm, and updates weights in-place on torch. Keras has no hooks for this, so
methods of one optimizer instance are replaced, some of them private (`PRIVATE`). A test
fails if a version of Keras lacks them.
"""

import keras

from keras_cluster_mask.distribution import gradients as distribution
from keras_cluster_mask.training.tower_optimizer import TowerOptimizer

# Methods of `keras.optimizers.Optimizer` that are replaced on an instance or called.
PRIVATE = (
    "_backend_update_step",
    "_clip_gradients",
    "_get_variable_index",
    "_use_weight_decay",
)
REPLACED = "build", "_backend_update_step", "_clip_gradients"


def configure(optimizer, model, decay_vectors):
    """Applies the options of `ContrastiveModel.compile` to an optimizer.

    Args:
        optimizer: The compiled optimizer of a model.
        model: The `ContrastiveModel`.
        decay_vectors: Boolean.
    """
    parts = optimizer_parts(optimizer)
    if not parts and not decay_vectors:
        raise ValueError(
            "`optimizer` must be a `MultiOptimizer` of a `keras.optimizers."
            "OptimizerMap`, which lists its optimizers, so that they do not decay "
            "biases and vectors; or pass `decay_vectors=True`. Received: "
            "a `MultiOptimizer` of a function"
        )
    own = inner_optimizer(optimizer)
    if isinstance(own, TowerOptimizer):
        own.towers.bind({"image": model.image_encoder, "text": model.text_encoder})
    for each in parts:
        # An optimizer may be compiled again, with other options.
        for name in REPLACED:
            vars(each).pop(name, None)
        if not decay_vectors:
            exclude_vectors_from_decay(each, model.trainable_variables)
        distribution.update_in_place(each)


def with_loss_scaling(optimizer, layers):
    """Adds loss scaling to an optimizer if a layer computes in float16.

    Keras checks only the model's own dtype policy, but each tower has its own.
    """
    if optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    if all(layer.compute_dtype != "float16" for layer in layers):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


def inner_optimizer(optimizer):
    """Returns the optimizer that updates weights, without its `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimizer_parts(optimizer):
    """Lists the optimizers that update weights: one, or those of a `MultiOptimizer`."""
    own = inner_optimizer(optimizer)
    return getattr(own, "optimizers", [own])


# === Gradients of the global batch ===


def use_global_gradients(optimizer, model, gradient_norm):
    """Makes an optimizer apply and record the gradients of the global batch.

    Gradients are reduced before they are clipped, so that all replicas clip alike.

    Args:
        optimizer: The compiled optimizer of a model.
        model: The `ContrastiveModel`.
        gradient_norm: `GradientNorm` or `None`.
    """
    # The method that Keras's training step calls.
    name = distribution.apply_method()
    vars(optimizer).pop(name, None)
    if distribution.strategy_replicas(model) > 1:
        # They are already summed, so Keras must not sum them again.
        for each in (inner_optimizer(optimizer), *optimizer_parts(optimizer)):
            each._all_reduce_sum_gradients = list
    if gradient_norm is None and not distribution.must_reduce_gradients():
        return
    apply = getattr(optimizer, name)

    def reduce_and_apply(gradients, variables=None):
        reduced = model.trainable_weights if variables is None else variables
        gradients = distribution.reduce_gradients(list(gradients), reduced)
        if gradient_norm is not None:
            gradient_norm.record(gradients)
        return apply(gradients, variables)

    def record_and_apply(optimizer_variables, gradients, variables):
        with keras.StatelessScope(zip(optimizer.variables, optimizer_variables)):
            gradient_norm.record(gradients)
        return apply(optimizer_variables, gradients, variables)

    is_stateless = name == "stateless_apply"
    setattr(optimizer, name, record_and_apply if is_stateless else reduce_and_apply)


# === Weight decay ===


def exclude_vectors_from_decay(optimizer, variables):
    """Excludes biases and vectors from weight decay when the optimizer is built.

    Args:
        optimizer: A Keras optimizer.
        variables: The variables that the optimizer was built with, if it was built.
    """
    if optimizer.built:
        decaying = [v for v in variables if optimizer._use_weight_decay(v)]
        if optimizer.weight_decay and any(map(is_vector, decaying)):
            raise ValueError(
                "`decay_vectors=False` needs an optimizer that has not been built: "
                "pass a new one, or `decay_vectors=True`. "
                f"Received: optimizer={optimizer.name}, built to decay vectors"
            )
        return
    build = optimizer.build

    def exclude_and_build(variables):
        # Includes the variables that the user excluded, since Keras would replace that
        # list.
        optimizer.exclude_from_weight_decay(
            [v for v in variables if is_vector(v) or not optimizer._use_weight_decay(v)]
        )
        build(variables)

    optimizer.build = exclude_and_build


def is_vector(variable) -> bool:
    """Returns whether a weight is a bias, a scalar or a vector.

    Leading axes of size 1 are ignored.
    """
    shape = [*variable.shape]
    while shape[:1] == [1]:
        shape = shape[1:]
    return len(shape) < 2 or "bias" in variable.name
