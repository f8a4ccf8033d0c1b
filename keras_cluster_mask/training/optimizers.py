"""Extends the Keras optimizer of a `ContrastiveModel`.

The optimizer decays only matrices, applies the gradients of the global batch, records
their norm, and updates weights in-place on torch. Keras has no public hook for clipping
and the update within `apply`, so this file replaces methods of one optimizer instance,
some of them private (`PRIVATE`). A test fails if a version of Keras lacks them.
"""

import threading
from functools import partial
from operator import is_

import keras
from keras import ops

from keras_cluster_mask.distribution import gradients as distribution
from keras_cluster_mask.distribution import in_place_updates
from keras_cluster_mask.training.tower_optimizer import TowerOptimizer

# Methods of `keras.optimizers.Optimizer` that are replaced on an instance or called.
PRIVATE = (
    "_backend_update_step",
    "_clip_gradients",
    "_get_variable_index",
    "_use_weight_decay",
)
REPLACED = "build", "_backend_update_step", "_clip_gradients"


def configure(model):
    """Applies the model's `optimizer_options` to its compiled optimizer."""
    optimizer, options = model.optimizer, model.optimizer_options
    logs_norm = options["log_gradient_norm"]
    model.gradient_norm = GradientNorm(optimizer) if logs_norm else None
    if optimizer is None:
        return
    parts = optimizer_parts(optimizer)
    if not parts and not options["decay_vectors"]:
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
        if not options["decay_vectors"]:
            exclude_vectors_from_decay(each, model.trainable_variables)
        if in_place_updates.are_available():
            update_in_place(each, model.gradient_norm)


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


def use_global_gradients(model):
    """Makes the optimizer apply and record the gradients of the global batch.

    Gradients are reduced before they are clipped, so that all replicas clip alike.
    """
    optimizer = model.optimizer
    name = distribution.apply_method()
    vars(optimizer).pop(name, None)
    if distribution.strategy_replicas(model) > 1:
        # They are already summed, so Keras must not sum them again.
        for each in (inner_optimizer(optimizer), *optimizer_parts(optimizer)):
            each._all_reduce_sum_gradients = list
    reduces = distribution.must_reduce_gradients()
    if not reduces and model.gradient_norm is None:
        return
    wrap = _stateless_apply if name == "stateless_apply" else _apply
    setattr(optimizer, name, partial(wrap, getattr(optimizer, name), model))


def _apply(apply, model, gradients, *args):
    variables = args[0] if args else model.trainable_weights
    gradients = distribution.reduce_gradients(model, list(gradients), variables)
    if model.gradient_norm is not None:
        model.gradient_norm.record(gradients)
    return apply(gradients, *args)


def _stateless_apply(apply, model, variables, gradients, *args):
    optimizer = model.optimizer
    with keras.StatelessScope(list(zip(optimizer.variables, variables))):
        model.gradient_norm.record(gradients)
    return apply(variables, gradients, *args)


class GradientNorm:
    """The L2 norm of the gradients of a step, averaged over steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.metric = keras.metrics.Mean(name="gradient_norm")
        # TensorFlow runs the step of each replica in its own thread.
        self._step = threading.local()

    def record(self, gradients):
        """Records the gradients of the global batch before they are applied."""
        gradients = [x for x in gradients if x is not None]
        scale, norm = self.optimizer.scale_loss(1.0), None
        if isinstance(scale, float) and scale == 1.0:
            norm = in_place_updates.global_norm(gradients)
        if norm is None:
            # Unscaled first, since the squares of scaled gradients may overflow.
            unscaled = (ops.cast(x, "float32") / scale for x in gradients)
            norm = ops.sqrt(sum(ops.sum(ops.square(x)) for x in unscaled))
        self._step.norm, self._step.gradients = norm, gradients

    def of(self, gradients):
        """Returns the norm of the recorded gradients, and `None` for other gradients.

        Gradients that are unscaled or accumulated after `record` are other gradients.
        """
        recorded = vars(self._step).get("gradients", ())
        same = len(recorded) == len(gradients) and all(map(is_, recorded, gradients))
        return self._step.norm if same else None

    def update_metric(self):
        """Adds the norm of a training step to the metric."""
        if "norm" not in vars(self._step):
            # No weight is trained.
            return
        # Removed after the step, since these may be symbolic tensors of a traced
        # function.
        norm = vars(self._step).pop("norm")
        del self._step.gradients
        counts = ops.ones_like(norm)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            counts = ops.cast(ops.isfinite(norm), norm.dtype)
        self.metric.update_state(ops.where(counts > 0, norm, 0.0), counts)


# === In-place updates ===


def update_in_place(optimizer, norm=None):
    """Makes global-norm clipping and Adam updates run in-place on torch.

    The results equal Keras's up to rounding, and are stored in Keras's variables.
    Gradients are clipped in-place. The rest of `apply` stays Keras's own: decay,
    accumulation, averages, constraints. Keras also performs the update if a weight is
    not float32, and for optimizers other than Adam and AdamW. Its update of SGD is
    already in-place.

    Args:
        optimizer: A Keras optimizer.
        norm: The `GradientNorm` that records the gradients beforehand, if any. Clipping
            then reuses its norm.
    """
    clip, update = optimizer._clip_gradients, optimizer._backend_update_step

    def clip_gradients(gradients):
        max_norm = optimizer.global_clipnorm or 0.0
        if (
            max_norm > 0
            and not optimizer.clipnorm
            and in_place_updates.clip_by_global_norm(
                gradients, max_norm, norm and norm.of(gradients)
            )
        ):
            return gradients
        return clip(gradients)

    def update_step(gradients, variables, learning_rate):
        indices = [optimizer._get_variable_index(v) for v in variables]
        slots = [optimizer._momentums, optimizer._velocities]
        if optimizer.amsgrad:
            slots.append(optimizer._velocity_hats)
        weights = [v.value for v in variables]
        moments = [[slot[i].value for i in indices] for slot in slots]
        if in_place_updates.can_update(weights, gradients, *moments):
            in_place_updates.adam(optimizer, weights, gradients, moments, learning_rate)
        else:
            update(gradients, variables, learning_rate)

    if type(optimizer)._clip_gradients is keras.optimizers.Optimizer._clip_gradients:
        optimizer._clip_gradients = clip_gradients
    # Subclasses may override the update.
    adams = keras.optimizers.Adam(name="adam"), keras.optimizers.AdamW(name="adamw")
    if type(optimizer) in map(type, adams):
        optimizer._backend_update_step = update_step


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
