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
        The indices of frozen layers, in the order of `all_layers`; those of weights
        that are frozen in other layers, in the order of `layer.weights`; and how many
        there are of both.
    """
    trained = _weights_of_trained_layers(layer)
    return {
        "counts": [len(all_layers(layer)), len(layer.weights)],
        "layers": [i for i, x in enumerate(all_layers(layer)) if not x.trainable],
        "weights": [
            i
            for i, v in enumerate(layer.weights)
            if id(v) in trained and not v.trainable
        ],
    }


def freeze_parts(layer: keras.layers.Layer, frozen: dict[str, list[int]]):
    """Makes a layer train the parts that `frozen_parts` found to be trained."""
    found = [len(all_layers(layer)), len(layer.weights)]
    has_layers = found[0] == frozen["counts"][0]
    has_weights = found == frozen["counts"]
    if has_layers:
        # Layers pass it on to those in them, so first all, and then the exceptions.
        for _ in range(2):
            for index, part in enumerate(all_layers(layer)):
                trainable = index not in frozen["layers"]
                if part.trainable != trainable:
                    part.trainable = trainable
    if has_weights:
        trained = _weights_of_trained_layers(layer)
        for index, weight in enumerate(layer.weights):
            if id(weight) in trained:
                weight.trainable = index not in frozen["weights"]
    lost = [
        name
        for name, has in (("layers", has_layers), ("weights", has_weights))
        if frozen[name] and not has
    ]
    if lost:
        # keras_hub merges the weights of LoRA when it saves a model, and layers of a
        # subclassed encoder may be made only when it is called.
        warnings.warn(
            f"Which {' and '.join(lost)} were frozen is lost, as the model was saved "
            "with others than it is made with: freeze them again. Received: "
            f"{found[0]} layers and {found[1]} weights, saved from "
            f"{frozen['counts'][0]} and {frozen['counts'][1]}",
            stacklevel=3,
        )


def _weights_of_trained_layers(layer):
    """The ids of all weights, but not of other state, in layers that are not frozen."""
    layers = [x for x in all_layers(layer) if x.trainable]
    return {id(v) for x in layers for v in x._trainable_variables}


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
