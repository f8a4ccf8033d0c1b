import keras
import numpy as np
from keras import ops, tree


def check_no_leak(name, blocks):
    """Raises if hidden tokens have an influence on what blocks return.

    Every layer of `blocks` is told to hand Keras masks on; whether attention
    and pooling then honour them is found out by trying: tokens are changed
    where the mask hides them, and nothing visible may change with them.

    Args:
        name: String, the encoder's name for the error message.
        blocks: A functional Keras model of `(batch, tokens, dim)` tokens.

    Raises:
        ValueError: If anything visible changes.
    """
    _hand_masks_on(blocks)
    visible = np.arange(8) % 2 == 0
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1, 8, blocks.input.shape[-1])).astype("float32")
    changed = np.where(visible[None, :, None], tokens, 10.0 * tokens[:, ::-1] + 1.0)

    # With weights drawn anew, since a zero weight (LayerScale, a fresh residual
    # branch) would hide a leak that opens up later in training.
    weights = [_redraw(v, rng) for v in blocks.trainable_variables]
    state = [_redraw(v, rng, positive=True) for v in blocks.non_trainable_variables]
    before, after = (
        _run(blocks, weights, state, x.astype("float32"), visible)
        for x in (tokens, changed)
    )
    for one, other in zip(tree.flatten(before), tree.flatten(after)):
        one, other = (
            ops.convert_to_numpy(ops.cast(x, "float32")) for x in (one, other)
        )
        if one.ndim == 3 and one.shape[1] == len(visible):
            one, other = one[:, visible], other[:, visible]
        if not np.allclose(one, other, rtol=0, atol=1e-6 * max(1, np.abs(one).max())):
            raise ValueError(
                f"`{name}` lets hidden tokens through: its layers do not honour Keras "
                "masks, so threshold masking with hidden padding would not hide "
                "anything. Use an exact budget (`min_mask_ratio=None`), or let the "
                "padding take part (`hide_padding=False`). "
                f"Received: encoder={name}, largest change of the output="
                f"{np.abs(one - other).max():.3g}"
            )


def _hand_masks_on(blocks):
    for layer in blocks._flatten_layers():
        layer.supports_masking = True
    # A mask of tokens says nothing about pooled features: losses would take it for
    # sample weights.
    for layer in (blocks, *blocks.layers):
        if any(len(x.shape) != 3 for x in tree.flatten(layer.output)):
            layer.compute_mask = _no_mask


def _no_mask(inputs, previous_mask=None):
    return None


def _redraw(variable, rng, positive=False):
    """Random values for a weight; for frozen ones, maybe variances, positive."""
    if not keras.backend.is_float_dtype(variable.dtype):
        return variable.value
    values = 0.1 * rng.normal(size=variable.shape)
    return ops.convert_to_tensor(
        np.abs(values) + 0.01 if positive else values, dtype=variable.dtype
    )


def _run(blocks, weights, state, tokens, visible):
    masked = _Hide(visible)(ops.convert_to_tensor(tokens))
    return blocks.stateless_call(weights, state, masked, training=False)[0]


class _Hide(keras.layers.Layer):
    """Puts a fixed Keras mask on its input."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible
        self.supports_masking = True

    def call(self, tokens):
        return tokens + 0.0

    def compute_mask(self, inputs, previous_mask=None):
        return ops.convert_to_tensor(self.visible[None])
