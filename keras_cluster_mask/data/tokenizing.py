"""Applies any tokenizer to a batch of captions."""

import keras
import numpy as np


def is_layer(tokenizer):
    """Whether a tokenizer is a Keras layer, which can be part of a TensorFlow graph."""
    return isinstance(tokenizer, keras.layers.Layer)


def check_tokenizer(tokenizer):
    """Raises an error for a layer that does not return rows of equal length."""
    if is_layer(tokenizer) and hasattr(tokenizer, "end_token_id"):
        raise ValueError(
            "`tokenizer` must add a start and an end token and return rows of equal "
            "length, which this layer does not. Pass `keras_hub.models."
            "CLIPPreprocessor(tokenizer)` or `CLIPTokenizer.from_preset(...)` instead. "
            f"Received: {tokenizer}"
        )


def tokenize(tokenizer, captions):
    """The token ids of captions.

    Args:
        tokenizer: Callable from a list of bytes to ints, such as a `CLIPTokenizer`, or
            a Keras layer, which runs on TensorFlow.
        captions: list of bytes.

    Returns:
        int32 array `(batch, length)`.
    """
    if is_layer(tokenizer):
        return np.asarray(apply_layer(tokenizer, captions), "int32")
    token_ids = keras.ops.convert_to_numpy(tokenizer(captions))
    if token_ids.ndim != 2 or len(token_ids) != len(captions):
        raise ValueError(
            "`tokenizer` must return ints of shape (batch, length). Received: "
            f"shape {token_ids.shape} for {len(captions)} captions"
        )
    return token_ids.astype("int32")


def apply_layer(layer, captions):
    """The token ids of captions from a Keras layer.

    Args:
        layer: Keras layer, such as a KerasHub `CLIPPreprocessor`.
        captions: list of bytes, or string tensor `(batch,)`.

    Returns:
        int32 tensor `(batch, length)`.
    """
    import tensorflow as tf

    captions = tf.convert_to_tensor(captions, "string")
    # KerasHub's CLIP preprocessors take and return a dict.
    if hasattr(layer, "image_converter"):
        token_ids = layer({"images": None, "prompts": captions})["token_ids"]
    else:
        token_ids = layer(captions)
    if isinstance(token_ids, dict):
        token_ids = token_ids["token_ids"]
    if isinstance(token_ids, tf.RaggedTensor):
        raise ValueError(
            "`tokenizer` must return rows of equal length. Received: a layer that "
            f"returns a ragged tensor, {layer}"
        )
    return tf.cast(token_ids, "int32")
