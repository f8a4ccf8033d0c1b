"""Minuscule models and data, and the one thing each backend does its own way."""

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_cluster_mask as kcm

VOCABULARY = 30
CONTEXT = 6
# Compiling one step takes JAX less time than compiling its operations one by one.
FAST = {"run_eagerly": keras.backend.backend() != "jax"}


# === Data ===


def random_images(count, height=16, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, height, width, 3)).astype("float32")


def random_noise(count, num_patches=16, seed=0):
    return np.random.default_rng(seed).random((count, num_patches), dtype="float32")


def random_pairs(count, seed=0):
    """Pairs of noise, all texts different."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY - 1, size=(count, CONTEXT)).astype("int32")
    ids[:, 0] = np.arange(count) % VOCABULARY
    ids[:, -1] = VOCABULARY - 1
    images = rng.integers(0, 256, size=(count, 16, 16, 3)).astype("uint8")
    return {"images": images, "token_ids": ids}


def class_pairs(count, num_classes=4, seed=0):
    """Pairs of one pattern and one text a class, with a little noise."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(30, 226, size=(num_classes, 16, 16, 3))
    classes = np.arange(count) % num_classes
    images = patterns[classes] + rng.integers(-20, 21, size=(count, 16, 16, 3))
    ids = np.ones((count, CONTEXT), "int32")
    ids[:, 1] = 2 + classes
    ids[:, -1] = VOCABULARY - 1
    return {"images": images.astype("uint8"), "token_ids": ids}


# === Encoders ===


@keras.saving.register_keras_serializable(package="tests")
class AddPositions(keras.layers.Layer):
    def build(self, shape):
        self.positions = self.add_weight(
            shape=shape[1:], initializer="random_normal", name="positions"
        )

    def call(self, tokens):
        return tokens + self.positions


def functional_vit(width=16, num_layers=1, mix=None, pool=True, name="own_vit"):
    """A vision transformer of plain Keras layers; `mix` is put between its blocks."""
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(width, 4, strides=4, name="patches")(images)
    x = keras.layers.Reshape((16, width))(x)
    x = AddPositions(name="positions")(x)
    for _ in range(num_layers):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(y, y)
        x = keras.layers.Add()([x, y])
        if mix is not None:
            x = mix(x)
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(width, activation="gelu")(y)
        x = keras.layers.Add()([x, y])
    x = keras.layers.LayerNormalization()(x)
    if pool:
        x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, x, name=name)


def patch_mlp(width=16, name="patch_mlp"):
    """Patches that never meet but in their average: the cheapest thing to mask."""
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(width, 4, strides=4)(images)
    x = keras.layers.Reshape((16, width))(x)
    x = AddPositions(name="positions")(x)
    x = keras.layers.Dense(width, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, keras.layers.Dense(width)(x), name=name)


def image_mlp(width=16, name="image_mlp"):
    images = keras.Input((16, 16, 3))
    x = keras.layers.AveragePooling2D(4)(images)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(width)(x)
    return keras.Model(images, x, name=name)


def text_bag(width=16, name="text_bag"):
    ids = keras.Input((CONTEXT,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width)(ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(width)(x)
    return keras.Model(ids, x, name=name)


def clip_vision_encoder(dtype=None):
    return keras_hub.models.CLIPVisionEncoder(
        patch_size=4,
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        intermediate_dim=32,
        image_shape=(16, 16, 3),
        dtype=dtype,
        name="vision_encoder",
    )


def tiny_clip(dtype=None):
    return keras_hub.models.CLIPBackbone(
        vision_encoder=clip_vision_encoder(dtype=dtype),
        text_encoder=keras_hub.models.CLIPTextEncoder(
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            hidden_dim=16,
            num_layers=1,
            num_heads=2,
            intermediate_dim=32,
            max_sequence_length=CONTEXT,
            dtype=dtype,
            name="text_encoder",
        ),
        projection_dim=16,
        dtype=dtype,
    )


def vit_encoder(height=16, width=16):
    return keras_hub.models.ViTBackbone(
        image_shape=(height, width, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
    )


def siglip_encoder(dtype=None, name=None):
    return keras_hub.models.SigLIPVisionEncoder(
        patch_size=4,
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        intermediate_dim=32,
        image_shape=(16, 16, 3),
        dtype=dtype,
        name=name,
    )


def tiny_siglip(dtype=None):
    return keras_hub.models.SigLIPBackbone(
        vision_encoder=siglip_encoder(dtype=dtype, name="vision_encoder"),
        text_encoder=keras_hub.models.SigLIPTextEncoder(
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            hidden_dim=16,
            num_layers=1,
            num_heads=2,
            intermediate_dim=32,
            max_sequence_length=CONTEXT,
            dtype=dtype,
            name="text_encoder",
        ),
        dtype=dtype,
    )


def dino_encoder():
    return keras_hub.models.DINOV2Backbone(
        patch_size=4,
        num_layers=1,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=32,
        num_register_tokens=2,
        image_shape=(16, 16, 3),
    )


# === Maskings ===


@keras.saving.register_keras_serializable(package="tests")
class HideByNoise(kcm.PatchMasking):
    """Hides the patches of small noise behind a mask, whatever the images show."""

    hides_tokens = True

    def num_kept(self, num_patches):
        return num_patches

    def score(self, noise, images=None, tokens=None):
        return ops.where(noise >= self.mask_ratio, 0.0, -np.inf)


# === Backends ===


def to_numpy(x):
    return np.array(ops.convert_to_numpy(ops.cast(x, "float32")))


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def value_and_gradients(fn, variables):
    """`fn() -> (scalar, output)`: the output and the scalar's gradients, in NumPy."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss, output = fn()
        found = tape.gradient(
            loss,
            [v.value for v in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        found = [tf.convert_to_tensor(g) for g in found]
    elif backend == "torch":
        import torch

        loss, output = fn()
        weights = [v.value for v in variables]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        found = [
            torch.zeros_like(w) if g is None else g for g, w in zip(found, weights)
        ]
    else:
        import jax

        def stateless(weights):
            with keras.StatelessScope(state_mapping=list(zip(variables, weights))):
                return fn()

        # Compiled whole, which is faster than compiling its operations one by one.
        step = jax.jit(jax.grad(stateless, has_aux=True))
        found, output = step([v.value for v in variables])
    return to_numpy(output), [to_numpy(g) for g in found]
