"""Options of the Keras optimizer of a `ContrastiveModel`: weight decay, loss scaling.

Keras has no hooks for what `ContrastiveModel.compile` adds to an optimizer, so methods
of one instance are replaced, here and by `distribution`, some of them private
(`PRIVATE`). A test fails if a version of Keras lacks them.
"""

import re

import keras
from keras import ops

from keras_cluster_mask.distribution import gradients as distribution
from keras_cluster_mask.training.layers import all_layers, saved_weights

# Methods of `keras.optimizers.Optimizer` that are replaced on an instance or called.
PRIVATE = (
    "_apply_weight_decay",
    "_backend_update_step",
    "_clip_gradients",
    "_get_variable_index",
    "_use_weight_decay",
)
REPLACED = (
    "_apply_weight_decay",
    "_backend_update_step",
    "_clip_gradients",
    "load_own_variables",
    "save_own_variables",
)


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
    check_built(optimizer, model.trainable_variables)
    check_paths(own, model)
    if own is not optimizer and own not in parts:
        # Keras's callbacks change the learning rate of each of these.
        optimizer.optimizers = parts
    for each in {own, *parts}:
        # An optimizer may be compiled again, with other options.
        for name in REPLACED:
            vars(each).pop(name, None)
        distribution.update_in_place(each)
        if each is not optimizer:
            # Keras saves the variables of a part twice: with the whole, and alone.
            each.save_own_variables = each.load_own_variables = _without_variables
    for part in parts:
        if not decay_vectors:
            exclude_vectors_from_decay(part, model)
        elif part.weight_decay and getattr(part, "spares_vectors", False):
            raise ValueError(
                "`decay_vectors=True` needs a new optimizer, since vectors were "
                "excluded from the weight decay of this one when it was compiled "
                f"before. Received: optimizer={part.name}"
            )


def _without_variables(store):
    """Saves or loads no variable."""


def check_built(optimizer, variables):
    """Raises an error for an optimizer that was built for other weights.

    Frozen weights may remain in it, except on JAX and in averages, where Keras compares
    the lengths of lists.
    """
    own, parts = inner_optimizer(optimizer), optimizer_parts(optimizer)
    known, given = _known_weights(optimizer), {id(v) for v in variables}
    is_strict = keras.backend.backend() == "jax" or any(x.use_ema for x in parts)
    if own.built and (given - known or (is_strict and known - given)):
        raise ValueError(
            "`optimizer` must be new, or built for the weights that this model trains: "
            "after weights are frozen or unfrozen, compile the model with a new one. "
            f"Received: optimizer={own.name}, built for {len(known)} weights, of which "
            f"the model trains {len(known & given)}, and {len(given - known)} others"
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
                "pattern of whole paths. If a file of a model was made with others, "
                "load it with `compile=False`, and compile the loaded model; give an "
                f"encoder a `name` to keep its paths. Received: {key[:100]!r}"
            )


def build(model):
    """Creates the optimizer's variables, once the model's weights exist."""
    if model.built and not model.optimizer.built:
        # The model may be trained outside of the scope in which it was made.
        with distribution.strategy_scope(model):
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


def exclude_vectors_from_decay(optimizer, model):
    """Excludes biases and other vectors of a model from weight decay.

    Weights that the user excluded stay excluded.

    Args:
        optimizer: A Keras optimizer.
        model: The `ContrastiveModel`.
    """
    decays = optimizer._use_weight_decay
    if optimizer.built:
        decaying = filter(decays, optimizer._trainable_variables)
        if optimizer.weight_decay and any(map(is_vector, decaying)):
            raise ValueError(
                "`decay_vectors=False` needs an optimizer that has not been built: "
                "pass a new one, or `decay_vectors=True`. "
                f"Received: optimizer={optimizer.name}, built to decay vectors"
            )
        return
    if optimizer.weight_decay and not all(x.built for x in all_layers(model)):
        raise ValueError(
            "A model must be built before it is compiled with weight decay, which "
            "excludes its vectors: call it on a batch first, `model(batch)`, or pass "
            "`decay_vectors=True`. Received: a layer that is not built"
        )
    # Include the user's weights, because Keras replaces the list. From Keras 3.16 on,
    # `_use_weight_decay` raises an error until the optimizer is built.
    excludes = getattr(
        optimizer, "_is_excluded_from_weight_decay", lambda v: not decays(v)
    )
    spared = [v for v in model.weights if is_vector(v) or excludes(v)]
    optimizer.exclude_from_weight_decay(spared)
    optimizer.spares_vectors = True


def is_vector(variable) -> bool:
    """Returns whether a weight is a bias, a scalar or a vector.

    Leading axes of size 1 are ignored.
    """
    shape = [*variable.shape]
    while shape[:1] == [1]:
        shape = shape[1:]
    return len(shape) < 2 or "bias" in variable.name
