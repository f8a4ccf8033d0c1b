"""Vision transformers of keras_hub in NumPy, from their raw weights."""

import math

import keras_hub
import numpy as np
from keras import ops

SIZES = dict(num_layers=3, num_heads=2, hidden_dim=16)
ERF = np.vectorize(math.erf)


def three_layers(family):
    """A small encoder of a family: 16 x 16 pixels, patches of 4 x 4."""
    common = dict(SIZES, patch_size=4, image_shape=(16, 16, 3))
    if family == "ViT":
        return keras_hub.models.ViTBackbone(**common, mlp_dim=32)
    common["intermediate_dim"] = 32
    if family == "DINOV2":
        return keras_hub.models.DINOV2Backbone(**common, num_register_tokens=2)
    if family == "DeiT":
        return keras_hub.models.DeiTBackbone(**common)
    return getattr(keras_hub.models, f"{family}VisionEncoder")(**common)


def class_attention(family, encoder, images):
    """The attention of the class token to the patches, `(batch, N)`: its mean over
    layers and heads."""
    tokens, layers = _tokens_and_layers(family, encoder, images)
    rows = []
    for norm, attention, scale, second, mlp, second_scale, epsilon, act in layers:
        x = _norm(tokens, norm, epsilon)
        query, key, value = (
            np.einsum("btc,chd->bhtd", x, _array(dense.kernel))
            + _array(dense.bias)[:, None]
            for dense in (
                attention.query_dense,
                attention.key_dense,
                attention.value_dense,
            )
        )
        logits = query @ key.swapaxes(2, 3) / math.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        rows.append(weights[:, :, 0])
        out = attention.output_dense
        mixed = np.einsum("bhtd,hdc->btc", weights @ value, _array(out.kernel))
        tokens = tokens + scale * (mixed + _array(out.bias))
        x = _norm(tokens, second, epsilon)
        first, last = mlp
        x = act(x @ _array(first.kernel) + _array(first.bias))
        x = x @ _array(last.kernel) + _array(last.bias)
        tokens = tokens + second_scale * x
    patches = (images.shape[1] // 4) * (images.shape[2] // 4)
    return np.mean(rows, axis=(0, 2))[:, -patches:]


def _array(variable):
    return ops.convert_to_numpy(variable).astype("float64")


def _norm(x, layer, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return x * _array(layer.gamma) + _array(layer.beta)


def _gelu(x):
    return 0.5 * x * (1 + ERF(x / math.sqrt(2)))


def _quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def _patches(images, kernel, bias=0.0):
    batch, height, width, _ = images.shape
    x = images.reshape(batch, height // 4, 4, width // 4, 4, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 48)
    return x @ _array(kernel).reshape(48, -1) + bias


def _join(*parts):
    batch = max(len(x) for x in parts)
    return np.concatenate([np.repeat(x, batch // len(x), axis=0) for x in parts], 1)


def _tokens_and_layers(family, encoder, images):
    """Tokens before the first block; for each block what `class_attention` unpacks."""
    images = images.astype("float64")
    if family in ("CLIP", "MetaCLIP2"):
        embedding = encoder.embedding
        tokens = _join(
            _array(embedding.class_embedding)[None, None],
            _patches(images, embedding.patch_embedding.kernel),
        ) + _array(embedding.position_embedding.embeddings)
        tokens = _norm(tokens, encoder.pre_layer_norm, 1e-5)
        return tokens, [
            (x.layer_norm_1, x.attention, 1, x.layer_norm_2, (x.dense_1, x.dense_2), 1)
            + (1e-5, _quick_gelu)
            for x in encoder.encoder_layers
        ]
    if family == "DINOV2":
        embedding = encoder.embeddings
        dense = embedding.patch_embeddings.projection
        tokens = _join(
            _array(embedding.cls_token),
            _patches(images, dense.kernel, _array(dense.bias)),
        ) + _array(embedding.interpolated_position_embeddings)
        registers = _array(embedding.register_tokens)
        tokens = _join(tokens[:, :1], registers, tokens[:, 1:])
        return tokens, [
            (x.norm1, x.attention.attention, _array(x.layer_scale1.lambda1), x.norm2)
            + ((x.mlp.fc1, x.mlp.fc2), _array(x.layer_scale2.lambda1), 1e-6, _gelu)
            for x in encoder.encoder.layers
        ]
    embedding, blocks = encoder.layers[1:3]
    dense, positions = embedding.patch_embedding, embedding.position_embedding
    patches = _patches(images, dense.kernel, _array(dense.bias))
    first = [_array(embedding.class_token)]
    if family == "DeiT":
        first.append(_array(embedding.distillation_token))
    else:
        positions = positions.embeddings
    tokens = _join(*first, patches) + _array(positions)
    epsilon = blocks.layer_norm_epsilon

    def mlp(x):
        if family == "DeiT":
            return x.mlp.dense, x.output_layer.dense
        return x.mlp.dense_1, x.mlp.dense_2

    return tokens, [
        (x.layer_norm_1, x.mha, 1, x.layer_norm_2, mlp(x), 1, epsilon, _gelu)
        for x in blocks.encoder_layers
    ]
