"""Gradient checkpointing: transformer blocks that store only their inputs."""

import contextlib

import keras
from keras import ops, tree

from keras_cluster_mask.distribution.chunks import recompute
from keras_cluster_mask.masking.selection import PutMask
from keras_cluster_mask.training.layers import all_layers, state_variables


def find_blocks(model, names, known):
    """Returns the layers of a model that use gradient checkpointing.

    Args:
        model: A Keras model.
        names: Boolean, or a list of layer names.
        known: The class names of the blocks that `True` selects.

    Returns:
        A list of layers.

    Raises:
        ValueError: If there is no such layer, or none with one of the names.
    """
    if not names:
        return []
    layers = [layer for layer in all_layers(model) if layer is not model]
    if names is True:
        blocks = [x for x in layers if type(x).__name__ in known]
        missing = [] if blocks else ["a block of a known class"]
    else:
        blocks = [x for x in layers if x.name in names]
        missing = sorted(set(names) - {x.name for x in blocks})
    if missing:
        raise ValueError(
            "`gradient_checkpointing` must be a list of names of layers in the model, "
            f"or True if the model has layers of the classes {', '.join(known)}. "
            f"Received: gradient_checkpointing={names!r}, and the model lacks "
            f"{', '.join(missing)}"
        )
    return blocks


@contextlib.contextmanager
def checkpointed(blocks):
    """A context in which blocks recompute their activations in the backward pass."""
    for block in blocks:
        if not isinstance(block.call, _Recomputed):
            block.call = _Recomputed(block)
        # TensorFlow runs replicas in threads, which enter the context one after
        # another.
        block.call.users += 1
    try:
        yield
    finally:
        for block in blocks:
            block.call.users -= 1
            if not block.call.users:
                del block.call


class _Recomputed:
    """The `call` of a block that is recomputed in the backward pass."""

    def __init__(self, block):
        self.block = block
        self.own_call = block.call
        self.users = 0
        self.inside = False

    def __call__(self, tokens, *args, **kwargs):
        if self.inside:
            return self.own_call(tokens, *args, **kwargs)
        given = tree.flatten((args, kwargs))
        tensors = {i: x for i, x in enumerate(given) if ops.is_tensor(x)}
        variables, updated = self.block.variables, []

        def run(values, tokens, masks, tensors):
            rest = [tensors.get(i, x) for i, x in enumerate(given)]
            rest = tree.pack_sequence_as((args, kwargs), rest)
            outputs, losses, after = call_statelessly(
                lambda: self.call_block(tokens, masks, *rest), variables, values
            )
            updated[:] = [v for v, x in zip(variables, after) if x is not None]
            return outputs, losses, [x for x in after if x is not None]

        def recomputed(tokens, mask):
            masks = [] if mask is None else [mask]
            values = snapshot(self.block, variables)
            return recompute(run, values, tokens, masks, tensors)

        outputs, losses, values = _Called(recomputed)(tokens)
        for variable, value in zip(updated, values):
            variable.assign(value)
        if losses:
            self.block.add_loss(losses)
        return outputs

    def call_block(self, tokens, masks, args, kwargs):
        for mask in masks:
            tokens = PutMask()(tokens, mask=mask)
        block = self.block
        # Use `__call__`, which handles `training` and the dtype policy, but without the
        # activity regularizer, which the outer call adds.
        regularizer, block.activity_regularizer = block.activity_regularizer, None
        self.inside = True
        try:
            out = block(tokens, *args, **kwargs)
            # TensorFlow recomputes no `None`, such as DeiT's weights of attention.
            return tree.map_structure(lambda x: ops.zeros(()) if x is None else x, out)
        finally:
            self.inside = False
            block.activity_regularizer = regularizer


class _Called(keras.layers.Layer):
    """Calls a function in training, on tokens and their Keras mask, if any.

    The layers that the function calls train, as in the call of a model.
    """

    def __init__(self, function):
        super().__init__(name="called")
        self.function = function
        # Weights keep their dtype when the function reads them.
        self.autocast = False
        self.supports_masking = True

    def call(self, tokens=None, mask=None, training=True):
        return self.function(tokens, mask)

    def compute_mask(self, inputs, previous_mask=None):
        return None


# === Layers as functions of their variables ===


def call_statelessly(function, variables, values):
    """Calls a function with other values of variables, without assigning them.

    Args:
        function: Function without arguments that calls layers. They train.
        variables: List of all variables of the layers.
        values: List of tensors, one for each variable.

    Returns:
        A tuple: the output of the function; a list with the loss that layers added,
        empty if there is none; and a list of the new values of the variables, `None`
        for those that were not assigned.
    """
    mapping = list(zip(variables, values))
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        before = [scope.get_current_value(v) for v in variables]
        # In the backward pass, no model is called that would say that it trains.
        outputs = _Called(lambda *_: function())()
        losses = [sum(map(ops.sum, scope.losses))] if scope.losses else []
    after = [scope.get_current_value(v) for v in variables]
    return outputs, losses, [None if x is y else y for x, y in zip(before, after)]


def snapshot(layer, variables):
    """Returns the current values of variables, unaffected by later assignments.

    Weights, frozen or not, are not copied: they may be large, and nothing assigns them
    before the gradients are computed.
    """
    weights = {id(v) for v in layer.weights} - {id(v) for v in state_variables(layer)}
    return [v if id(v) in weights else ops.copy(v) for v in variables]
