"""The layers, variables and configuration of the parts of a model.

Keras has no public functions for the first two, so this file reads private attributes
of layers. Tests fail if a version of Keras changes them.
"""

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


def deserialize_parts(config: dict, custom_objects: dict | None = None) -> dict:
    """A configuration in which layers and models are made of their own."""
    return {
        key: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
