"""Embeds a batch in micro-batches, with the same result as embedding it at once."""

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.distribution.backends import compiles_steps, is_traced
from keras_cluster_mask.distribution.chunks import (
    as_tensor,
    map_chunks,
    merge_chunks,
)
from keras_cluster_mask.distribution.replicas import num_replicas
from keras_cluster_mask.training.layers import state_variables


def embed_in_micro_batches(model, embed, inputs, noise, micro_batch_size):
    """Embeds a training batch with the activations of one chunk in memory at a time.

    State is updated as by a single large batch:

    - The noise of a masking is drawn for the whole batch; each chunk takes its rows.
    - Other seeds advance from chunk to chunk, so that chunks differ in dropout.
    - Averages, such as batch normalization statistics or a masking's ratio, start from
      the same state in every chunk and are averaged over chunks.
    - Counters, such as a masking's step, advance once.

    Args:
        model: A `ContrastiveModel`.
        embed: Function from a batch, `training` and noise to embeddings.
        inputs: Dictionary, a batch.
        noise: `(batch, N)` tensor, the noise of the masking, or `None`.
        micro_batch_size: Integer.

    Returns:
        A tuple: a dictionary of embeddings `(batch, d)`, and a list with the loss that
        layers added, empty if there is none.
    """
    tower = model.text_tower
    taken = ("images", *tower.input_names)
    batch_size = ops.shape(inputs["token_ids"])[0] * num_replicas()
    # A step of TensorFlow need not know it. `InputRules` check it before.
    if isinstance(batch_size, int):
        check_micro_batches(batch_size, micro_batch_size, num_replicas())
    num_chunks = batch_size // micro_batch_size
    # The states of all seed generators are seeds.
    not_seeds = {id(v) for v in model.weights}
    seeds = [v for v in model.non_trainable_variables if id(v) not in not_seeds]
    others = [v for v in model.non_trainable_variables if id(v) in not_seeds]
    weights = model.trainable_variables
    variables = [*weights, *others, *seeds]
    other_values = [as_tensor(x) for x in snapshot(model, others)]
    updated = []
    inputs = {key: inputs[key] for key in taken if key in inputs}
    if noise is not None:
        inputs["noise"] = noise
    names = order = lengths = ()
    if not compiles_steps() and not is_traced(inputs["token_ids"]):
        names = tower.lengths.names
    if names:
        # Nothing is compiled, so each chunk is as long as its own longest text.
        texts = {key: x for key, x in inputs.items() if key in names}
        order, lengths = tower.lengths.chunked(texts, num_chunks)
        inputs |= {key: ops.take(x, order, axis=0) for key, x in texts.items()}

    def embed_chunk(weight_values, seed_values, index, chunk):
        values = [*weight_values, *other_values]

        for key in chunk.keys() & {*names}:
            chunk = chunk | {key: chunk[key][:, : lengths[index]]}

        outputs, extra_losses, after = call_statelessly(
            lambda: embed(chunk, True, chunk.get("noise")),
            variables,
            [*values, *seed_values],
        )
        after, seeds_after = after[: len(values)], after[len(values) :]
        # Keep only assigned values, or frozen weights would be stacked over chunks too.
        updated[:] = [v for v, x in zip(variables, after) if x is not None]
        assigned = [x for x in after if x is not None]
        seed_values = [y if x is None else x for x, y in zip(seeds_after, seed_values)]
        return (outputs, extra_losses, assigned), seed_values

    (embeddings, extra_losses, assigned), seed_values = map_chunks(
        embed_chunk,
        num_chunks,
        weights=snapshot(model, weights),
        state=snapshot(model, seeds),
        rows=inputs,
    )
    for seed, value in zip(seeds, seed_values):
        seed.assign(value)
    for variable, values in zip(updated, assigned):
        is_average = keras.backend.is_float_dtype(variable.dtype)
        variable.assign(ops.mean(values, axis=0) if is_average else values[0])
    embeddings = {name: merge_chunks(value) for name, value in embeddings.items()}
    if names:
        found = embeddings["text_embeddings"]
        embeddings["text_embeddings"] = ops.take(found, np.argsort(order), axis=0)
    return embeddings, [ops.mean(values) for values in extra_losses]


def check_micro_batches(batch_size: int, micro_batch_size: int, replicas: int):
    """Raises an error if the replicas cannot share micro-batches of this size."""
    if batch_size % micro_batch_size or micro_batch_size % replicas:
        raise ValueError(
            "`micro_batch_size` must divide the size of every batch, and be divisible "
            "by the number of replicas, which share each micro-batch. Received: "
            f"micro_batch_size={micro_batch_size}, a batch of {batch_size}, {replicas} "
            "replicas"
        )


# === A model as a function of its variables ===


def call_statelessly(function, variables, values):
    """Calls a function with other values of variables, without assigning them.

    Args:
        function: Function without arguments that calls layers. They train.
        variables: List of all variables of the layers.
        values: List of tensors, one for each variable.

    Returns:
        A tuple: the output of the function; a list with the loss that layers added,
        empty if there is none; and a list of the new values of the variables, `None`
        for variables that were not assigned.
    """
    mapping = list(zip(variables, values))
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        before = [scope.get_current_value(v) for v in variables]
        outputs = _Training(function)()
        losses = [sum(map(ops.sum, scope.losses))] if scope.losses else []
    after = [scope.get_current_value(v) for v in variables]
    return outputs, losses, [None if x is y else y for x, y in zip(before, after)]


class _Training(keras.layers.Layer):
    """Calls a function, in which all layers train.

    The backward pass recomputes a chunk outside of the call of a model, which would
    tell its layers that they train.
    """

    def __init__(self, function):
        super().__init__(name="training")
        self.function = function
        # Weights keep their dtype when the function reads them.
        self.autocast = False

    def call(self, training=True):
        return self.function()


def snapshot(layer, variables):
    """Returns the current values of variables, unaffected by later assignments.

    Weights, frozen or not, are not copied: they may be large, and nothing assigns them
    before the gradients are computed.
    """
    weights = {id(v) for v in layer.weights} - {id(v) for v in state_variables(layer)}
    return [v if id(v) in weights else ops.copy(v) for v in variables]
