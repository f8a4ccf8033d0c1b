"""Lists nested layers and variables, and saves what their configurations omit.

Keras has no public functions to list nested layers and the variables that they created,
so this file reads private attributes. Tests fail if a version of Keras changes them.
"""

import warnings
from typing import Any, Self

import keras

from keras_cluster_mask.types import Tensor

NORMALIZATION = keras.layers.LayerNormalization


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers nested in it, each once.

    `keras.Model.layers` lists the layers of a model, but not the layers inside those.
    """
    return list(layer._flatten_layers())


def settings_of(layer: keras.layers.Layer) -> list:
    """Lists what nested layers compute that weights do not show, as JSON values."""
    names = "num_heads", "intermediate_activation", "pooling"
    found = [getattr(x, name, None) for x in all_layers(layer) for name in names]
    return [x for x in found if isinstance(x, str | int)]


def as_functional(encoder: keras.Model) -> keras.Model:
    """Returns a built `Sequential` as a functional model, which has an `input`."""
    if isinstance(encoder, keras.Sequential) and getattr(encoder, "inputs", None):
        return keras.Model(encoder.inputs[0], encoder.outputs[0], name=encoder.name)
    return encoder


def state_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns variables that layers update: averages, counters, thresholds.

    Seeds and frozen weights are excluded. Keras's public `non_trainable_variables`
    includes frozen weights, so this function reads each layer's private list of the
    variables that it created as non-trainable.
    """
    return [v for x in all_layers(layer) for v in x._non_trainable_variables]


def averaged_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the variables that each replica updates from its own rows.

    They must be averaged over replicas. These are the float `state_variables`, except
    those of layers with the attribute `equal_on_replicas`, whose updates are equal on
    all replicas.
    """
    return [
        v
        for x in all_layers(layer)
        if not getattr(x, "equal_on_replicas", False)
        for v in x._non_trainable_variables
        if keras.backend.is_float_dtype(v.dtype)
    ]


def saved_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the weights of a layer without the factors of LoRA.

    Keras merges the factors into the matrices when it saves a model.
    """
    return [v for v in layer.weights if not v.name.startswith("lora_")]


def merged_weights(layer: keras.layers.Layer) -> dict[int, Tensor]:
    """Returns the merged values of the weights of layers with LoRA, by their ids."""
    return {
        id(weight): getattr(x, weight.name)
        for x in all_layers(layer)
        if getattr(x, "lora_enabled", False)
        for weight in saved_weights(x)
    }


def omitted_settings(layer: keras.layers.Layer) -> dict[str, list]:
    """Returns what the configurations of layers omit, for that of a layer around them.

    Those of attention layers and of keras_hub's encoders omit which parts are frozen,
    and those of keras_hub's CLIP the epsilon of normalizations.

    Returns:
        A dictionary of lists:

        - `"counts"`: the number of all layers, and the number of all weights.
        - `"layers"`: the indices of frozen layers in `all_layers`.
        - `"weights"`: the indices in `saved_weights` of weights that are frozen in a
          layer that is trained.
        - `"trained"`: the indices in `saved_weights` of weights that are trained in a
          frozen layer.
        - `"epsilons"`: the epsilon of each `LayerNormalization`.
    """
    layers, weights = all_layers(layer), saved_weights(layer)
    trained, frozen = weights_by_layers(layer)
    return {
        "counts": [len(layers), len(weights)],
        "layers": [i for i, x in enumerate(layers) if not x.trainable],
        "weights": [
            i for i, v in enumerate(weights) if id(v) in trained and not v.trainable
        ],
        # A head shares the temperature of a backbone.
        "trained": [
            i for i, v in enumerate(weights) if id(v) in frozen and v.trainable
        ],
        "epsilons": [x.epsilon for x in layers if isinstance(x, NORMALIZATION)],
    }


def restore_settings(layer: keras.layers.Layer, omitted: dict[str, list]):
    """Applies the result of `omitted_settings` to a layer of the same parts."""
    weights = saved_weights(layer)
    found = [len(all_layers(layer)), len(weights)]
    has_layers = found[0] == omitted["counts"][0]
    has_weights = found == omitted["counts"]
    if has_layers:
        layers = [x for x in all_layers(layer) if isinstance(x, NORMALIZATION)]
        for part, epsilon in zip(layers, omitted["epsilons"]):
            part.epsilon = epsilon
        # Setting `trainable` also sets it on nested layers, so a second pass is needed.
        for _ in range(2):
            for index, part in enumerate(all_layers(layer)):
                trainable = index not in omitted["layers"]
                if part.trainable != trainable:
                    part.trainable = trainable
    if has_weights:
        trained, _ = weights_by_layers(layer)
        for index, weight in enumerate(weights):
            if index in omitted["trained"] or id(weight) in trained:
                weight.trainable = index not in omitted["weights"]
    restored = {"layers": has_layers, "weights": has_weights}
    lost = [name for name, has in restored.items() if omitted[name] and not has]
    if lost:
        # A subclassed encoder may create its layers only when it is called.
        warnings.warn(
            f"Frozen {' and '.join(lost)} could not be restored, because the loaded "
            "model has other layers or weights than the saved one: set "
            "`trainable = False` on them again. Received: a model of "
            f"{found[0]} layers and {found[1]} weights, saved with "
            f"{omitted['counts'][0]} and {omitted['counts'][1]}",
            stacklevel=3,
        )


def weights_by_layers(layer):
    """Returns ids of weights, without other state: of trained and of frozen layers."""
    ids = {True: set(), False: set()}
    for part in all_layers(layer):
        ids[part.trainable] |= {id(v) for v in part._trainable_variables}
    return ids[True] - ids[False], ids[False]


class MadeOfParts:
    """Base class of layers whose configuration contains other layers.

    Dictionaries in the configuration are those of layers and models, except for
    `"omitted"`, the result of `omitted_settings`, or `None` for parts that already
    exist.

    Attributes:
        _parts: Names of the arguments of the class that have attributes of their names.
    """

    _parts: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self._parts}
        parts = keras.saving.serialize_keras_object(parts)
        return {"name": self.name, **parts, "omitted": omitted_settings(self)}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        config = dict(config)
        omitted = config.pop("omitted")
        # Parts that already exist are given as they are.
        described = {key: x for key, x in config.items() if isinstance(x, dict)}
        parts = keras.saving.deserialize_keras_object(described, custom_objects)
        made = cls._make(**{**config, **parts})
        if omitted is not None:
            restore_settings(made, omitted)
        return made

    @classmethod
    def _make(cls, **arguments: Any) -> Self:
        return cls(**arguments)
