"""The layers and variables of a model, for which Keras has no public functions."""

from collections.abc import Iterator

import keras


def all_layers(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """A layer and all layers in it, at any depth, each once.

    `keras.Model.layers` lists the layers of a model, but not those of a layer.
    """
    seen, stack = set(), [layer]
    while stack:
        found = stack.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        stack.extend(reversed([*_attributes(found)]))


def state_variables(model: keras.layers.Layer) -> list[keras.Variable]:
    """What layers update outside of the optimizer: averages, counters, thresholds.

    Seeds and frozen weights are left out. Keras lists frozen weights among the public
    `non_trainable_variables`, so the list is read that each layer keeps of the
    variables it created as non-trainable.
    """
    return [v for x in all_layers(model) for v in x._non_trainable_variables]


def _attributes(layer):
    """The layers among a layer's attributes, and in their lists and dictionaries."""
    stack = [*vars(layer).values()]
    while stack:
        value = stack.pop(0)
        if isinstance(value, keras.layers.Layer):
            yield value
        elif isinstance(value, list | tuple):
            stack = [*value, *stack]
        elif isinstance(value, dict):
            stack = [*value.values(), *stack]
