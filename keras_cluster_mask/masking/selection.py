"""How patches are ordered by their scores, and other code that maskings share."""

import keras
from keras import ops


def order_by_score(score, noise):
    """Returns patch indices from the highest score to the lowest.

    Args:
        score: `(batch, N)` float32 tensor.
        noise: `(batch, N)` float32 tensor. Among equal scores, the larger noise comes
            first.

    Returns:
        `(batch, N)` int32 tensor of indices.
    """
    # `argsort` is stable on all backends (`top_k` is not on torch), so sorting by noise
    # and then by score orders by both.
    by_noise = ops.argsort(-noise, axis=-1)
    by_score = ops.argsort(-ops.take_along_axis(score, by_noise, axis=1), axis=-1)
    return ops.cast(ops.take_along_axis(by_noise, by_score, axis=1), "int32")


def second_draw(noise):
    """Takes a second draw from the lower bits of the noise.

    Args:
        noise: `(batch, N)` float32 tensor in `[0, 1)`.

    Returns:
        `(batch, N)` float32 tensor in `[0, 1)`, independent of the first 12 bits of
        the noise.
    """
    # Exact, so equal on all backends, because 4096 is a power of two.
    return noise * 4096.0 % 1.0


def rest_count(num_patches, ratio):
    """Returns `num_patches` without the fraction `ratio`, rounded down."""
    # 1e-6 corrects products such as 10 * (1 - 0.9) = 0.99999...
    return int(num_patches * (1.0 - ratio) + 1e-6)


def anchor_count(num_patches, ratio):
    """Returns the fraction `ratio` of `num_patches`, rounded up, at least 1."""
    return max(1, num_patches - rest_count(num_patches, ratio))


def add_state(layer, name, value, dtype="float32"):
    """Adds a scalar weight to a layer, which is not trained.

    Args:
        layer: A Keras layer, such as a `PatchMasking`.
        name: String.
        value: Number, the initial value.
        dtype: String. Integers are equal on all replicas, and floats are averaged.
    """
    return layer.add_weight(
        shape=(),
        initializer=keras.initializers.Constant(value),
        trainable=False,
        dtype=dtype,
        autocast=False,
        aggregation="only_first_replica" if dtype == "int32" else "mean",
        name=name,
    )


class PutMask(keras.layers.Layer):
    """Attaches a Keras mask to tokens."""

    def __init__(self):
        super().__init__(name="put_mask")
        self.autocast = False
        self.supports_masking = True

    def call(self, tokens, mask):
        return tokens
