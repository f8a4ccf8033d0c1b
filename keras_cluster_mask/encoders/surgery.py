"""Reads what an encoder takes and returns, and splits it after its embedding layer."""

import math

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.distribution.backends import needs_xla
from keras_cluster_mask.encoders.families import BLOCKS, EMBEDDINGS, IMAGE_FAMILIES
from keras_cluster_mask.encoders.rotary_positions import own_positions, rotary_tables
from keras_cluster_mask.training.layers import all_layers

# The sides of the images with which the tokens of an encoder for any size are counted.
UNKNOWN_SIDE = 224

# === Any encoder ===


def inputs_of(encoder) -> dict[str, keras.KerasTensor]:
    """Returns the inputs of an encoder by their names. Some encoders know none."""
    inputs = getattr(encoder, "input", None)
    if isinstance(inputs, dict):
        return inputs
    return {x.name: x for x in tree.flatten(inputs) if x is not None}


def image_shape_of(encoder) -> tuple | None:
    """Returns the shape of an encoder's first input, without the batch, or `None`."""
    return next((tuple(x.shape[1:]) for x in inputs_of(encoder).values()), None)


def context_length_of(encoder) -> int | None:
    """Returns the maximum number of tokens of a text, or `None` if unknown."""
    length = getattr(encoder, "max_sequence_length", None)
    shape = image_shape_of(encoder) or ()
    return shape[0] if length is None and len(shape) == 1 else length


def data_format_of(encoder) -> str:
    """Returns an encoder's data format, `"channels_last"` or `"channels_first"`."""
    # The first layer with a data format reads the images.
    found = (getattr(layer, "data_format", None) for layer in all_layers(encoder))
    return next(filter(None, found), keras.config.image_data_format())


def find_embedding_layer(encoder, name: str | None = None) -> keras.layers.Layer:
    """Returns the layer of `encoder` that outputs the embedded tokens."""
    if not isinstance(encoder, keras.Model) or not encoder.built:
        raise ValueError(
            "`encoder` must be a built functional Keras model. "
            f"Received: encoder={encoder} of type {type(encoder).__name__}"
        )
    own = IMAGE_FAMILIES.get(type(encoder).__name__)
    blocks = [BLOCKS.get(type(layer).__name__) for layer in encoder.layers]
    if any(x is not None and x.embedding is None for x in (own, *blocks)):
        raise ValueError(
            "`encoder` must have patch tokens, embedded in a layer before its blocks, "
            "and blocks that take any number of tokens. Received: encoder="
            f"{encoder.name} of type {type(encoder).__name__}"
        )
    candidates = [layer for layer in encoder.layers if _makes_tokens(layer)]
    if name is None:
        found = [x for x in candidates if type(x).__name__ in EMBEDDINGS]
    else:
        found = [layer for layer in candidates if layer.name == name]
    if not found:
        inner = [x for x in encoder.layers if isinstance(x, keras.Model)]
        names, models = (
            ", ".join(repr(x.name) for x in layers) or "none"
            for layers in (candidates, inner)
        )
        raise ValueError(
            "`layer` must name the layer of the encoder that returns the embedded "
            f"tokens, (batch, tokens, dim). Candidates: {names}. If a nested model "
            "embeds the patches, mask that model, and call the masked model in its "
            f"place. Nested models: {models}. Received: layer={name!r}, "
            f"encoder={encoder.name}"
        )
    return found[0]


def stem_of(encoder, tokens) -> keras.Model:
    """Returns the part of an encoder from images to `tokens`, with shared weights."""
    images, *_ = inputs_of(encoder).values()
    return keras.Model(images, tokens, name=f"{encoder.name}_stem")


def split_at(encoder, layer) -> tuple[keras.Model, keras.Model]:
    """Splits an encoder after a layer into two models that share its weights.

    Args:
        encoder: A functional Keras model.
        layer: The layer that returns the tokens.

    Returns:
        A tuple `(stem, blocks)` of models. `stem` maps images to tokens. `blocks` maps
        `(batch, any number of tokens, dim)` to the encoder's output. With rotary
        positions, `blocks` takes a list: the tokens, and the positions of each image's
        patches, `(batch, patches, width)`, for each of `rotary_tables`.
    """
    tokens, tables = layer.output, rotary_tables(encoder)
    try:
        blocks = keras.Model([tokens, *tables] if tables else tokens, encoder.output)
        # Keras requires the full number of tokens of this model. A clone of the same
        # layers with an unknown number of tokens takes any number. Some layers fail
        # only if the number is known: a first clone with 23 tokens, which no grid of
        # patches has, raises their errors.
        for number in (23, None):
            inputs = [
                keras.Input((number, x.shape[-1]), dtype=x.dtype)
                for x in (tokens, *tables)
            ]
            clone = keras.models.clone_model(
                blocks,
                input_tensors=inputs if tables else inputs[0],
                clone_function=own_positions,
            )
    except Exception as error:
        raise ValueError(
            "`layer` must be after the position embedding, and on every path from the "
            "images to the output. A head must pool tokens, not flatten them. "
            f"Received: layer={layer.name!r}, encoder={encoder.name}, which raised: "
            f"{error}"
        ) from error
    return stem_of(encoder, tokens), clone


def count_constant_tokens(encoder, stem) -> int | None:
    """Returns how many of the first tokens of an encoder do not depend on the image.

    Returns:
        Integer, or `None` if that cannot be seen: no token depends on the image, one
        pixel changes all others, because `stem` contains attention, or the encoder
        takes no images of the size that is chosen here.
    """
    shape = image_shape_of(encoder)
    sides = tuple(x or UNKNOWN_SIDE for x in shape)
    # As integers, too, the images and that pixel differ.
    images = np.random.default_rng(0).uniform(0, 2, (3, *sides))
    images[1:] = images[1]
    images[2].flat[0] = 2 - images[2].flat[0]
    try:
        tokens = _embed(stem, images)
    except Exception:
        if None not in shape:
            raise
        return None
    tokens = ops.convert_to_numpy(ops.cast(tokens, "float32"))
    other, pixel = (
        np.abs(tokens[i] - tokens[1]).max(axis=-1) > 1e-6 * np.abs(tokens).max()
        for i in (0, 2)
    )
    prefix = int(np.argmax(other))
    return prefix if other.any() and not pixel[prefix:].all() else None


def _embed(stem, images):
    images = ops.cast(ops.convert_to_tensor(images, "float32"), stem.input.dtype)
    if needs_xla(data_format_of(stem)):
        stem.jit_compile = True
        return stem.predict_on_batch(images)
    return stem(images, training=False)


def _makes_tokens(layer):
    try:
        # The output of a model inside of another belongs to its own graph of layers.
        return len(layer.output.shape) == 3 and not isinstance(layer, keras.Model)
    except (AttributeError, ValueError):
        # The layer has several outputs, or is called more than once.
        return False


# === Positions in keras_hub's embedding layers ===


def number_positions(encoder):
    """Gives every patch its own position id if keras_hub left all of them at 0.

    `CLIPVisionEmbedding` creates its position ids as zeros and relies on a checkpoint
    to set them, so in an encoder built from scratch all patches would share a position.
    Tensors of ids, as in MetaCLIP 2, and the frequencies of DINOv3 become arrays:
    TensorFlow cannot differentiate a loop over micro-batches that captures a tensor.
    """
    for layer in all_layers(encoder):
        if (frequencies := getattr(layer, "inv_freq", None)) is not None:
            layer.inv_freq = ops.convert_to_numpy(frequencies)
        ids = getattr(layer, "position_ids", None)
        if ids is not None and not isinstance(ids, keras.Variable):
            layer.position_ids = ops.convert_to_numpy(ids)
        elif ids is not None and not np.any(ops.convert_to_numpy(ids)):
            ids.assign(np.arange(math.prod(ids.shape)).reshape(ids.shape))


def freeze_mask_tokens(encoder):
    """Freezes the tokens that only DINO's pre-training uses, and that get no gradient.

    Otherwise Keras would warn of them.
    """
    for layer in all_layers(encoder):
        if isinstance(token := getattr(layer, "mask_token", None), keras.Variable):
            token.trainable = False


def read_positions(embedding) -> np.ndarray:
    """Returns all position embeddings, `(..., prefix + N, dim)` float32."""
    table = ops.convert_to_numpy(ops.cast(position_tables(embedding)[-1], "float32"))
    ids = ops.convert_to_numpy(getattr(embedding, "position_ids", [0]))
    # The ids are all 0 in a CLIP encoder before `number_positions`.
    return table[ids[0]] if np.any(ids) else table


def position_tables(embedding) -> tuple:
    """Returns the position embedding weights. The last one is used in computation."""
    if hasattr(embedding, "interpolated_position_embeddings"):
        return embedding.position_embeddings, embedding.interpolated_position_embeddings
    return (embedding.position_embedding.embeddings,)
