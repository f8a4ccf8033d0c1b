"""What is known of keras_hub's encoders, and of encoders in general.

keras_hub's classes are recognized by name, so that keras_hub need not be imported.
"""

import keras
import numpy as np
from keras import ops, tree

from keras_cluster_mask.checks import is_integer
from keras_cluster_mask.masking import PatchMasking
from keras_cluster_mask.masking.context import prefix_tokens
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.models.rotary_positions import own_positions, rotary_tables
from keras_cluster_mask.training.layers import (
    all_layers,
    freeze_parts,
    frozen_parts,
)

# The layers of vision transformers that return the embedded tokens. The last is that
# of `ViTBackbone` and of `BLIP2VisionEncoder`.
EMBEDDINGS = (
    "CLIPVisionEmbedding",
    "DINOV2Embedding",
    "DINOV3Embedding",
    "DeiTEmbeddings",
    "MetaCLIP2VisionEmbedding",
    "SigLIPVisionEmbedding",
    "ViTPatchingAndEmbedding",
)

# Layers of vision transformers that no token can be taken from, and why.
_WINDOWS = "attends within windows of the whole grid"
_ONE_LAYER = "embeds patches and encodes them in one layer"
REFUSED = {
    "DepthAnythingNeck": "DepthAnything reads the whole grid; take its `image_encoder`",
    "Gemma3VisionEncoderBlock": f"Gemma 3 {_ONE_LAYER}",
    "Gemma4VisionEncoderBlock": f"Gemma 4 {_ONE_LAYER}",
    "HierarchicalTransformerEncoder": "MiT merges neighboring patches",
    "PARSeqDecoder": "PARSeq reads texts too; take its `image_encoder`",
    "PaliGemmaVitEncoder": f"PaliGemma {_ONE_LAYER}",
    "SAM3VisionEncoder": f"SAM 3 {_WINDOWS}",
    "SwinTransformerStage": f"Swin {_WINDOWS}",
    "VideoPrismFactorizedReshape": "VideoPrism reads videos",
    "WindowedTransformerEncoder": f"ViTDet, and SAM with it, {_WINDOWS}",
}

# Vision transformers whose images can be resized: config, positions and patch size are
# known.
RESIZABLE = (
    "CLIPVisionEncoder",
    "DINOV2Backbone",
    "MetaCLIP2VisionEncoder",
    "SigLIPVisionEncoder",
    "ViTBackbone",
)

# The transformer blocks of image and text encoders.
BLOCKS = (
    "CLIPEncoderLayer",
    "DINOV2Layer",
    "DINOV3Layer",
    "DeiTEncoderBlock",
    "MetaCLIP2EncoderLayer",
    "SigLIPEncoderLayer",
    "TransformerDecoder",
    "TransformerEncoder",
    "ViTEncoderBlock",
)

# Text encoders with a table of positions.
TEXT_ENCODERS = "CLIPTextEncoder", "MetaCLIP2TextEncoder", "SigLIPTextEncoder"

# The id at which `MetaCLIP2Backbone` pools texts. It saves no other.
METACLIP_2_END_ID = 2

# === Any encoder ===


def call_encoder(encoder, value, training):
    """Calls an encoder on a tensor, or on a dictionary of several inputs by name."""
    inputs = getattr(encoder, "input", None)
    if isinstance(value, dict):
        if not isinstance(inputs, dict):
            value = [value[x.name] for x in tree.flatten(inputs)]
            value = tree.pack_sequence_as(inputs, value)
    elif isinstance(inputs, dict) and len(inputs) == 1:
        value = dict.fromkeys(inputs, value)
    return encoder(value, training=training)


def image_shape_of(encoder) -> tuple | None:
    """The shape of the images that an encoder takes, without the batch, or `None`."""
    given = getattr(encoder, "input", None)
    return None if given is None else tuple(tree.flatten(given)[0].shape[1:])


def context_length_of(encoder) -> int | None:
    """The most tokens of a text that an encoder takes; `None` if it does not say."""
    length = getattr(encoder, "max_sequence_length", None)
    given = getattr(encoder, "input", None)
    if length is None and given is not None:
        shape = tree.flatten(given)[0].shape
        length = shape[1] if len(shape) == 2 else None
    return length


def data_format_of(encoder) -> str:
    """`"channels_last"` or `"channels_first"`: in which order an encoder has axes."""
    return _first_data_format(encoder) or keras.config.image_data_format()


def knows_image_size(encoder) -> bool:
    """Whether an encoder is one that `with_image_size` can make for another size."""
    return any(x.__name__ in RESIZABLE for x in type(encoder).__mro__)


def find_embedding_layer(encoder, name: str | None = None) -> keras.layers.Layer:
    """The layer of `encoder` whose output are the embedded tokens."""
    if not isinstance(encoder, keras.Model) or not encoder.built:
        raise ValueError(
            "`encoder` must be a built functional Keras model. "
            f"Received: encoder={encoder} of type {type(encoder).__name__}"
        )
    for reason in (REFUSED.get(type(layer).__name__) for layer in encoder.layers):
        if reason is not None:
            raise ValueError(
                f"`encoder` must be one that can leave out tokens. {reason}. "
                f"Received: encoder={encoder.name} of type {type(encoder).__name__}"
            )
    candidates = [layer for layer in encoder.layers if _makes_tokens(layer)]
    if name is None:
        found = [x for x in candidates if type(x).__name__ in EMBEDDINGS]
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


def split_at(encoder, layer) -> tuple[keras.Model, keras.Model]:
    """Splits an encoder behind a layer into two models that share its weights.

    Args:
        encoder: A functional Keras model.
        layer: The layer that returns the tokens.

    Returns:
        A tuple `(stem, blocks)` of models: images to tokens, and
        `(batch, any number of tokens, dim)` to the encoder's output. With rotary
        positions, the second takes a list: tokens, and the positions of each image's
        patches, `(batch, patches, width)` for each of `rotary_tables`.
    """
    tokens, tables = layer.output, rotary_tables(encoder)
    try:
        blocks = keras.Model([tokens, *tables] if tables else tokens, encoder.output)
    except ValueError as error:
        raise ValueError(
            "`layer` must be passed by all paths from the images to the output. "
            f"Received: layer={layer.name!r}, encoder={encoder.name}"
        ) from error
    # This model insists on the full number of tokens. Cloned on an open token axis,
    # from the same layers, it takes any number.
    inputs = [
        keras.Input((None, x.shape[-1]), dtype=x.dtype) for x in (tokens, *tables)
    ]
    blocks = keras.models.clone_model(
        blocks,
        input_tensors=inputs if tables else inputs[0],
        clone_function=own_positions,
    )
    return _stem(encoder, layer), blocks


def count_tokens(stem, image_shape: tuple) -> int:
    """How many tokens a stem of `split_at` makes of an image, prefix included."""
    # By a call, since some embedding layers declare a shape that is off by one.
    inputs = tree.map_structure(
        lambda x: ops.zeros((1, *image_shape), x.dtype), stem.input
    )
    return stem(inputs).shape[1]


def count_prefix_tokens(encoder, stem) -> int | None:
    """How many tokens of an encoder are no patches, or `None` if it is not known."""
    patch_size, shape = getattr(encoder, "patch_size", None), image_shape_of(encoder)
    for table in rotary_tables(encoder)[:1]:
        return count_tokens(stem, shape) - table.shape[0]
    if patch_size is None or None in shape:
        return None
    sides = height_and_width(shape, data_format_of(encoder))
    rows, columns = (side // p for side, p in zip(sides, as_pair(patch_size)))
    return count_tokens(stem, shape) - rows * columns


def tokens_per_image(encoder, image_shape: tuple) -> int | None:
    """How many tokens the blocks of an encoder read of an image in training.

    Args:
        encoder: A vision transformer, masked or not.
        image_shape: tuple of ints, without the batch.

    Returns:
        Integer; `None` if the encoder's tokens are not known.
    """
    masking, stem = getattr(encoder, "masking", None), getattr(encoder, "stem", None)
    if masking is not None and stem is not None:
        tokens = count_tokens(stem, image_shape)
        images = ops.zeros((1, *image_shape))
        with prefix_tokens(encoder.num_prefix_tokens):
            patches = masking.count_patches(images, ops.zeros((1, tokens, 1)))
        return tokens - patches + masking.num_kept(patches)
    if any(isinstance(x, PatchMasking) for x in all_layers(encoder)):
        # A layer of the user's own model, which leaves out tokens behind the embedding.
        return None
    try:
        stem = _stem(encoder, find_embedding_layer(encoder))
    except ValueError:
        # Unknown, or shared with another model.
        return None
    return count_tokens(stem, image_shape)


def as_pair(size) -> tuple[int, int]:
    """`(height, width)` from one integer or two."""
    sizes = (size,) * 2 if is_integer(size) else size
    return tuple(int(x) if is_integer(x) else x for x in sizes)


def _stem(encoder, layer):
    return keras.Model(encoder.input, layer.output, name=f"{encoder.name}_stem")


def _first_data_format(layer):
    """That of the first layer that has one: it reads the images."""
    found = getattr(layer, "data_format", None)
    for part in getattr(layer, "layers", ()):
        found = found or _first_data_format(part)
    return found


def _makes_tokens(layer):
    try:
        return len(layer.output.shape) == 3
    except (AttributeError, ValueError):
        # Several outputs, or the layer is called more than once.
        return False


# === Positions in keras_hub's embedding layers ===


def number_positions(embedding):
    """Gives every patch its own position where keras_hub has left all at 0.

    `CLIPVisionEmbedding` creates its position ids as zeros and relies on a checkpoint
    to set them, so in an encoder built from scratch all patches would share a position.
    """
    ids = getattr(embedding, "position_ids", None)
    if isinstance(ids, keras.Variable) and not np.any(ops.convert_to_numpy(ids)):
        ids.assign(ops.reshape(ops.arange(ids.shape[-1], dtype=ids.dtype), ids.shape))


def read_positions(embedding) -> np.ndarray:
    """The position embeddings of all tokens, `(..., prefix + N, dim)` float32."""
    table = ops.convert_to_numpy(ops.cast(position_tables(embedding)[-1], "float32"))
    ids = ops.convert_to_numpy(getattr(embedding, "position_ids", [0]))
    # All at 0 in a CLIP whose positions have not been numbered yet.
    return table[ids[0]] if np.any(ids) else table


def position_tables(embedding) -> tuple:
    """The weights with position embeddings; the last one is used in computation."""
    if hasattr(embedding, "interpolated_position_embeddings"):
        return embedding.position_embeddings, embedding.interpolated_position_embeddings
    return (embedding.position_embedding.embeddings,)


# === What keras_hub's CLIP does not save, and copies of its models ===


def read_text_epsilon(backbone) -> float:
    """The epsilon of the last normalization of a CLIP backbone's text tower.

    It is not in keras_hub's config, and open_clip's weights need another one than
    keras_hub's.
    """
    return backbone.text_encoder.layer_norm.epsilon


def write_text_epsilon(backbone, epsilon: float):
    """Sets what `read_text_epsilon` reads."""
    backbone.text_encoder.layer_norm.epsilon = epsilon


def copy_with(model, tower: str, changes: dict) -> keras.Model:
    """A model of the same class with a tower that is changed.

    What is frozen in the model is frozen in the copy. Weights are copied unless a shape
    has changed.

    Args:
        model: A keras_hub backbone of two towers, or one of them alone.
        tower: `"vision_encoder"` or `"text_encoder"`.
        changes: Dictionary, what is changed in the tower's configuration.
    """
    config = model.get_config()
    changed = config[tower]["config"] if hasattr(model, tower) else config
    changed.update(changes)
    copy = type(model).from_config(config)
    if hasattr(model, "clip_head"):
        write_text_epsilon(copy, read_text_epsilon(model))
    # Configurations of keras_hub's encoders leave out what is frozen.
    freeze_parts(copy, frozen_parts(model))
    for old, new in zip(model.weights, copy.weights):
        if tuple(old.shape) == tuple(new.shape):
            # On JAX it would be the same array, which a training step gives away.
            new.assign(ops.copy(old))
    return copy


def check_no_lora(name: str, model: keras.Model) -> None:
    """Raises an error for a model with LoRA, which its configuration leaves out."""
    if any(getattr(layer, "lora_enabled", False) for layer in all_layers(model)):
        raise ValueError(
            f"`{name}` must have no LoRA weights: enable LoRA in the copy, or save and "
            f"load the model first, which merges them. Received: {name}={model.name}"
        )
