"""From what an encoder takes to embeddings of length 1."""

from keras import ops


def call_encoder(encoder, value, training):
    """Calls an encoder on one tensor, whether it takes a tensor or a dictionary."""
    inputs = getattr(encoder, "input", None)
    if isinstance(inputs, dict) and len(inputs) == 1:
        value = dict.fromkeys(inputs, value)
    features = encoder(value, training=training)
    if not hasattr(features, "shape") or len(features.shape) != 2:
        raise ValueError(
            "An encoder must return features of shape (batch, d); add a pooling to one "
            f"that returns tokens. Received: {encoder.name} returned "
            f"{getattr(features, 'shape', type(features).__name__)}"
        )
    return features


def l2_normalize(features):
    """Float32 rows of length 1, with a finite gradient at 0."""
    # `keras.ops.normalize` has a NaN gradient at a zero vector on JAX and torch.
    x = ops.cast(features, "float32")
    length = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(length, 1e-12))
