"""Contrastive losses: pure functions on embeddings.

Both take a batch of image embeddings and a batch of text embeddings, row i of
one belonging to row i of the other, and compare every image with every text.
"""

from keras import ops


def softmax_contrastive_loss(
    image_embeddings, text_embeddings, logit_scale, labels=None
):
    """The loss of CLIP: each image picks its text among all, and the reverse.

    Cross-entropy over the rows and over the columns of the matrix of scaled
    similarities, averaged. With labels, all pairs of equal label are positives
    of one another and share the target equally.

    Example:

    ```python
    images = np.eye(4, 8, dtype="float32")
    texts = np.eye(4, 8, dtype="float32")
    kcm.losses.softmax_contrastive_loss(images, texts, logit_scale=100.0)  # 0.0
    ```

    Args:
        image_embeddings: `(batch, d)` float tensor, L2-normalised.
        text_embeddings: `(batch, d)` float tensor, L2-normalised.
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
    similarity = pairwise_similarity(image_embeddings, text_embeddings)
    logits = ops.cast(logit_scale, "float32") * similarity
    positives = positive_pairs(similarity, labels)
    targets = positives / ops.sum(positives, axis=1, keepdims=True)
    # Targets are symmetric before normalisation, so both directions share them.
    image_to_text = -ops.sum(targets * ops.log_softmax(logits, axis=1), axis=1)
    text_to_image = -ops.sum(
        targets * ops.log_softmax(ops.transpose(logits), axis=1), axis=1
    )
    return (ops.mean(image_to_text) + ops.mean(text_to_image)) / 2.0


def sigmoid_contrastive_loss(
    image_embeddings, text_embeddings, logit_scale, logit_bias, labels=None
):
    """The loss of SigLIP: each image-text pair is a yes-or-no question.

    The sum of the binary cross-entropies of all pairs, over the batch size.

    Example:

    ```python
    images = np.eye(4, 8, dtype="float32")
    texts = np.eye(4, 8, dtype="float32")
    kcm.losses.sigmoid_contrastive_loss(images, texts, 10.0, -10.0)  # 0.693...
    ```

    Args:
        image_embeddings: `(batch, d)` float tensor, L2-normalised.
        text_embeddings: `(batch, d)` float tensor, L2-normalised.
        logit_scale: Scalar, the multiplicative scale (1 / temperature).
        logit_bias: Scalar, added to the scaled similarity. Starts at -10, since
            nearly all pairs are negatives.
        labels: `(batch,)` or `(batch, k)` int tensor; pairs with equal rows
            are positives. By default each pair is its own class.

    Returns:
        A scalar float32 tensor.

    Reference:
        - [Sigmoid Loss for Language Image Pre-Training](
          https://arxiv.org/abs/2303.15343)
    """
    similarity = pairwise_similarity(image_embeddings, text_embeddings)
    logits = ops.cast(logit_scale, "float32") * similarity
    logits = logits + ops.cast(logit_bias, "float32")
    signs = 2.0 * positive_pairs(similarity, labels) - 1.0
    return -ops.mean(ops.sum(ops.log_sigmoid(signs * logits), axis=1))


def contrastive_accuracy(image_embeddings, text_embeddings, labels=None):
    """How often the most similar partner in the batch is a right one.

    Args:
        image_embeddings: `(batch, d)` float tensor, L2-normalised.
        text_embeddings: `(batch, d)` float tensor, L2-normalised.
        labels: As in the losses.

    Returns:
        A tuple of two scalars in `[0, 1]`: image to text, and text to image.
    """
    similarity = pairwise_similarity(image_embeddings, text_embeddings)
    positives = positive_pairs(similarity, labels)

    def accuracy(similarity):
        best = ops.expand_dims(ops.argmax(similarity, axis=1), -1)
        return ops.mean(ops.take_along_axis(positives, best, axis=1))

    return accuracy(similarity), accuracy(ops.transpose(similarity))


def pairwise_similarity(image_embeddings, text_embeddings):
    """`(batch, batch)` float32 products of all images with all texts."""
    images = ops.convert_to_tensor(image_embeddings)
    texts = ops.convert_to_tensor(text_embeddings)
    if len(images.shape) != 2 or len(texts.shape) != 2:
        raise ValueError(
            "Embeddings must have shape (batch, d). Received: "
            f"image_embeddings.shape={tuple(images.shape)}, "
            f"text_embeddings.shape={tuple(texts.shape)}"
        )
    for axis, name in ((0, "batch size"), (1, "width")):
        sizes = images.shape[axis], texts.shape[axis]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"Image and text embeddings must have the same {name}. Received: "
                f"image_embeddings.shape={tuple(images.shape)}, "
                f"text_embeddings.shape={tuple(texts.shape)}"
            )
    # Float32 whatever the towers compute in: scaled by up to 100, a similarity in
    # bfloat16 would be off by a third of a logit.
    images, texts = ops.cast(images, "float32"), ops.cast(texts, "float32")
    return ops.matmul(images, ops.transpose(texts))


def positive_pairs(similarity, labels=None):
    """`(batch, batch)` float32 matrix of 1 where a pair is positive, else 0."""
    if labels is None:
        own = ops.arange(ops.shape(similarity)[0])[:, None]
        return ops.cast(own == ops.transpose(own), "float32")
    labels = ops.convert_to_tensor(labels)
    if len(labels.shape) == 1:
        labels = labels[:, None]
    sizes = labels.shape[0], similarity.shape[0]
    if len(labels.shape) != 2 or (None not in sizes and sizes[0] != sizes[1]):
        raise ValueError(
            "`labels` must have shape (batch,) or (batch, k), one row a pair. "
            f"Received: labels.shape={tuple(labels.shape)}"
        )
    return ops.cast(ops.all(labels[:, None] == labels[None], axis=-1), "float32")
