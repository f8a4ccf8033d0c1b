"""The layers, variables and configuration of the parts of a model.

Keras has no public functions for the first two, so this file reads private attributes
of layers. Tests fail if a version of Keras changes them.
"""

import warnings

import keras


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and all layers in it, at any depth, each once.

    `keras.Model.layers` lists the layers of a model, but not those of a layer.
    """
    return list(layer._flatten_layers())


def state_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """What layers update outside of the optimizer: averages, counters, thresholds.

    Seeds and frozen weights are left out. Keras lists frozen weights among the public
    `non_trainable_variables`, so the list is read that each layer keeps of the
    variables it created as non-trainable.
    """
    return [v for x in all_layers(layer) for v in x._non_trainable_variables]


def averaged_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The state that replicas update from their own rows, and must average.

    All of `state_variables` in floats, except for that of layers with the attribute
    `equal_on_replicas`, which is computed from what is equal on all replicas.
    """
    return [
        v
        for x in all_layers(layer)
        if not getattr(x, "equal_on_replicas", False)
        for v in x._non_trainable_variables
        if keras.backend.is_float_dtype(v.dtype)
    ]


def frozen_parts(layer: keras.layers.Layer) -> dict[str, list[int]]:
    """What of a layer is not trained, for its configuration.

    The configurations of attention layers and of keras_hub's encoders leave it out.

    Returns:
        The indices of frozen layers, in the order of `all_layers`, and of frozen
        weights, in that of `layer.weights`; and how many there are of both.
    """
    return {
        "counts": [len(all_layers(layer)), len(layer.weights)],
        "layers": [i for i, x in enumerate(all_layers(layer)) if not x.trainable],
        "weights": [i for i, v in enumerate(layer.weights) if not v.trainable],
    }


def freeze_parts(layer: keras.layers.Layer, frozen: dict[str, list[int]]):
    """Makes a layer train the parts that `frozen_parts` found to be trained."""
    found = [len(all_layers(layer)), len(layer.weights)]
    if found != frozen["counts"]:
        # keras_hub merges the weights of LoRA when it saves a model.
        if frozen["layers"] or frozen["weights"]:
            warnings.warn(
                "Which layers and weights were frozen is lost, as a model with LoRA is "
                "saved with other weights than it has: freeze them again. Received: "
                f"{found[1]} weights, saved from {frozen['counts'][1]}",
                stacklevel=3,
            )
        return
    # Layers pass it on to those in them, so first all, and then the exceptions.
    for _ in range(2):
        for index, part in enumerate(all_layers(layer)):
            trainable = index not in frozen["layers"]
            if part.trainable != trainable:
                part.trainable = trainable
    for index, weight in enumerate(layer.weights):
        weight.trainable = index not in frozen["weights"]


def from_parts(cls, config: dict, custom_objects: dict | None = None):
    """Makes a layer of a class from a configuration that holds other layers.

    Args:
        cls: The class.
        config: Dictionary of the arguments, of which dictionaries are those of layers
            and models; and what `frozen_parts` returned as `"frozen"`.
        custom_objects: As in `keras.saving.deserialize_keras_object`.
    """
    config = dict(config)
    frozen = config.pop("frozen")
    made = cls(
        **{
            key: keras.saving.deserialize_keras_object(
                value, custom_objects=custom_objects
            )
            if isinstance(value, dict)
            else value
            for key, value in config.items()
        }
    )
    freeze_parts(made, frozen)
    return made
