"""A Keras optimizer with a separate optimizer for each tower."""

import math
from collections.abc import Sequence
from typing import Any, Self

import keras

from keras_cluster_mask.checks import check_range
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class TowerOptimizer(keras.optimizers.MultiOptimizer):
    """Trains each tower of a `ContrastiveModel` with its own optimizer.

    Use it to train pre-trained towers at a lower rate than new weights. Keras's
    callbacks that change a learning rate change the rate of each optimizer.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    optimizer = kcm.TowerOptimizer(
        keras.optimizers.AdamW(1e-3, weight_decay=0.2),
        image=keras.optimizers.AdamW(1e-4, weight_decay=0.2),
        global_clipnorm=1.0,
    )
    model.compile(optimizer)
    ```

    Args:
        default: Keras optimizer, or its name, for all other weights: projections,
            temperature, bias, and a tower without its own optimizer.
        image: The same, for the weights of `model.image_encoder`.
        text: The same, for the weights of `model.text_encoder`.
        global_clipnorm: Float. The maximum L2 norm of the gradients of all weights
            together. `None` does not clip. The optimizers get the clipped gradients:
            the `global_clipnorm` of an optimizer clips the gradients of its own
            weights, and `gradient_accumulation_steps` adds up clipped gradients.
        **kwargs: Arguments of `keras.optimizers.MultiOptimizer`.
    """

    def __init__(
        self,
        default: keras.optimizers.Optimizer,
        image: keras.optimizers.Optimizer | None = None,
        text: keras.optimizers.Optimizer | None = None,
        global_clipnorm: float | None = None,
        **kwargs: Any,
    ):
        default, image, text = map(keras.optimizers.get, (default, image, text))
        towers = _Towers(default, {"image": image, "text": text})
        super().__init__(towers, **kwargs)
        if global_clipnorm is not None:
            check_range("global_clipnorm", global_clipnorm, 0, math.inf, "()")
        self.towers = towers
        self.global_clipnorm = global_clipnorm

    def apply(
        self,
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        # Each optimizer would clip only its own weights' gradients. They are gradients
        # of the scaled loss.
        norm, scale = self.global_clipnorm, self.loss_scale_factor or 1.0
        self.global_clipnorm = norm and norm * scale
        clipped = iter(self._clip_gradients([x for x in grads if x is not None]))
        self.global_clipnorm = norm
        grads = [x if x is None else next(clipped) for x in grads]
        super().apply(grads, trainable_variables)

    # Keras also saves the variables of each of `optimizers`: do not save them twice.

    def save_own_variables(self, store: dict[str, Any]) -> None:
        for number, variable in enumerate(self._own_variables()):
            store[str(number)] = variable.numpy()

    def load_own_variables(self, store: dict[str, Any]) -> None:
        for number, variable in enumerate(self._own_variables()):
            variable.assign(store[str(number)])

    def _own_variables(self):
        others = {id(v) for optimizer in self.optimizers for v in optimizer.variables}
        return [v for v in self.variables if id(v) not in others]

    def get_config(self) -> dict[str, Any]:
        parts = {"default": self.towers.default_optimizer, **self.towers}
        return {
            **{k: keras.saving.serialize_keras_object(v) for k, v in parts.items()},
            "global_clipnorm": self.global_clipnorm,
            "loss_scale_factor": self.loss_scale_factor,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        return cls(**keras.saving.deserialize_keras_object(config, custom_objects))


class _Towers(keras.optimizers.OptimizerMap):
    """Maps variables to optimizers by the tower that they belong to.

    Paths are not used: weights of two towers may share a path, and a reload may change
    paths.

    Args:
        default: Keras optimizer.
        optimizers: Dictionary of Keras optimizers, or `None`, by tower.
    """

    def __init__(self, default, optimizers):
        super().__init__(
            default, {k: v for k, v in optimizers.items() if v is not None}
        )
        self.bind({})

    def bind(self, encoders):
        """Takes the encoders of a model, a dictionary by tower, when it is compiled."""
        self._encoders, self._towers = encoders, None

    def __call__(self, variable):
        if self and not self._encoders:
            raise ValueError(
                "`TowerOptimizer` must be passed to `ContrastiveModel.compile`, which "
                "tells it the weights of each tower. "
                f"Received: the weight {variable.path}, and no towers"
            )
        if self._towers is None:
            # Once all weights exist, which an encoder may create when it is called.
            self._towers = {
                id(weight): name
                for name in self
                for weight in self._encoders[name].weights
            }
        name = self._towers.get(id(variable))
        return self.default_optimizer if name is None else self[name]
