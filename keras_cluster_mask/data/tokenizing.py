"""Applies any tokenizer to a batch of captions."""

import sys

import numpy as np


def is_layer(tokenizer):
    """Whether a tokenizer is a Keras layer."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(tokenizer, keras.layers.Layer)


def check_tokenizer(tokenizer):
    """Raises an error for a layer that does not return rows of equal length."""
    if is_layer(tokenizer) and hasattr(tokenizer, "end_token_id"):
        raise ValueError(
            "`tokenizer` must add a start and an end token and return rows of equal "
            "length, which this layer does not. Pass `keras_hub.models."
            "CLIPPreprocessor(tokenizer)` or `CLIPTokenizer.from_preset(...)` instead. "
            f"Received: {tokenizer}"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise ValueError(
            "`tokenizer` must be a callable from a list of bytes to ints, or None. "
            f"Received: {tokenizer!r}"
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
    if not captions:
        return np.zeros((0, getattr(tokenizer, "context_length", 0)), "int32")
    if is_layer(tokenizer):
        return _apply_layer(tokenizer, captions)
    token_ids = tokenizer(captions)
    # A tensor of some backend.
    if not isinstance(token_ids, np.ndarray | list | tuple):
        import keras

        token_ids = keras.ops.convert_to_numpy(token_ids)
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 2 or len(token_ids) != len(captions):
        raise ValueError(
            "`tokenizer` must return ints of shape (batch, length). Received: "
            f"shape {token_ids.shape} for {len(captions)} captions"
        )
    return token_ids.astype("int32")


class Tokenize:
    """Adds the token ids of a Keras layer to batches that hold captions.

    Args:
        layer: Keras layer, such as a KerasHub `CLIPPreprocessor`.
    """

    def __init__(self, layer):
        self._layer = layer

    def __call__(self, batch):
        captions = [c[0] if isinstance(c, tuple) else c for c in batch["captions"]]
        return {**batch, "token_ids": tokenize(self._layer, captions)}


def _apply_layer(layer, captions):
    from keras_cluster_mask.data.tensorflow import import_tensorflow

    tf = import_tensorflow("A Keras layer as a `tokenizer`")
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
    return np.asarray(token_ids, "int32")
