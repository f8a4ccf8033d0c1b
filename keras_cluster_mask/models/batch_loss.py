"""The loss of a batch without a matrix of all its pairs."""

from keras import ops

from keras_cluster_mask import distribution
from keras_cluster_mask.losses import compare, row_hits

# How many pairs are compared at a time if nothing else is asked for: 64 MiB a matrix,
# of which a handful live at once. A batch of 4,096 is compared in one go.
MAX_PAIRS = 2**24


def batch_loss(
    row_losses, weights, images, texts, labels, block_size=None, shared=True
):
    """Compares each pair of a batch with all, block by block of rows.

    Only `block_size` rows of the similarities exist at a time; those of other blocks
    are forgotten, and computed again for the gradients. On several replicas each
    compares its own rows with the whole batch.

    Args:
        row_losses: `row_losses(similarities, positives, weights)`, the `(rows,)`
            losses of the first two outputs of `losses.compare`.
        weights: Structure of scalars, handed to `row_losses`.
        images: `(batch, d)` embeddings of this replica.
        texts: `(batch, d)` embeddings of this replica.
        labels: `(batch,)` or `(batch, k)` int tensor; equal ones are positives.
        shared: Boolean. Whether replicas have different rows of one batch.
        block_size: Integer, the most rows at a time. By default as many as make
            `MAX_PAIRS` pairs.

    Returns:
        A tuple of three `(batch,)` float32 tensors: losses, and whether the most
        similar text and the most similar image were right.
    """
    rows = images, texts, labels
    everything = tuple(map(distribution.gather, rows)) if shared else rows

    def compare_block(weights, state, index, rows):
        weights, everything = weights
        similarities, positives = compare(rows, everything)
        losses = row_losses(similarities, positives, weights)
        hits = [row_hits(ops.stop_gradient(x), positives) for x in similarities]
        return (losses, *hits), state

    num_blocks = _num_blocks(images.shape[0], everything[0].shape[0], block_size)
    weights = weights, everything
    if num_blocks == 1:
        return compare_block(weights, (), 0, rows)[0]
    outputs, _ = distribution.in_chunks(compare_block, num_blocks, weights, (), rows)
    return tuple(distribution.merge_chunks(x) for x in outputs)


def _num_blocks(rows, batch, block_size):
    if rows is None:
        return 1
    if block_size is None:
        block_size = max(1, MAX_PAIRS // batch)
    return next(
        n for n in range(1, rows + 1) if rows % n == 0 and rows <= n * block_size
    )
