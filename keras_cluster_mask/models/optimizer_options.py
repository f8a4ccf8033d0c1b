"""What trainers expect of an optimizer: rates by tower, spared vectors, the norm."""

import math
import threading
from functools import cache, partial

import keras
from keras import ops

from keras_cluster_mask.distribution import inner_optimizer

# Methods of one optimizer that are not its class's.
REPLACED = ("build", "_backend_update_step", "_apply_weight_decay")


class OptimizerOptions:
    """The part of `ContrastiveModel` that tells its optimizer apart from Keras's own.

    It stands before `keras.Model` among the bases of a class with a property
    `towers`: a dictionary of lists of layers by name.
    """

    # A `GradientNorm`, if it is reported.
    gradient_norm = None

    def compile(
        self,
        optimizer="rmsprop",
        *args,
        learning_rate_multipliers=None,
        decay_vectors=False,
        log_gradient_norm=False,
        **kwargs,
    ):
        """Chooses the optimizer and what it does to which weights.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_clip(backbone)
        # A pre-trained image tower learns at a tenth of the rate.
        model.compile(
            keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0),
            learning_rate_multipliers={"image": 0.1},
            log_gradient_norm=True,
        )
        ```

        Args:
            optimizer: A Keras optimizer, or its name. Not a `Nadam` or
                `MultiOptimizer` if there are `learning_rate_multipliers`.
            *args: Arguments of `keras.Model.compile`; the loss is built in.
            learning_rate_multipliers: Dictionary of floats. Factors on the learning
                rate, that of decoupled weight decay as well, by tower: `"image"` and
                `"text"`, each with its projection. All other weights keep the rate.
                To freeze a tower, set `encoder.trainable = False` before compiling.
            decay_vectors: Boolean. Whether weight decay also takes biases and vectors,
                such as the scales of norms, class tokens and the temperature. If not,
                it is matrices that decay, but for those that the optimizer excludes
                already.
            log_gradient_norm: Boolean. Whether `fit` reports `gradient_norm`: the L2
                norm of the gradients of all weights and of the whole batch before they
                are clipped, as the mean over the steps of an epoch. Steps that a
                `LossScaleOptimizer` skips do not count.
            **kwargs: Arguments of `keras.Model.compile`.

        Raises:
            ValueError: For a multiplier of something else than a tower, or an
                optimizer that has already been built to decay vectors.
        """
        multipliers = self._check_multipliers(learning_rate_multipliers or {})
        super().compile(optimizer, *args, **kwargs)
        self._optimizer_options = {
            "learning_rate_multipliers": multipliers,
            "decay_vectors": bool(decay_vectors),
            "log_gradient_norm": bool(log_gradient_norm),
        }
        self.gradient_norm = GradientNorm(self.optimizer) if log_gradient_norm else None
        if self.optimizer is not None:
            own = inner_optimizer(self.optimizer)
            # An optimizer may be compiled again, with other options.
            for name in REPLACED:
                vars(own).pop(name, None)
            if not decay_vectors:
                # A `MultiOptimizer` hands weights on to others.
                for each in getattr(own, "optimizers", [own]):
                    spare_vectors(each, self.trainable_variables)
            if multipliers:
                multiply_learning_rate(own, partial(self._factors, multipliers))

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, **self._optimizer_options} if config else config

    def compile_from_config(self, config):
        # Keras's own is for models that do not override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        own = [] if self.gradient_norm is None else [self.gradient_norm.metric]
        return super().metrics + own

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        trains = self.gradient_norm is not None and self.gradient_norm.update()
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        if not trains:
            # Evaluation has no gradients.
            logs.pop("gradient_norm", None)
        return logs

    def _check_multipliers(self, multipliers):
        for name, factor in multipliers.items():
            if name not in self.towers:
                raise ValueError(
                    "`learning_rate_multipliers` must have towers as keys, of "
                    f"{sorted(self.towers)}. Received: {name!r}"
                )
            if not 0 <= factor < math.inf:
                raise ValueError(
                    "`learning_rate_multipliers` must be finite and not negative. "
                    f"Received: {name!r}: {factor}"
                )
        return {name: float(factor) for name, factor in multipliers.items()}

    def _factors(self, multipliers):
        """The factors of weights other than 1, by the weights' ids."""
        return {
            id(variable): factor
            for name, factor in multipliers.items()
            for layer in self.towers[name]
            for variable in layer.weights
            if factor != 1
        }


class GradientNorm:
    """Takes the norm of gradients in an update, and averages it over steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.metric = keras.metrics.Mean(name="gradient_norm")
        # TensorFlow runs the step of each replica in a thread of its own.
        self._step = threading.local()

    def see(self, gradients):
        """Called with the gradients of the global batch before they are applied."""
        # The scale first, as squares of scaled gradients may overflow.
        scale = self.optimizer.scale_loss(1.0)
        gradients = [ops.cast(x, "float32") / scale for x in gradients if x is not None]
        self._step.norm = ops.sqrt(sum(ops.sum(ops.square(x)) for x in gradients))

    def update(self):
        """Counts the step if it had gradients; returns whether it had."""
        # Kept for no longer than the step, as it may be a value of a traced function.
        norm = vars(self._step).pop("norm", None)
        if norm is None:
            return False
        counts = ops.ones_like(norm)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            counts = ops.cast(ops.isfinite(norm), norm.dtype)
        self.metric.update_state(ops.where(counts > 0, norm, 0.0), counts)
        return True


def spare_vectors(optimizer, variables):
    """Excludes biases and vectors from weight decay, once the optimizer is built.

    Args:
        optimizer: A Keras optimizer.
        variables: The variables that it has been built with, if it has.
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
        # With those of the user, whom Keras would forget.
        optimizer.exclude_from_weight_decay(
            [v for v in variables if is_vector(v) or not optimizer._use_weight_decay(v)]
        )
        build(variables)

    optimizer.build = exclude_and_build


def is_vector(variable):
    """Whether a weight is a bias, a scalar or, leading ones aside, a vector."""
    shape = [*variable.shape]
    while shape[:1] == [1]:
        shape = shape[1:]
    return len(shape) < 2 or "bias" in variable.name


def multiply_learning_rate(optimizer, find_factors):
    """Lets an optimizer update each weight at a learning rate of its own.

    All else it does for all weights at once: it clips, averages and counts as before.

    Args:
        optimizer: A Keras optimizer.
        find_factors: Function without arguments that returns a dictionary of factors
            by the variables' ids. Called when there are weights.
    """
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "`learning_rate_multipliers` do not work with `MultiOptimizer`: give its "
            "optimizers the learning rates. "
            f"Received: optimizer={optimizer.name}"
        )
    if isinstance(optimizer, keras.optimizers.Nadam):
        raise ValueError(
            "`learning_rate_multipliers` do not work with `Nadam`, whose momentum "
            "would move on with every group of weights; use `AdamW`. "
            f"Received: optimizer={optimizer.name}"
        )
    find_factors = cache(find_factors)
    update, decay = optimizer._backend_update_step, optimizer._apply_weight_decay
    learning_rate_now = optimizer._get_current_learning_rate

    def groups(variables):
        indices = {}
        for index, variable in enumerate(variables):
            factor = find_factors().get(id(variable), 1.0)
            indices.setdefault(factor, []).append(index)
        return indices.items()

    def update_step(gradients, variables, learning_rate):
        for factor, indices in groups(variables):
            update(
                [gradients[index] for index in indices],
                [variables[index] for index in indices],
                learning_rate * factor,
            )

    def apply_weight_decay(variables):
        for factor, indices in groups(variables):
            group = [variables[index] for index in indices]
            # torch cannot decay a group of none.
            if any(map(optimizer._use_weight_decay, group)):
                optimizer._get_current_learning_rate = lambda factor=factor: (
                    factor * learning_rate_now()
                )
                decay(group)
        # By the first replica, on TensorFlow, for all.
        vars(optimizer).pop("_get_current_learning_rate", None)

    optimizer._backend_update_step = update_step
    optimizer._apply_weight_decay = apply_weight_decay
