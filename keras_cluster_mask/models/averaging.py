"""Averages of the weights of a model."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.checks import check_range
from keras_cluster_mask.training.layers import all_layers


def average_weights(
    model: keras.Model, weights: Sequence[np.ndarray], share: float
) -> None:
    """Sets the trained weights of a model to an average with other weights.

    A tuned model keeps more of what it knew before if its weights are averaged with
    those before tuning. The moving statistics of trained batch normalization layers are
    averaged, too.

    Example:

    ```python
    backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    before = model.get_weights()
    # ... tune the model ...
    kcm.models.average_weights(model, before, share=0.25)
    ```

    Args:
        model: A Keras model.
        weights: List of arrays, which `model.get_weights()` returned before.
        share: Float in `[0, 1]`. The share of `weights` in the average.

    Raises:
        ValueError: If the weights are not of this model, or for a model with LoRA.

    Reference:
        - [Robust fine-tuning of zero-shot models](https://arxiv.org/abs/2109.01903)
    """
    check_share("share", share, model)
    expected = [tuple(variable.shape) for variable in model.weights]
    found = [np.shape(values) for values in weights]
    if found != expected:
        raise ValueError(
            "`weights` must be arrays that `get_weights()` of this model returned. "
            f"Received: {len(found)} arrays for {len(expected)} weights, or arrays of "
            "other shapes"
        )
    statistics = [
        id(variable)
        for layer in all_layers(model)
        if layer.trainable and isinstance(layer, keras.layers.BatchNormalization)
        for variable in layer.non_trainable_variables
    ]
    for variable, values in zip(model.weights, weights):
        is_trained = variable.trainable or id(variable) in statistics
        if is_trained and keras.backend.is_float_dtype(variable.dtype):
            tuned = ops.convert_to_numpy(ops.cast(variable, "float32"))
            variable.assign(share * np.asarray(values, "float32") + (1 - share) * tuned)


def check_share(name: str, share: float, model: keras.Model) -> None:
    """Raises an error unless the weights of a model can be averaged with a share."""
    check_range(name, share, 0, 1)
    has_lora = any(getattr(x, "lora_enabled", False) for x in all_layers(model))
    if share and has_lora:
        raise ValueError(
            f"`{name}` must be 0 for a model with LoRA, whose factors have no average: "
            "save and load the model, which merges LoRA into the weights. Received: "
            f"{name}={share}"
        )
