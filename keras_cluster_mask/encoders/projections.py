"""Projections: from the features of an encoder to the shared embedding space."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.types import Tensor


def projection(
    kind: str, width: int, dtype: str | keras.DTypePolicy | None, name: str
) -> keras.layers.Layer:
    """Returns a new projection.

    Args:
        kind: `"linear"`, without a bias, or `"mlp"`: a `Standardization`, one hidden
            layer of twice the width, GELU and dropout of 0.3. A `.keras` file does not
            hold the random state of dropout: the loaded model starts from a new one. A
            checkpoint holds this state.
        width: Integer, the width of the embedding space.
        dtype: The dtype policy.
        name: String.
    """
    if kind == "linear":
        return keras.layers.Dense(width, use_bias=False, dtype=dtype, name=name)
    layers = [
        Standardization(dtype=dtype, name="standardization"),
        keras.layers.Dense(2 * width, activation="gelu", dtype=dtype, name="hidden"),
        keras.layers.Dropout(0.3, dtype=dtype, name="dropout"),
        keras.layers.Dense(width, use_bias=False, dtype=dtype, name="output"),
    ]
    return keras.Sequential(layers, name=name)


@keras.saving.register_keras_serializable(package="keras_cluster_mask")
class Standardization(keras.layers.Layer):
    """Scales features to a mean of 0 and a deviation of 1.

    The scaling is fixed. It is the same in training and evaluation, and does not depend
    on the batch. The first `ContrastiveModel.fit` sets it: on `TowerFeatures` to their
    statistics, on other data to no scaling.

    Attributes:
        mean: `(width,)` float32 variable, not trained.
        deviation: `(width,)` float32 variable, not trained.
        is_set: `()` float32 variable, 1 once the scaling is fixed.
    """

    equal_on_replicas = True

    def __init__(self, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)

    def get_config(self) -> dict[str, Any]:
        # The automatic one of Keras fails for a dtype policy.
        return super().get_config()

    def build(self, input_shape):
        options, shape = {"trainable": False, "dtype": "float32"}, input_shape[-1:]
        self.mean = self.add_weight(shape, "zeros", name="mean", **options)
        self.deviation = self.add_weight(shape, "ones", name="deviation", **options)
        self.is_set = self.add_weight((), "zeros", name="is_set", **options)

    def call(self, features: Tensor) -> Tensor:
        # In lower precision, features would be rounded before the mean is subtracted.
        return (ops.cast(features, "float32") - self.mean) / self.deviation

    def set(self, mean: Any, deviation: Any) -> None:
        """Sets the scaling, which then never changes."""
        shape = tuple(self.mean.shape)
        self.mean.assign(np.broadcast_to(mean, shape))
        self.deviation.assign(np.broadcast_to(deviation, shape))
        self.is_set.assign(1.0)


def set_scaling(
    layer: keras.layers.Layer | None, statistics: Callable[[], tuple] | None = None
) -> list[Standardization]:
    """Fixes the scaling of features in a projection that has one, once.

    Args:
        layer: The projection of a tower, or `None`.
        statistics: Function that returns the mean and the deviation of the features.
            `None` does not scale features.

    Returns:
        List of the layers whose scaling was not fixed before.
    """
    found = []
    for each in getattr(layer, "layers", ()):
        is_scaling = isinstance(each, Standardization) and each.built
        if is_scaling and not ops.convert_to_numpy(each.is_set):
            each.set(*(statistics() if statistics else (0.0, 1.0)))
            found.append(each)
    return found
