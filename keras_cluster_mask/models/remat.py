"""Transformer blocks that keep nothing but their input for the gradients."""

import contextlib

import keras
from keras import ops, tree

from keras_cluster_mask import distribution
from keras_cluster_mask.models.stateless import call_statelessly, snapshot

# Blocks of keras_hub's encoders. By class name, so that keras_hub need not be imported
# to recognise them.
KNOWN_BLOCKS = (
    "CLIPEncoderLayer",
    "DINOV2Layer",
    "DeiTEncoderBlock",
    "SigLIPEncoderLayer",
    "TransformerDecoder",
    "TransformerEncoder",
    "ViTEncoderBlock",
)


def find_blocks(model, remat):
    """The layers of a model that are to be computed again.

    Args:
        model: A Keras model.
        remat: Boolean, or a list of names of layers.

    Returns:
        A list of layers.

    Raises:
        ValueError: If there is none, or none of a name.
    """
    if not remat:
        return []
    layers = model._flatten_layers(include_self=False)
    if remat is True:
        blocks = [x for x in layers if type(x).__name__ in KNOWN_BLOCKS]
        missing = [] if blocks else ["a block of a class that is known"]
    else:
        blocks = [x for x in layers if x.name in remat]
        missing = sorted(set(remat) - {x.name for x in blocks})
    if missing:
        raise ValueError(
            f"`remat=True` finds the layers of {', '.join(KNOWN_BLOCKS)}; for others "
            f"pass a list of their names. Received: remat={remat!r}, and the model "
            f"lacks {', '.join(missing)}"
        )
    return blocks


@contextlib.contextmanager
def rematerialized(blocks):
    """Within, blocks forget what they compute until the gradients need it again."""
    for block in blocks:
        if not isinstance(block.call, _Again):
            block.call = _Again(block)
        # TensorFlow runs replicas in threads, which come here one in another.
        block.call.users += 1
    try:
        yield
    finally:
        for block in blocks:
            block.call.users -= 1
            if not block.call.users:
                del block.call


class _Again:
    """The `call` of a block that is computed again for its gradients."""

    def __init__(self, block):
        self.block = block
        self.own_call = block.call
        self.users = 0
        self.inside = False

    def __call__(self, tokens, *args, **kwargs):
        if self.inside:
            return self.own_call(tokens, *args, **kwargs)
        # A block that has no such argument tells its layers all the same. When it is
        # computed again, the model around it that would is no longer being called.
        kwargs.setdefault("training", True)
        given = tree.flatten((args, kwargs))
        tensors = {i: x for i, x in enumerate(given) if ops.is_tensor(x)}
        variables, written = self.block.variables, []

        def run(values, tokens, masks, tensors):
            rest = [tensors.get(i, x) for i, x in enumerate(given)]
            rest = tree.pack_sequence_as((args, kwargs), rest)
            outputs, losses, after = call_statelessly(
                lambda: self.call_block(tokens, masks, *rest), variables, values
            )
            written[:] = [v for v, x in zip(variables, after) if x is not None]
            return outputs, losses, [x for x in after if x is not None]

        def run_again(tokens, mask):
            return distribution.run_again(
                run,
                snapshot(self.block, variables),
                tokens,
                [] if mask is None else [mask],
                tensors,
            )

        outputs, losses, values = _WithMask(run_again)(tokens)
        for variable, value in zip(written, values):
            variable.assign(value)
        if losses:
            self.block.add_loss(losses)
        return outputs

    def call_block(self, tokens, masks, args, kwargs):
        for mask in masks:
            tokens = _PutMask()(tokens, mask=mask)
        block = self.block
        # All of `__call__`, which knows how to train and in which precision, but for
        # what the call around this one adds.
        regularizer, block.activity_regularizer = block.activity_regularizer, None
        self.inside = True
        try:
            return block(tokens, *args, **kwargs)
        finally:
            self.inside = False
            block.activity_regularizer = regularizer


class _WithMask(keras.layers.Layer):
    """Calls a function on tokens and the Keras mask that they carry, if any."""

    def __init__(self, function):
        super().__init__(name="with_mask")
        self.function = function
        # Weights are handed on in the precision they have.
        self.autocast = False
        self.supports_masking = True

    def call(self, tokens, mask=None):
        return self.function(tokens, mask)

    def compute_mask(self, inputs, previous_mask=None):
        return None


class _PutMask(keras.layers.Layer):
    """Lets tokens carry a Keras mask."""

    def __init__(self):
        super().__init__(name="put_mask")
        self.autocast = False
        self.supports_masking = True

    def call(self, tokens, mask):
        return tokens
