"""Options of the Keras optimizer of a `ContrastiveModel`: weight decay, loss scaling.

`distribution.gradients.wrap_optimizer` replaces methods of an optimizer.
"""

import re

import keras
from keras import ops

from keras_cluster_mask.distribution import gradients
from keras_cluster_mask.distribution.backends import steps_are_stateless
from keras_cluster_mask.training.layers import all_layers, saved_weights


def configure(optimizer, model, decay_vectors):
    """Applies the options of `ContrastiveModel.compile` to an optimizer.

    Args:
        optimizer: The compiled optimizer of a model.
        model: The `ContrastiveModel`.
        decay_vectors: Boolean.
    """
    inner, parts = inner_optimizer(optimizer), optimizer_parts(optimizer)
    if not parts:
        raise ValueError(
            "`optimizer` must be a `MultiOptimizer` of a `keras.optimizers."
            "OptimizerMap`, which lists its optimizers. Received: a `MultiOptimizer` "
            "of a function"
        )
    check_built(optimizer, model.trainable_variables)
    check_paths(inner, model)
    for part in parts:
        if part.weight_decay:
            set_weight_decay(part, model, decay_vectors)
    gradients.wrap_optimizer(optimizer, inner, parts)


def check_built(optimizer, variables):
    """Raises an error for an optimizer that was built for other weights.

    Frozen weights may remain in it, except in stateless steps, in averages and in a
    `MultiOptimizer`, where Keras compares the lengths of lists.
    """
    own, parts = inner_optimizer(optimizer), optimizer_parts(optimizer)
    known, given = _known_weights(optimizer), {id(v) for v in variables}
    is_strict = steps_are_stateless() or own not in parts
    is_strict |= any(x.use_ema for x in parts)
    if own.built and (given - known or (is_strict and known - given)):
        raise ValueError(
            "`optimizer` must be new, or built for the weights that this model trains: "
            "after weights are frozen or unfrozen, compile the model with a new "
            f"optimizer. Received: optimizer={own.name}, built for {len(known)} "
            f"weights, of which the model trains {len(known & given)}, and "
            f"{len(given - known)} others"
        )


def check_paths(optimizer, model):
    """Raises an error for a key of an `OptimizerMap` that matches no weight.

    keras_hub names the layers of some encoders after the encoder, if it has a name, as
    each one that is loaded has. So the paths of weights may be others in a loaded model
    than in the one that was saved.
    """
    # Private: Keras has no other way to it. A test fails if a version lacks it.
    rates = getattr(optimizer, "_optimizer_map", None)
    is_by_path = type(rates) is keras.optimizers.OptimizerMap
    if not is_by_path or not all(x.built for x in all_layers(model)):
        return
    paths = {v.path for v in model.weights}
    for key in rates.keys() - paths:
        if not any(re.fullmatch(key, path) for path in paths):
            raise ValueError(
                "Each key of an `OptimizerMap` must be the path of a weight, or a "
                "pattern that matches whole paths. If a saved model was compiled with "
                "other paths, load it with `compile=False`, and compile the loaded "
                "model. To keep its paths, give an encoder a `name`. Received: "
                f"{key[:100]!r}"
            )


def build(model):
    """Creates the optimizer's variables, once the model's weights exist."""
    if model.built and not model.optimizer.built:
        # The model may be trained outside of the scope in which it was made.
        with gradients.strategy_scope(model):
            model.optimizer.build(model.trainable_variables)


def start_averages(optimizer):
    """Starts the averages of weights, of `use_ema=True`, at the weights.

    Keras starts them at zeros, and would assign these to the weights at the end of a
    `fit` in which loss scaling skipped all steps. The first step that is applied starts
    averages too.
    """
    for part in optimizer_parts(optimizer):
        if part.built and part.use_ema and not int(part.iterations):
            # Private, but Keras's `SwapEMAWeights` has no other way to them either.
            for average, weight in zip(
                part._model_variables_moving_average, part._trainable_variables
            ):
                if average is not None:
                    # Steps of JAX overwrite weights and averages in-place.
                    average.assign(ops.copy(weight))


def fits_when_reloaded(optimizer, model) -> bool:
    """Returns whether a file of a model can hold its optimizer.

    Keras creates the optimizer of a loaded model for the weights that it trains, and
    drops the saved state, with only a warning, if it belongs to other weights. The rate
    and the decay of the optimizer were chosen for the other weights, too.
    """
    trained = {id(v) for v in saved_weights(model) if v.trainable}
    built = inner_optimizer(optimizer).built
    return not built or trained == _known_weights(optimizer)


def _known_weights(optimizer):
    parts = optimizer_parts(optimizer)
    return {id(v) for part in parts for v in part._trainable_variables}


def with_loss_scaling(optimizer, layers):
    """Adds loss scaling to an optimizer if a layer computes in float16.

    Keras checks only the model's own dtype policy, but each tower has its own.
    """
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if is_scaled or all(layer.compute_dtype != "float16" for layer in layers):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


def inner_optimizer(optimizer):
    """Returns the optimizer that updates weights, without its `LossScaleOptimizer`."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimizer_parts(optimizer):
    """Lists the optimizers that update weights: one, or all in a `MultiOptimizer`."""
    own = inner_optimizer(optimizer)
    return getattr(own, "optimizers", [own])


def learning_rates(model) -> list[float | None]:
    """Returns the learning rate of each optimizer, or `None` for a schedule."""
    rates = [part.learning_rate for part in optimizer_parts(model.optimizer)]
    return [
        float(ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None
        for rate in rates
    ]


# === Weight decay ===


def set_weight_decay(optimizer, model, decay_vectors):
    """Excludes biases and other vectors of a model from weight decay, or none.

    Weights that the user excluded stay excluded.

    Args:
        optimizer: A Keras optimizer with weight decay.
        model: The `ContrastiveModel`.
        decay_vectors: Boolean.
    """
    if not decay_vectors and not all(x.built for x in all_layers(model)):
        raise ValueError(
            "A model must be built before it is compiled with weight decay, because "
            "its vectors are excluded from the decay: call it on a batch first, "
            "`model(batch)`, or pass `decay_vectors=True`. Received: a layer that is "
            "not built"
        )
    # From Keras 3.16 on, `_use_weight_decay` raises an error until the optimizer is
    # built.
    excludes = getattr(
        optimizer,
        "_is_excluded_from_weight_decay",
        lambda v: not optimizer._use_weight_decay(v),
    )
    decaying = [v for v in model.weights if not excludes(v)]
    if any(map(is_vector, decaying)) == bool(decay_vectors):
        return
    if decay_vectors or optimizer.built:
        raise ValueError(
            "`optimizer` must be new if `decay_vectors` changes. Received: "
            f"decay_vectors={decay_vectors}, optimizer={optimizer.name}"
        )
    # Include the user's weights, because Keras replaces the list.
    spared = [v for v in model.weights if is_vector(v) or excludes(v)]
    optimizer.exclude_from_weight_decay(spared)


def is_vector(variable) -> bool:
    """Returns whether a weight is a bias, a scalar or a vector.

    Leading axes of size 1 are ignored.
    """
    shape = [*variable.shape]
    while shape[:1] == [1]:
        shape = shape[1:]
    return len(shape) < 2 or "bias" in variable.name
