"""Lists nested layers and variables, and saves what their configurations omit.

Keras has no public functions to list nested layers and the variables that they created,
so this file reads private attributes. Tests fail if a version of Keras changes them.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras

NORMALIZATION = keras.layers.LayerNormalization
# What the hashes in a description stand for.
HASHED = {
    "image_encoder": "the weights or settings of the image encoder",
    "text_encoder": "the weights or settings of the text encoder",
    "tokenizer": "the tokenizer",
    "data": "the images or captions",
    "fingerprint": "the list of samples",
    "samples": "the samples",
    "files": "the sizes or dates of files",
}


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers nested in it, each once.

    `keras.Model.layers` lists the layers of a model, but not the layers inside those.
    """
    return list(layer._flatten_layers())


def settings_of(layer: keras.layers.Layer) -> list:
    """Lists what nested layers compute that weights do not show, as JSON values."""
    names = "num_heads", "intermediate_activation", "pooling", "block_numbers"
    found = [getattr(x, name, None) for x in all_layers(layer) for name in names]
    return [x for x in found if isinstance(x, str | int | list)]


def differences(then: Any, now: Any, path: tuple = ()) -> Iterator[str]:
    """Yields what differs in two descriptions of a model and data, for messages.

    Args:
        then: JSON values, as a file has them.
        now: The same, in which lists may be tuples.
        path: Tuple of the keys that lead to both.
    """
    then, now = (
        dict(enumerate(x)) if isinstance(x, list | tuple) else x for x in (then, now)
    )
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**now, **then}:
            yield from differences(then.get(key), now.get(key), (*path, key))
    elif then != now:
        name = ".".join(map(str, path))
        yield HASHED.get(path[-1]) or f"{name}: {then!r} then, {now!r} now"


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
    in layers with the attribute `equal_on_replicas`, which update equally on all
    replicas.
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


def omitted_settings(layer: keras.layers.Layer) -> dict[str, list]:
    """Returns settings that the configurations of nested layers omit.

    Configurations of attention layers and of keras_hub's encoders omit which parts are
    frozen. Configurations of keras_hub's CLIP omit the epsilon of normalizations.

    Returns:
        A dictionary of lists:

        - `"layers"`: whether each of `all_layers` is trained.
        - `"weights"`: whether each weight is an exception, trained in a frozen layer or
          frozen in one that is trained. A head shares the temperature of a backbone.
        - `"epsilons"`: the epsilon of each `LayerNormalization`.
    """
    layers = all_layers(layer)
    return {
        "layers": [x.trainable for x in layers],
        "weights": [v.trainable != x.trainable for x, v in _weights_of(layers)],
        "epsilons": [x.epsilon for x in layers if isinstance(x, NORMALIZATION)],
    }


def restore_settings(layer: keras.layers.Layer, omitted: dict[str, list]):
    """Applies the result of `omitted_settings` to a layer of the same parts."""
    layers = all_layers(layer)
    weights = _weights_of(layers)
    has_layers = len(layers) == len(omitted["layers"])
    has_weights = has_layers and len(weights) == len(omitted["weights"])
    if has_layers:
        normalizations = [x for x in layers if isinstance(x, NORMALIZATION)]
        for part, epsilon in zip(normalizations, omitted["epsilons"]):
            part.epsilon = epsilon
        # Setting `trainable` also sets it on nested layers, so a second pass is needed.
        for part, is_trained in [*zip(layers, omitted["layers"])] * 2:
            if part.trainable != is_trained:
                part.trainable = is_trained
    if has_weights:
        for (part, weight), is_exception in zip(weights, omitted["weights"]):
            weight.trainable = part.trainable != is_exception
    lost = [] if has_layers or all(omitted["layers"]) else ["layers"]
    lost += [] if has_weights or not any(omitted["weights"]) else ["weights"]
    if lost:
        # A subclassed encoder may create its layers only when it is called.
        warnings.warn(
            f"Frozen {' and '.join(lost)} could not be restored, because the loaded "
            "model has other layers or weights than the saved one: set "
            "`trainable = False` on them again. Received: a model of "
            f"{len(layers)} layers and {len(weights)} weights, saved with "
            f"{len(omitted['layers'])} and {len(omitted['weights'])}",
            stacklevel=3,
        )


def _weights_of(layers):
    """Returns pairs of a layer and a weight of it, without state and LoRA."""
    weights = [(x, v) for x in layers for v in x._trainable_variables]
    return [(x, v) for x, v in weights if not v.name.startswith("lora_")]


class MadeOfParts:
    """Base class of layers with other layers among their arguments.

    Attributes:
        _arguments: Names of the arguments of the class, which have attributes of their
            names.
    """

    _arguments: tuple[str, ...] = ()

    def get_config(self) -> dict[str, Any]:
        arguments = {name: getattr(self, name) for name in self._arguments}
        config = keras.saving.serialize_keras_object(arguments)
        return {"name": self.name, **config, "omitted": omitted_settings(self)}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> Self:
        return from_parts(cls, config, custom_objects)


def from_parts(
    make: Callable,
    config: dict[str, Any],
    custom_objects: dict[str, Any] | None = None,
) -> keras.layers.Layer:
    """Makes a layer from the configuration of a `MadeOfParts`.

    Args:
        make: The class, or another function of the arguments.
        config: Dictionary. Layers are described by dictionaries; those that already
            exist are passed unchanged.
        custom_objects: As in Keras.
    """
    config = {**config}
    omitted = config.pop("omitted", None)
    described = {key: x for key, x in config.items() if isinstance(x, dict)}
    parts = keras.saving.deserialize_keras_object(described, custom_objects)
    made = make(**{**config, **parts})
    if omitted is not None:
        restore_settings(made, omitted)
    return made


class Untracked:
    """Holds what belongs to another layer, or to none, so that Keras does not track it.

    Keras would list and save its weights twice.
    """

    def __init__(self, **held: Any):
        vars(self).update(held)
