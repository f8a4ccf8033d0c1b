"""What differs between backends: chunks of a batch, and batches over many devices.

The rest of the library is written once, in `keras.ops`. JAX sees the global batch
whatever the number of devices; TensorFlow and torch run the same step on every
replica, each with its own rows of the batch.
"""

import keras
from keras import ops, tree


def in_chunks(function, num_chunks, weights, state, rows):
    """Runs a function on one chunk of rows after another, forgetting what it can.

    The activations of a chunk are thrown away and computed again when its gradients
    are, so that only one chunk's are held at a time. Chunk `i` of `n` consists of the
    rows `i, i + n, i + 2 n, ...`: if consecutive rows lie on different devices, every
    chunk occupies all of them.

    Args:
        function: `function(weights, state, index, rows) -> (outputs, state)`. It must
            take all that it differentiates from its arguments, and its first output
            must be a float.
        num_chunks: Integer that divides the number of rows.
        weights: Structure of tensors, the same for all chunks.
        state: Structure of tensors handed on from chunk to chunk. No gradients pass.
        rows: Structure of tensors `(batch, ...)`, of which each chunk gets its part.

    Returns:
        A tuple: the outputs, stacked over chunks along a new first axis, and the last
        state. `merge_chunks` brings rows back into their order.
    """

    # Flat lists of tensors, since `tf.recompute_grad` takes nothing else.
    def flat_function(*flat):
        weights, state, index, rows = tree.pack_sequence_as(example, list(flat))
        outputs, state = function(weights, state, index, rows)
        structures[:] = outputs, state
        return tuple(tree.flatten(outputs)), tuple(tree.flatten(state))

    structures = []
    weights, state, rows = tree.map_structure(_as_tensor, (weights, state, rows))
    state = tree.map_structure(ops.stop_gradient, state)
    example = (weights, state, 0, rows)
    once_more = keras.remat(flat_function)

    def one(state, index):
        chunk = tree.map_structure(lambda x: take_chunk(x, index, num_chunks), rows)
        arguments = tree.flatten((weights, tree.pack_sequence_as(example[1], state)))
        outputs, state = once_more(*arguments, index, *tree.flatten(chunk))
        return tuple(map(ops.stop_gradient, state)), outputs

    state = tuple(tree.flatten(state))
    if keras.backend.backend() == "jax":
        # Compiled, a loop that is written out holds the activations of all chunks.
        state, outputs = ops.scan(one, state, ops.arange(num_chunks))
    else:
        # A loop of the graph holds what `recompute_grad` is there to forget.
        columns = []
        for index in range(num_chunks):
            state, outputs = one(state, ops.convert_to_tensor(index, "int32"))
            columns.append(outputs)
        outputs = [ops.stack(column) for column in zip(*columns)]
    outputs = tree.pack_sequence_as(structures[0], list(outputs))
    return outputs, tree.pack_sequence_as(structures[1], list(state))


def merge_chunks(x):
    """`(chunks, rows of a chunk, ...)` to `(batch, ...)`, in the order of the batch."""
    x = ops.swapaxes(x, 0, 1)
    return ops.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def take_chunk(x, index, num_chunks):
    split = ops.reshape(x, (x.shape[0] // num_chunks, num_chunks, *x.shape[1:]))
    return split[:, index]


def _as_tensor(x):
    x = x.value if isinstance(x, keras.Variable) else ops.convert_to_tensor(x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Of a variable in an argument `recompute_grad` counts the gradient twice.
        x = tf.convert_to_tensor(x)
    return x
