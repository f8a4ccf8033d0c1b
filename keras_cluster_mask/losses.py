"""Contrastive losses: pure functions on embeddings.

A loss takes a batch of image embeddings and a batch of text embeddings. Row i of both
belongs to the same pair. The loss compares every image with every text. It is a mean
over pairs, so it can also be computed a few rows at a time: `batch_loss` does so for a
batch that is large, or split over replicas.
"""

import types
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_cluster_mask.checks import fits_shape
from keras_cluster_mask.distribution.backends import in_full_precision
from keras_cluster_mask.distribution.chunks import map_chunks, merge_chunks
from keras_cluster_mask.distribution.replicas import (
    all_gather,
    parts_of_batch,
    replica_index,
)
from keras_cluster_mask.types import Tensor

__all__ = ["sigmoid_contrastive_loss", "softmax_contrastive_loss"]

# The number of comparisons that a device computes at a time. A matrix takes 64 MiB, and
# a few are in memory at once. A batch of 4,096 on one device is one block.
MAX_PAIRS = 2**24

# Constants of the hash of captions, as signed numbers.
HASH_STEP = 0x9E3779B1 - 2**32
HASH_KEYS = (0x243F6A88, 0x85A308D3 - 2**32)
HASH_ROUNDS = ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1))


def __dir__():
    return __all__


def softmax_contrastive_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
) -> Tensor:
    """Computes the softmax loss of CLIP (InfoNCE), images to texts and vice versa.

    The loss is the mean of the cross-entropies over the rows and over the columns of
    the matrix of scaled similarities. With labels, all pairs with equal labels are
    positives of one another and share the target equally.

    Example:

    ```python
    images = np.eye(4, 8, dtype="float32")
    texts = np.eye(4, 8, dtype="float32")
    kcm.losses.softmax_contrastive_loss(images, texts, logit_scale=100.0)  # 0.0
    ```

    Args:
        image_embeddings: `(batch, d)` float tensor, L2-normalized.
        text_embeddings: `(batch, d)` float tensor, L2-normalized.
        logit_scale: Scalar, the multiplicative scale (1 / temperature).
        labels: `(batch,)` or `(batch, k)` int tensor; pairs with equal rows
            are positives. By default each pair is its own class.

    Returns:
        A scalar float32 tensor.

    Reference:
        - [Learning Transferable Visual Models From Natural Language Supervision](
          https://arxiv.org/abs/2103.00020)
        - [Unified Contrastive Learning in Image-Text-Label Space](
          https://arxiv.org/abs/2204.03610) for positives by label.
    """
    return _mean_loss(
        "softmax", [logit_scale], image_embeddings, text_embeddings, labels
    )


def sigmoid_contrastive_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    labels: Tensor | None = None,
) -> Tensor:
    """Computes the sigmoid loss of SigLIP: a binary classification of each pair.

    The loss is the sum of the binary cross-entropies of all image-text pairs, divided
    by the batch size.

    Example:

    ```python
    images = np.eye(4, 8, dtype="float32")
    texts = np.eye(4, 8, dtype="float32")
    kcm.losses.sigmoid_contrastive_loss(images, texts, 10.0, -10.0)  # 0.693...
    ```

    Args:
        image_embeddings: `(batch, d)` float tensor, L2-normalized.
        text_embeddings: `(batch, d)` float tensor, L2-normalized.
        logit_scale: Scalar, the multiplicative scale (1 / temperature).
        logit_bias: Scalar, added to the scaled similarity. Starts at -10, because
            nearly all pairs are negatives.
        labels: `(batch,)` or `(batch, k)` int tensor; pairs with equal rows
            are positives. By default each pair is its own class.

    Returns:
        A scalar float32 tensor.

    Reference:
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """
    weights = [logit_scale, logit_bias]
    return _mean_loss("sigmoid", weights, image_embeddings, text_embeddings, labels)


# === Loss of a batch, in blocks of rows ===


def batch_loss(
    loss: str,
    weights: Sequence[Tensor | float],
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    is_split: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compares each pair of a batch with all others, one block of rows at a time.

    Only one block of the similarity matrix is in memory at a time. The backward pass
    recomputes the blocks. Each replica compares its own rows with the whole batch.

    Args:
        loss: `"softmax"` or `"sigmoid"`.
        weights: List of scalars: the scale and, for the sigmoid loss, the bias.
        images: `(batch, d)` embeddings of this replica.
        texts: `(batch, d)` embeddings of this replica.
        labels: `(batch,)` or `(batch, k)` int tensor; pairs with equal labels are
            positives.
        sample_weight: `(batch,)` floats, the weight of each pair in both directions.
        is_split: Boolean. Whether the batch is split over replicas.

    Returns:
        A tuple of two `(batch,)` float32 tensors: the weighted losses, and the
        accuracies. The accuracy of a pair is the mean over both directions: 1 where the
        most similar text, or image, is a positive, else 0.
    """
    rows = (images, texts, labels)
    if sample_weight is not None:
        rows = (*rows, sample_weight)
    batch = tuple(map(all_gather, rows)) if is_split else rows

    def compare_block(weights, state, index, rows):
        weights, batch = weights
        similarities, positives = compare(rows[:3], batch[:3])
        sample_weights = [*rows[3:], *batch[3:]]
        losses = row_losses(loss, weights, similarities, positives, sample_weights)
        best = [ops.argmax(x, axis=1)[:, None] for x in similarities]
        hits = [ops.take_along_axis(positives, x, axis=1)[:, 0] for x in best]
        return (losses, sum(hits) / 2.0), state

    num_rows, num_all, num_blocks = images.shape[0], batch[0].shape[0], 1
    if num_rows is not None and num_rows * num_all > MAX_PAIRS:
        num_blocks = _num_blocks(num_rows, num_all)
    weights = weights, batch
    if num_blocks == 1:
        return compare_block(weights, (), 0, rows)[0]
    if num_rows % num_blocks:
        # Pad the last block with the first rows, and drop their outputs. Rows of zeros
        # would have no positives, and NaN gradients.
        missing = -num_rows % num_blocks
        rows = [ops.concatenate([x, x[:missing]]) for x in rows]
    outputs, _ = map_chunks(compare_block, num_blocks, weights, (), rows)
    return tuple(merge_chunks(x)[:num_rows] for x in outputs)


def row_labels(rows: Tensor) -> Tensor:
    """Numbers the pairs of a batch, so that each is a negative of all others.

    Args:
        rows: `(batch, ...)` tensor.

    Returns:
        `(batch, 2)` int tensor: the row, and the replica, which numbers its own rows.
    """
    rows = ops.arange(ops.shape(rows)[0])
    return ops.stack([rows, ops.full_like(rows, replica_index())], axis=1)


def without_padding(
    family: Any,
    token_ids: Any,
    padding_mask: Any = None,
    xp: types.ModuleType = ops,
) -> Any:
    """Replaces the tokens after the end of each text, and hidden ones, by -1.

    Rows of one text are equal then, whatever they were padded with, up to the number of
    -1 at their ends.

    Args:
        family: The `TextFamily` of the text encoder.
        token_ids: `(batch, T)` ints.
        padding_mask: `(batch, T)` array, 0 for hidden tokens. By default padding is
            hidden.
        xp: `keras.ops`, or `numpy` for arrays on the host.

    Returns:
        `(batch, T)` int32 tensor, or array.
    """
    ids = xp.array(token_ids, "int32")
    if family.pooling in ("highest id", "end token"):
        values = ids
        if family.pooling == "end token":
            values = xp.array(ids == family.end_id, "int32")
        ends = xp.argmax(values, axis=1)
        # A graph of `tf.data` need not know the number of tokens.
        is_read = xp.cumsum(xp.ones_like(ids), axis=1) <= ends[:, None] + 1
    elif padding_mask is not None:
        is_read = xp.array(padding_mask, "bool")
    else:
        is_read = ids != family.padding_id
    return xp.where(is_read, ids, -1)


def caption_labels(token_ids: Tensor) -> Tensor:
    """Hashes captions, so that equal captions have equal labels.

    A label is a 64-bit hash in two integers. Millions of pairs of captions are compared
    at a time, too many to compare token by token. Among 32,768 different captions, two
    have the same hash with a probability of 3e-11.

    Args:
        token_ids: `(batch, T)` int tensor. Negative ids, as from `without_padding`, do
            not count, so that a label does not depend on the length to which texts are
            padded.

    Returns:
        `(batch, 2)` int32 tensor.
    """
    token_ids = ops.cast(token_ids, "int32")
    position = ops.arange(ops.shape(token_ids)[1], dtype="int32")
    # The sum ignores the order of tokens, so each token is hashed with its position.
    placed = token_ids + HASH_STEP * position
    hashes = []
    for key in HASH_KEYS:
        x = ops.bitwise_xor(placed, key)
        # The finalizer of MurmurHash3 (https://github.com/aappleby/smhasher): each bit
        # of the input changes about half the bits of the output. Integer overflow is
        # intended.
        for shift, factor in HASH_ROUNDS:
            x = ops.bitwise_xor(x, ops.bitwise_right_shift(x, shift)) * factor
        hashes.append(ops.sum(ops.where(token_ids < 0, 0, x), axis=1))
    return ops.stack(hashes, axis=1)


@in_full_precision
def compare(
    rows: Sequence[Tensor], everything: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Compares some pairs with all pairs of the batch.

    Args:
        rows: Tuple of `(rows, d)` image embeddings, `(rows, d)` text embeddings and
            `(rows,)` or `(rows, k)` int labels.
        everything: The same for the whole batch.

    Returns:
        A tuple `((image_to_text, text_to_image), positives)` of `(rows, batch)`
        float32 tensors: similarities, and 1 where labels are equal, else 0.
    """
    images, texts, labels = rows
    all_images, all_texts, all_labels = everything
    # Always use float32. Scaled by up to 100, a similarity in bfloat16 would be off by
    # a third of a logit.
    images, texts, all_images, all_texts = (
        ops.cast(x, "float32") for x in (images, texts, all_images, all_texts)
    )
    similarities = (
        ops.matmul(images, ops.transpose(all_texts)),
        ops.matmul(texts, ops.transpose(all_images)),
    )
    labels, all_labels = map(ops.convert_to_tensor, (labels, all_labels))
    if len(labels.shape) == 1:
        labels, all_labels = labels[:, None], all_labels[:, None]
    positives = ops.all(labels[:, None] == all_labels[None], axis=-1)
    return similarities, ops.cast(positives, "float32")


def row_losses(
    loss: str,
    weights: Sequence[Tensor | float],
    similarities: tuple[Tensor, Tensor],
    positives: Tensor,
    sample_weights: Sequence[Tensor] = (),
) -> Tensor:
    """Computes the contribution of each pair to the loss.

    Args:
        loss: `"softmax"` or `"sigmoid"`.
        weights: List of scalars: the scale and, for the sigmoid loss, the bias.
        similarities: Two `(rows, batch)` tensors: of the rows' images to all texts, and
            of the rows' texts to all images.
        positives: `(rows, batch)` float tensor of zeros and ones.
        sample_weights: Two tensors, `(rows,)` and `(batch,)`: the weights of these
            pairs and of all pairs. By default all weights are 1.

    Returns:
        `(rows,)` float32 tensor. The loss is its mean over the batch.
    """
    scale, *bias = (ops.cast(x, "float32") for x in weights)
    if loss == "softmax":
        # Positives are symmetric, so both directions share their targets.
        targets = positives / ops.sum(positives, axis=1, keepdims=True)
        of_texts, of_images = (ops.log_softmax(scale * x, axis=1) for x in similarities)
        losses = -ops.sum(targets * (of_texts + of_images), axis=1) / 2.0
        return losses * sample_weights[0] if sample_weights else losses
    logits = scale * similarities[0] + bias[0]
    log_likelihood = ops.log_sigmoid((2.0 * positives - 1.0) * logits)
    if sample_weights:
        # A comparison has the mean weight of its image's pair and its text's pair.
        of_image, of_text = sample_weights[0][:, None], sample_weights[1][None]
        log_likelihood = (of_image + of_text) / 2.0 * log_likelihood
    return -ops.sum(log_likelihood, axis=1)


def _mean_loss(loss, weights, image_embeddings, text_embeddings, labels):
    images = ops.convert_to_tensor(image_embeddings)
    texts = ops.convert_to_tensor(text_embeddings)
    if len(images.shape) != 2 or not fits_shape(images.shape, texts.shape):
        raise ValueError(
            "`image_embeddings` and `text_embeddings` must have the same shape (batch, "
            f"d). Received: image_embeddings.shape={tuple(images.shape)}, "
            f"text_embeddings.shape={tuple(texts.shape)}"
        )
    if labels is None:
        labels = ops.arange(ops.shape(images)[0])
    labels = ops.convert_to_tensor(labels)
    if len(labels.shape) > 2 or not fits_shape(labels.shape[:1], images.shape[:1]):
        raise ValueError(
            "`labels` must have one row per pair. Received: shape "
            f"{tuple(labels.shape)}"
        )
    losses, _ = batch_loss(loss, weights, images, texts, labels, is_split=False)
    return ops.mean(losses)


def _num_blocks(rows, batch):
    # On JAX a step sees the rows of all devices.
    rows = -(-rows // parts_of_batch())
    least = -(-rows // max(1, MAX_PAIRS // batch))
    # Prefer a few more blocks if they divide the rows. Then no padding is needed, and
    # devices that share the rows evenly also share the blocks evenly.
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)
