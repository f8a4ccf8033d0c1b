"""Any tokenizer on a batch of captions, inside a TensorFlow graph."""

import keras

try:
    import tensorflow as tf
except ImportError:
    tf = None


def tokenize(tokenizer, captions):
    """The token ids of captions.

    Args:
        tokenizer: a Keras layer, which becomes part of the graph; or a callable from a
            list of bytes to an array of ints, such as a `CLIPTokenizer`, which runs in
            Python once for a whole batch.
        captions: string tensor `(batch,)`.

    Returns:
        int32 tensor `(batch, length)`.
    """
    if isinstance(tokenizer, keras.layers.Layer):
        return tf.cast(_apply_layer(tokenizer, captions), "int32")

    def in_python(captions):
        token_ids = keras.ops.convert_to_numpy(tokenizer(captions.tolist()))
        if token_ids.ndim != 2 or len(token_ids) != len(captions):
            raise ValueError(
                "`tokenizer` must return ints of shape (batch, length). Received: "
                f"shape {token_ids.shape} for {len(captions)} captions"
            )
        return token_ids.astype("int32")

    token_ids = tf.numpy_function(in_python, [captions], "int32", stateful=False)
    length = getattr(tokenizer, "context_length", None)
    return tf.ensure_shape(token_ids, (captions.shape[0], length))


def _apply_layer(layer, captions):
    # KerasHub's CLIP preprocessors take and return a dict and frame the captions.
    if hasattr(layer, "image_converter"):
        return layer({"images": None, "prompts": captions})["token_ids"]
    token_ids = layer(captions)
    if isinstance(token_ids, dict):
        token_ids = token_ids["token_ids"]
    if isinstance(token_ids, tf.RaggedTensor) or hasattr(layer, "end_token_id"):
        raise ValueError(
            "`tokenizer` is a layer that does not frame captions by a start and an end "
            "token in rows of one length. Give `keras_hub.models.CLIPPreprocessor("
            "tokenizer)`, or `CLIPTokenizer.from_preset(...)`, instead. "
            f"Received: {layer}"
        )
    return token_ids
