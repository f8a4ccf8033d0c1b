"""A separate optimizer for each tower."""

import re
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_cluster_mask.distribution import in_place_updates
from keras_cluster_mask.training.layers import state_variables
from keras_cluster_mask.types import Tensor


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class TowerOptimizer(keras.optimizers.MultiOptimizer):
    """A `MultiOptimizer` that clips all gradients by their global norm.

    `kcm.tower_optimizer` creates one for a model.

    Args:
        optimizer_map: `keras.optimizers.OptimizerMap`.
        global_clipnorm: Float. The maximum L2 norm of the gradients of all weights
            together. `None` disables clipping.
        **kwargs: Arguments of `keras.optimizers.MultiOptimizer`.
    """

    def __init__(
        self,
        optimizer_map: keras.optimizers.OptimizerMap,
        global_clipnorm: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(optimizer_map, **kwargs)
        self.global_clipnorm = global_clipnorm
        if global_clipnorm is None:
            return
        for part in self.optimizers:
            for name in ("global_clipnorm", "gradient_accumulation_steps"):
                if getattr(part, name) is not None:
                    raise ValueError(
                        f"`{name}` must not be given to an optimizer of a tower: all "
                        "gradients are clipped together, by the `global_clipnorm` of "
                        "the `TowerOptimizer`, before each of its steps. "
                        f"Received: {part.name} with {name}={getattr(part, name)}"
                    )

    def apply(
        self,
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        if self.global_clipnorm is not None:
            grads = clip_by_global_norm(list(grads), self.global_clipnorm)
        super().apply(grads, trainable_variables)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "global_clipnorm": self.global_clipnorm}


def tower_optimizer(
    model: keras.Model,
    default: keras.optimizers.Optimizer,
    image: keras.optimizers.Optimizer | None = None,
    text: keras.optimizers.Optimizer | None = None,
    global_clipnorm: float | None = None,
) -> TowerOptimizer:
    """Creates an optimizer that trains each tower with a separate optimizer.

    Use it to train pre-trained towers at a lower rate than new weights. Keras callbacks
    that change the learning rate change the rate of each optimizer.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    optimizer = kcm.tower_optimizer(
        model,
        keras.optimizers.AdamW(1e-3, weight_decay=0.2),
        image=keras.optimizers.AdamW(1e-4, weight_decay=0.2),
        global_clipnorm=1.0,
    )
    model.compile(optimizer)
    ```

    Args:
        model: A `ContrastiveModel`.
        default: Keras optimizer for all other weights: projections, temperature, bias,
            and a tower without its own optimizer.
        image: Keras optimizer for the weights of `model.image_encoder`.
        text: Keras optimizer for the weights of `model.text_encoder`.
        global_clipnorm: Float. The maximum L2 norm of the gradients of all weights
            together. An optimizer's own `global_clipnorm` covers its weights only.

    Returns:
        A `TowerOptimizer`, a `keras.optimizers.MultiOptimizer`.

    Raises:
        ValueError: If weights of a tower have the same paths as other weights, so that
            they cannot be distinguished.
    """
    optimizers = {}
    # Variables that layers update themselves may have the same paths.
    state = {id(variable) for variable in state_variables(model)}
    for name, encoder, optimizer in (
        ("image", model.image_encoder, image),
        ("text", model.text_encoder, text),
    ):
        if optimizer is None:
            continue
        weights = [v for v in encoder.weights if id(v) not in state]
        paths, own = {v.path for v in weights}, {*map(id, weights)}
        others = {v.path for v in model.weights if id(v) not in own | state}
        if shared := sorted(paths & others):
            raise ValueError(
                f"`{name}` needs weights whose paths differ from those of all other "
                "weights: give the layers of the encoders different names. "
                f"Received: {shared[0]!r} twice"
            )
        optimizers["|".join(map(re.escape, sorted(paths)))] = optimizer
    optimizer_map = keras.optimizers.OptimizerMap(default, optimizers)
    return TowerOptimizer(optimizer_map, global_clipnorm)


def clip_by_global_norm(gradients: list, max_norm: float) -> list:
    """Scales all gradients by one factor, to a global norm of at most `max_norm`."""
    given = [x for x in gradients if x is not None]
    if in_place_updates.are_available() and in_place_updates.clip_by_global_norm(
        given, max_norm
    ):
        return gradients
    norm = ops.sqrt(sum(ops.sum(ops.square(ops.cast(x, "float32"))) for x in given))
    # As in Keras, all become NaN if the norm is not finite.
    scale = max_norm * ops.minimum(1.0 / norm, 1.0 / max_norm) + (norm - norm)
    return [x if x is None else x * ops.cast(scale, x.dtype) for x in gradients]
