from keras import ops


def order_by_score(score, noise):
    """Patch indices from the highest score to the lowest.

    Args:
        score: `(batch, N)` float32 tensor.
        noise: `(batch, N)` float32 tensor. Of equal scores the one with the
            larger noise comes first.

    Returns:
        `(batch, N)` int32 tensor of indices.
    """
    # `argsort` is stable on all backends (`top_k` is not on torch), so two
    # sorts, the lesser criterion first, order by both.
    by_noise = ops.argsort(-noise, axis=-1)
    by_score = ops.argsort(-ops.take_along_axis(score, by_noise, axis=1), axis=-1)
    return ops.cast(ops.take_along_axis(by_noise, by_score, axis=1), "int32")
