"""Attention of a vision transformer's class token to each patch."""

import operator

import keras
from keras import ops

from keras_cluster_mask.checks import sides_of
from keras_cluster_mask.distribution.backends import in_full_precision
from keras_cluster_mask.encoders.families import BLOCKS, EMBEDDINGS
from keras_cluster_mask.encoders.surgery import (
    count_tokens,
    data_format_of,
    image_shape_of,
    stem_of,
)
from keras_cluster_mask.masking.patch_grid import height_and_width
from keras_cluster_mask.training.layers import all_layers


class ClassAttention:
    """Attention of the class token to the patches: mean over all layers and heads.

    Each block runs unchanged. In addition, the block's own layers compute the query of
    the class token and the keys of all tokens. For the last block, only the query and
    the keys are computed.

    Args:
        encoder: A vision transformer, see `kcm.models.MomentumEncoder`.

    Attributes:
        encoder: The vision transformer.
        patch_size: Tuple `(height, width)`, in pixels.
        image_size: Tuple `(height, width)`, in pixels.
        grid: Tuple `(rows, columns)` of patches.
        num_prefix_tokens: Integer, the number of tokens before the patches.

    Raises:
        ValueError: If the encoder has no class token, or its attention is not known.
    """

    def __init__(self, encoder):
        is_built = isinstance(encoder, keras.Model) and encoder.built
        layers = encoder.layers if is_built else []
        embeddings = [x for x in layers if type(x).__name__ in EMBEDDINGS]
        # Blocks are layers of the encoder, or of a layer that holds all in their order.
        found = [
            (x, block)
            for x in layers
            if not isinstance(x, keras.Model)
            for block in all_layers(x)
            if getattr(BLOCKS.get(type(block).__name__), "attention", None)
        ]
        shape = image_shape_of(encoder) if embeddings and found else None
        if shape is None or None in shape:
            raise _refusal(encoder)
        self.encoder = encoder
        self.blocks = [block for _, block in found]
        self.image_size = height_and_width(shape, data_format_of(encoder))
        self.patch_size = sides_of("patch_size", embeddings[0].patch_size)
        self.grid = tuple(s // p for s, p in zip(self.image_size, self.patch_size))
        self.stem = stem_of(encoder, found[0][0].input)
        rows, columns = self.grid
        self.num_prefix_tokens = count_tokens(self.stem, shape) - rows * columns
        if self.num_prefix_tokens < 1:
            raise _refusal(encoder)

    def __call__(self, images):
        """Computes the attention of the class token in inference mode.

        Args:
            images: `(batch, H, W, C)` tensor of `image_size`, or channels first.

        Returns:
            `(batch, N)` float32 tensor. The attention to the class token itself and to
            other non-patch tokens is dropped, so the sum is less than 1.
        """
        tokens = self.stem(images, training=False)
        attention = attention_of_block(self.blocks[0], tokens)
        for before, block in zip(self.blocks, self.blocks[1:]):
            tokens = before(tokens, training=False)
            # DeiT's block also returns its attention scores, as `None`.
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
            attention = attention + attention_of_block(block, tokens)
        return attention[:, self.num_prefix_tokens :] / len(self.blocks)


@in_full_precision
def attention_of_block(block, tokens):
    """Computes the first token's attention to all tokens, as the mean over the heads.

    Args:
        block: A block of an `ImageFamily` with an `attention`.
        tokens: `(batch, T, dim)` tensor, the block's input.

    Returns:
        `(batch, T)` float32 tensor.
    """
    names = BLOCKS[type(block).__name__].attention
    norm, attention = (operator.attrgetter(name)(block) for name in names)
    tokens = norm(tokens, training=False)
    query = attention.query_dense(tokens[:, :1], training=False)
    key = attention.key_dense(tokens, training=False)
    query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    logits = ops.einsum("bihd,bjhd->bhij", query, key) * attention.key_dim**-0.5
    return ops.mean(ops.softmax(logits, axis=-1), axis=(1, 2))


def _refusal(encoder):
    return ValueError(
        "`encoder` must be a supported vision transformer with a class token: "
        "keras_hub's CLIPVisionEncoder, MetaCLIP2VisionEncoder, ViTBackbone, "
        "DeiTBackbone or DINOV2Backbone, or a functional model around one. SigLIP has "
        f"no class token. Received: encoder={getattr(encoder, 'name', encoder)} of "
        f"type {type(encoder).__name__}"
    )
