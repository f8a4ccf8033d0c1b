"""Where the embedding of a vision transformer ends and its blocks begin."""

import keras
import numpy as np
from keras import ops

# The embedding layers of keras_hub's vision transformers, by class name, so that
# keras_hub need not be imported to recognise them.
KNOWN_EMBEDDINGS = (
    "CLIPVisionEmbedding",
    "ViTPatchingAndEmbedding",
    "SigLIPVisionEmbedding",
    "DINOV2Embedding",
)


def find_embedding_layer(encoder, name=None):
    """Returns the layer of `encoder` whose output are the embedded tokens."""
    if not isinstance(encoder, keras.Model) or not encoder.built:
        raise ValueError(
            "`encoder` must be a built functional Keras model. "
            f"Received: encoder={encoder} of type {type(encoder).__name__}"
        )
    candidates = [layer for layer in encoder.layers if _makes_tokens(layer)]
    if name is None:
        known = [x for x in candidates if type(x).__name__ in KNOWN_EMBEDDINGS]
        found = known[:1]
    else:
        found = [layer for layer in candidates if layer.name == name]
    if not found:
        names = ", ".join(repr(layer.name) for layer in candidates) or "none"
        raise ValueError(
            "`layer` must name the layer of the encoder that returns the embedded "
            f"tokens, (batch, tokens, dim). Candidates: {names}. "
            f"Received: layer={name!r}, encoder={encoder.name}"
        )
    return found[0]


def split_at(encoder, layer):
    """Splits an encoder behind a layer into two models that share its weights.

    Args:
        encoder: A functional Keras model.
        layer: The layer that returns the tokens.

    Returns:
        A tuple `(stem, blocks)` of models: images to tokens, and
        `(batch, any number of tokens, dim)` to the encoder's output.
    """
    tokens = layer.output
    stem = keras.Model(encoder.input, tokens, name=f"{encoder.name}_stem")
    try:
        blocks = keras.Model(tokens, encoder.output)
    except ValueError as error:
        raise ValueError(
            "`layer` must be passed by all paths from the images to the output. "
            f"Received: layer={layer.name!r}, encoder={encoder.name}"
        ) from error
    # A model cut out as it is insists on the full number of tokens. Built anew on
    # an open token axis, from the very same layers, it takes any.
    blocks = keras.models.clone_model(
        blocks,
        input_tensors=keras.Input((None, tokens.shape[-1]), dtype=tokens.dtype),
        clone_function=lambda layer: layer,
    )
    return stem, blocks


def number_positions(embedding):
    """Gives every patch its own position where keras_hub has left all at 0.

    `CLIPVisionEmbedding` creates its position ids as zeros and relies on a
    checkpoint to fill them in, so an encoder built from scratch would not know
    where in the image a patch is.
    """
    ids = getattr(embedding, "position_ids", None)
    if isinstance(ids, keras.Variable) and not np.any(ops.convert_to_numpy(ids)):
        ids.assign(ops.reshape(ops.arange(ids.shape[-1], dtype=ids.dtype), ids.shape))


def _makes_tokens(layer):
    try:
        return len(layer.output.shape) == 3
    except (AttributeError, ValueError):
        # Several outputs, or the layer is called more than once.
        return False
