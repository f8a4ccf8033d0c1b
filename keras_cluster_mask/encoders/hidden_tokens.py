"""Checks that the blocks of an encoder honor hidden tokens, and ignore the order."""

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.encoders.families import IMAGE_FAMILIES, num_prefix_tokens
from keras_cluster_mask.masking.selection import PutMask
from keras_cluster_mask.training.layers import all_layers, state_variables

# The visible patches in each sample of the test batch. Every patch is hidden in at
# least one sample.
VISIBLE = np.array([[1, 0] * 4, [0, 1] * 4, [1] * 6 + [0] * 2, [0] * 6 + [1] * 2], bool)


def check_blocks(masked):
    """Raises an error if the blocks of an encoder use hidden tokens, or their order.

    If the masking hides tokens, tests that attention and pooling honor Keras masks: if
    hidden tokens change, no visible output may change. If the order mattered in an
    encoder of an unknown kind, kept patches would get other positions than in the whole
    image. Encoders of keras_hub were tested.

    Args:
        masked: A `MaskedEncoder`.

    Raises:
        ValueError: If a visible output changes; or if a token, or a pooled feature,
            changes when patches are reversed.
    """
    if type(masked.encoder).__name__ in IMAGE_FAMILIES:
        return
    rng, (rows, count) = np.random.default_rng(0), VISIBLE.shape
    blocks, num_prefix = masked.blocks, masked.num_prefix_tokens
    # Assume a class token, which most encoders have.
    num_prefix = 1 if num_prefix is None else num_prefix
    sizes = num_prefix + count, count, count
    inputs = [
        rng.normal(size=(rows, n, x.shape[-1])) for n, x in zip(sizes, blocks.inputs)
    ]
    name = masked.encoder.name
    if masked.masking.hides_tokens:
        prefix = [(0, 0), (num_prefix, 0)]
        visible = np.pad(VISIBLE, prefix, constant_values=True)
        tokens, *rest = inputs
        changed = np.where(visible[:, :, None], tokens, 10.0 * tokens[:, ::-1] + 1.0)
        for one, other in _outputs(blocks, inputs, [changed, *rest], visible=visible):
            if one.ndim == 3 and one.shape[:2] == visible.shape:
                one, other = one[visible], other[visible]
            change = np.abs(one - other).max()
            if not change <= 1e-6 * max(1, np.abs(one).max()):
                raise ValueError(
                    "`encoder` must honor Keras masks in threshold mode with hidden "
                    "padding, but the output of this encoder changes with the hidden "
                    "tokens. Use an exact budget (`min_mask_ratio=None`), or let the "
                    "padding take part (`hide_padding=False`). Received: "
                    f"encoder={name}, largest change of the output={change:.3g}"
                )
    if num_prefix_tokens(masked.embedding_layer) is not None:
        return
    # Sums in another order are rounded differently.
    is_rounded = any(x.compute_dtype != "float32" for x in all_layers(blocks))
    tolerance = 0.02 if is_rounded else 1e-4
    backwards = [
        np.concatenate([x[:, :-count], x[:, -count:][:, ::-1]], 1) for x in inputs
    ]
    for one, other in _outputs(blocks, inputs, backwards):
        # The same tokens, in whatever order, have the same sorted values.
        one, other = (np.sort(x, axis=1) if x.ndim > 2 else x for x in (one, other))
        if np.abs(one - other).mean() > tolerance * np.abs(one).mean():
            raise ValueError(
                "`layer` must be after the position embedding, but a later layer "
                "depends on the order of tokens. Received: "
                f"layer={masked.embedding_layer.name!r}, encoder={name}"
            )


def propagate_masks(blocks):
    """Makes every layer of a functional model propagate Keras masks of tokens."""
    for layer in all_layers(blocks):
        layer.supports_masking = True
    # A token mask has no meaning for pooled features: losses would use it as sample
    # weights.
    for layer in (blocks, *blocks.layers):
        if any(len(x.shape) != 3 for x in tree.flatten(layer.output)):
            layer.compute_mask = _no_mask


def _no_mask(inputs, previous_mask=None):
    return None


def _outputs(blocks, *inputs_of_runs, visible=None):
    """Returns pairs of outputs of `blocks` on two inputs, with random weights."""

    def run(inputs):
        # Use the dtype of the blocks, because a cast would lose the mask.
        inputs = [
            ops.convert_to_tensor(x, dtype=y.dtype)
            for x, y in zip(inputs, blocks.inputs)
        ]
        if visible is not None:
            inputs[0] = PutMask()(inputs[0], mask=ops.convert_to_tensor(visible))
        with random_weights(blocks):
            outputs = blocks(inputs if len(inputs) > 1 else inputs[0], training=False)
        outputs = tree.flatten(outputs)
        return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in outputs]

    return zip(*map(run, inputs_of_runs))


def random_weights(model, signs=np.positive):
    """Returns a scope in which the weights of a model have random values.

    A zero weight (LayerScale, a fresh residual branch) would hide a leak that appears
    later in training.

    Args:
        model: A built Keras model.
        signs: Function that changes the signs of an array of values around zero.
    """
    # Larger weights repeat these values, because generating all of them takes ten times
    # as long. Their number is prime, so that rows differ.
    numbers = 0.1 * np.random.default_rng(0).standard_normal(65_537, "float32")
    values, shared, states = [], {}, {id(v) for v in state_variables(model)}
    for index, variable in enumerate(model.variables):
        if keras.backend.is_float_dtype(variable.dtype):
            # A large encoder is not copied: three tensors serve all weights of a shape,
            # so that query, key and value differ.
            is_state = id(variable) in states
            key = index % 3, variable.shape, variable.dtype, is_state
            if key not in shared:
                value = np.resize(np.roll(numbers, 997 * index), variable.shape)
                # A state may be a variance, which must be positive. A frozen weight
                # has values of both signs.
                value = np.abs(value) + 0.01 if is_state else signs(value)
                shared[key] = ops.convert_to_tensor(value, dtype=variable.dtype)
            values.append((variable, shared[key]))
    return keras.StatelessScope(state_mapping=values)
