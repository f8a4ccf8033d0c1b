"""Runs functions on a batch in chunks, and recomputes them in the backward pass."""

import functools

import keras
from keras import ops, tree


def map_chunks(function, num_chunks, weights, state, rows):
    """Runs a function on one chunk of rows after another.

    The activations of a chunk are recomputed in the backward pass, so that only those
    of one chunk are in memory at a time. Chunk `i` of `n` consists of the rows
    `i, i + n, i + 2 n, ...`: if consecutive rows are on different devices, every chunk
    uses all of them.

    Args:
        function: `function(weights, state, index, rows) -> (outputs, state)`. It must
            receive everything that it differentiates as arguments, and its first output
            must be a float.
        num_chunks: Integer that divides the number of rows.
        weights: Structure of tensors, the same for all chunks. Their gradients are
            computed, so frozen values should be captured by the function instead.
        state: Structure of tensors that is passed from chunk to chunk, without
            gradients.
        rows: Structure of tensors `(batch, ...)`. Each chunk gets its part.

    Returns:
        A tuple: the outputs, stacked over chunks along a new first axis, and the last
        state. `merge_chunks` restores the order of the rows.
    """
    weights, state, rows = tree.map_structure(as_tensor, (weights, state, rows))
    state = tree.map_structure(ops.stop_gradient, state)

    if keras.backend.backend() == "tensorflow":
        recomputed = functools.partial(_recompute_on_tensorflow, function)
    else:
        recomputed = keras.remat(function)

    def one(state, index):
        chunk = tree.map_structure(lambda x: take_chunk(x, index, num_chunks), rows)
        outputs, state = recomputed(weights, state, index, chunk)
        return tree.map_structure(ops.stop_gradient, state), outputs

    if keras.backend.backend() == "tensorflow":
        state, outputs = _scan_on_tensorflow(one, state, num_chunks)
    elif keras.backend.backend() == "torch":
        # The index is an integer, not a tensor for which the host would have to wait.
        found = []
        for index in range(num_chunks):
            state, outputs = one(state, index)
            found.append(outputs)
        outputs = tree.map_structure(lambda *parts: ops.stack(parts), *found)
    else:
        # XLA would hold the activations of all chunks of an unrolled loop.
        state, outputs = ops.scan(one, state, ops.arange(num_chunks))
    return outputs, state


def _scan_on_tensorflow(function, carry, length):
    """Works like `jax.lax.scan` over indices, by a loop that XLA can compile.

    A Python loop would copy the function into the graph for each chunk.
    """
    import tensorflow as tf

    structure = []

    def step(index, flat, columns=None):
        after, outputs = function(tree.pack_sequence_as(carry, flat), index)
        structure[:] = [outputs]
        outputs = tree.flatten(outputs)
        columns = columns or [
            tf.TensorArray(x.dtype, length, element_shape=x.shape) for x in outputs
        ]
        columns = [column.write(index, x) for column, x in zip(columns, outputs)]
        return index + 1, tree.flatten(after), columns

    # The first step runs outside of the loop, to find the shapes of the outputs.
    _, flat, columns = tf.while_loop(
        lambda index, *_: index < length,
        step,
        step(tf.constant(0), tree.flatten(carry)),
        # Parallel steps would hold their activations in memory at the same time.
        parallel_iterations=1,
        # XLA must know how many values the gradient of the loop needs.
        maximum_iterations=length,
    )
    columns = [column.stack() for column in columns]
    return (
        tree.pack_sequence_as(carry, flat),
        tree.pack_sequence_as(structure[0], columns),
    )


def _recompute_on_tensorflow(function, *arguments):
    """Works like a function of `keras.remat`, for one that runs in a loop.

    `tf.recompute_grad` copies its arguments, here all weights in each step, so that the
    graph does not share the two computations. Those of two loops are never shared.
    """
    import tensorflow as tf

    structure = []

    @tf.custom_gradient
    def run(*flat):
        outputs = function(*tree.pack_sequence_as(arguments, flat))
        structure[:] = [outputs]
        outputs = tree.flatten(outputs)

        def gradient(*upstream):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                inputs = [tf.identity(x) for x in flat]
                sources = [x for x in inputs if x.dtype.is_floating]
                tape.watch(sources)
                found = tree.flatten(
                    function(*tree.pack_sequence_as(arguments, inputs))
                )
            floats = [i for i, x in enumerate(outputs) if x.dtype.is_floating]
            found = tape.gradient(
                [found[i] for i in floats],
                sources,
                [upstream[i] for i in floats],
                tf.UnconnectedGradients.ZERO,
            )
            found = iter(found)
            return [next(found) if x.dtype.is_floating else None for x in flat]

        return outputs, gradient

    flat = run(*tree.flatten(arguments))
    return tree.pack_sequence_as(structure[0], flat)


def map_rows(function, max_rows, rows):
    """Runs a function on blocks of rows of a batch, one after another, on torch.

    torch runs each operation by itself, so all intermediate results of a large batch
    would be in memory. On the other backends XLA plans the use of memory.

    Args:
        function: `function(*rows) -> outputs`, in which rows do not depend on each
            other.
        max_rows: Integer. The maximum number of rows at a time.
        rows: List of tensors `(batch, ...)` or `None`.

    Returns:
        A tensor `(batch, ...)`.
    """
    batch = next(x.shape[0] for x in rows if x is not None)
    if keras.backend.backend() != "torch" or batch <= max_rows:
        return function(*rows)
    outputs = []
    for start in range(0, batch, max_rows):
        block = slice(start, start + max_rows)
        outputs.append(function(*(None if x is None else x[block] for x in rows)))
    return ops.concatenate(outputs)


def merge_chunks(x):
    """Reshapes `(chunks, rows, ...)` to `(batch, ...)`, in the order of the batch."""
    chunks, rows, *sizes = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 0, 1), (rows * chunks, *sizes))


def take_chunk(x, index, num_chunks):
    """Returns the rows of one chunk, see `map_chunks`."""
    # TensorFlow need not know the number of rows, nor the length of texts.
    rows, *sizes = ops.shape(x)
    split = ops.reshape(x, (rows // num_chunks, num_chunks, *sizes))
    return split[:, index]


def as_tensor(x):
    """Returns the current value of a variable or tensor."""
    x = ops.convert_to_tensor(x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # `recompute_grad` counts the gradient of a variable argument twice.
        x = tf.convert_to_tensor(x)
    return x
