"""Work on a batch in chunks, and work that is done again for its gradients."""

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

    weights, state, rows = tree.map_structure(_as_tensor, (weights, state, rows))
    state = tree.map_structure(ops.stop_gradient, state)

    def one(state, index):
        chunk = tree.map_structure(lambda x: take_chunk(x, index, num_chunks), rows)
        outputs, state = run_again(function, weights, state, index, chunk)
        return tree.map_structure(ops.stop_gradient, state), outputs

    if keras.backend.backend() == "jax":
        # Compiled, a loop that is written out holds the activations of all chunks.
        state, outputs = ops.scan(one, state, ops.arange(num_chunks))
        return outputs, state
    # A loop of the graph holds what `recompute_grad` is there to forget.
    columns = []
    for index in range(num_chunks):
        state, outputs = one(state, ops.convert_to_tensor(index, "int32"))
        columns.append(outputs)
    return tree.map_structure(lambda *column: ops.stack(column), *columns), state


def run_again(function, *arguments):
    """Runs a function, and again for its gradients, holding nothing in between.

    Args:
        function: `function(*arguments)`. It must take all that it differentiates from
            its arguments, and its first output must be a float.
        *arguments: Structures of tensors or variables; it is passed tensors.

    Returns:
        What the function returns, a structure of tensors.
    """
    arguments = tree.map_structure(_as_tensor, arguments)
    bools = [
        keras.backend.standardize_dtype(x.dtype) == "bool"
        for x in tree.flatten(arguments)
    ]
    structure = []

    # Flat lists of tensors, since `tf.recompute_grad` takes nothing else; nor bools.
    def flat_function(*flat):
        flat = [ops.cast(x, "bool") if y else x for x, y in zip(flat, bools)]
        outputs = function(*tree.pack_sequence_as(arguments, flat))
        structure[:] = [tree.map_structure(lambda x: None, outputs)]
        return tuple(tree.flatten(outputs))

    flat = tree.flatten(arguments)
    flat = [ops.cast(x, "int32") if y else x for x, y in zip(flat, bools)]
    flat = keras.remat(flat_function)(*flat)
    return tree.pack_sequence_as(structure[0], list(flat))


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
