"""The loss of a global batch, in blocks of rows."""

import numpy as np
from keras import ops

from keras_cluster_mask.distribution.chunks import map_chunks, merge_chunks
from keras_cluster_mask.distribution.replicas import all_gather
from keras_cluster_mask.losses import compare, row_hits

# How many pairs are compared at a time: 64 MiB a matrix, a handful of which are in
# memory at once. A batch of 4,096 is one block.
MAX_PAIRS = 2**24


def batch_loss(row_losses, weights, images, texts, labels, is_split=True):
    """Compares each pair of a batch with all others, one block of rows at a time.

    Only one block of the similarity matrix exists at a time; the blocks are recomputed
    for the gradients. Each replica compares its own rows with the whole batch.

    Args:
        row_losses: `row_losses(similarities, positives, weights)`, the `(rows,)`
            losses of the first two outputs of `losses.compare`.
        weights: Structure of scalars, passed to `row_losses`.
        images: `(batch, d)` embeddings of this replica.
        texts: `(batch, d)` embeddings of this replica.
        labels: `(batch,)` or `(batch, k)` int tensor; equal ones are positives.
        is_split: Boolean. Whether replicas have different rows of one batch.

    Returns:
        A tuple of three `(batch,)` float32 tensors: losses, and 1 where the most
        similar text, and the most similar image, is a positive.
    """
    rows = images, texts, labels
    batch = tuple(map(all_gather, rows)) if is_split else rows

    def compare_block(weights, state, index, rows):
        weights, batch = weights
        similarities, positives = compare(rows, batch)
        losses = row_losses(similarities, positives, weights)
        hits = [row_hits(ops.stop_gradient(x), positives) for x in similarities]
        return (losses, *hits), state

    num_blocks = _num_blocks(images.shape[0], batch[0].shape[0])
    weights = weights, batch
    if num_blocks == 1:
        return compare_block(weights, (), 0, rows)[0]
    outputs, _ = map_chunks(compare_block, num_blocks, weights, (), rows)
    return tuple(merge_chunks(x) for x in outputs)


def caption_labels(token_ids):
    """Two numbers per caption that are equal for equal captions.

    A 64-bit hash: millions of pairs of captions are compared at a time, too many to
    compare them token by token. Among 32,768 different captions, two have the same hash
    with a probability of 3e-11.

    Args:
        token_ids: `(batch, T)` int tensor.

    Returns:
        `(batch, 2)` int32 tensor.
    """
    token_ids = ops.cast(token_ids, "int32")
    position = ops.arange(ops.shape(token_ids)[1], dtype="int32")
    # The sum is blind to the order of positions, so each token is hashed with its own.
    placed = token_ids + _int32(0x9E3779B1) * position
    return ops.stack(
        [
            ops.sum(_scramble(ops.bitwise_xor(placed, _int32(key))), axis=1)
            for key in (0x243F6A88, 0x85A308D3)
        ],
        axis=1,
    )


def _num_blocks(rows, batch):
    if rows is None:
        return 1
    block_size = max(1, MAX_PAIRS // batch)
    return next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows <= n * block_size
    )


def _scramble(x):
    # The finaliser of MurmurHash3 (https://github.com/aappleby/smhasher): each bit of
    # the input changes half the bits of the output. Products wrap around on purpose.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ops.bitwise_xor(x, ops.bitwise_right_shift(x, _int32(shift)))
        x = x * _int32(factor)
    return x


def _int32(number):
    return int(np.array(number, "uint32").astype("int32"))
