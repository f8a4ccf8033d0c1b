# %% [markdown]
# # Masking in a ViT classifier and in a masked autoencoder
#
# A masking is a Keras layer. `kcm.with_masking` inserts it into a vision transformer after the patch
# embedding. The blocks then read only some of the patches in training, and all of them at inference.
# This guide uses masking in two models other than CLIP:
#
# - a **classifier** on KerasHub's `ViTBackbone`, which trains faster on half of the patches;
# - a **masked autoencoder** ([MAE](https://arxiv.org/abs/2111.06377)), which reads a quarter of
#   the patches and learns to reconstruct the others. It needs to know which patches are kept.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time
from pathlib import Path

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

import keras_cluster_mask as kcm

RESULTS = Path(os.environ.get("RESULTS", "results"))
IMAGE_SIZE, PATCH_SIZE, DIM = 48, 8, 96
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
EPOCHS = int(os.environ.get("EPOCHS", 12))  # For the autoencoder.
RESULTS.mkdir(parents=True, exist_ok=True)


def show(figure, name):
    """Saves a figure, and displays it in a notebook."""
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    return figure


# %% [markdown]
# ## Data
#
# The two classes are emoji and drawings. The key of each image tells its class.


# %%
def read(split):
    """All images of a split in [-1, 1], and 1 for an emoji, 0 for a drawing."""
    source = kcm.data.example_images() / f"{split}-*.tar"
    data = kcm.data.image_text_dataset(
        source, None, IMAGE_SIZE, 64, training=False, include_keys=True
    )
    images, keys = zip(*((batch["images"], batch["keys"]) for batch in data))
    images = np.concatenate(images).astype("float32") / 127.5 - 1.0
    return images, np.char.startswith(np.concatenate(keys).astype(str), "emoji").astype(
        int
    )


train_images, train_labels = read("train")
test_images, test_labels = read("test")
print(f"{len(train_images)} training images, {train_labels.mean():.0%} of them emoji")

# %% [markdown]
# ## A classifier
#
# `with_masking` returns a model that shares the encoder's weights. It supports KerasHub's encoders.
# For other Keras models, specify the layer that returns the embedded tokens. Here (torch, batches of
# 64), an epoch on half of the patches takes about two thirds of the time, so six epochs take as long
# as four.


# %%
def make_encoder():
    keras.utils.set_random_seed(1)
    return keras_hub.models.ViTBackbone(
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        patch_size=PATCH_SIZE,
        num_layers=3,
        num_heads=3,
        hidden_dim=DIM,
        mlp_dim=4 * DIM,
    )


def train_classifier(encoder, epochs):
    """Returns the accuracy on the test images, and the training time in seconds."""
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    features = ops.mean(
        encoder(images)[:, 1:], axis=1
    )  # The mean of the patches that the encoder reads.
    model = keras.Model(images, keras.layers.Dense(2)(features))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(train_images, train_labels, 64, epochs, verbose=0)
    seconds = time.perf_counter() - start
    return model.evaluate(test_images, test_labels, verbose=0)[1], seconds


runs = {
    "no masking": (None, max(1, EPOCHS // 3)),
    "random 50 %": (kcm.RandomMasking(0.5, seed=1), max(1, EPOCHS // 2)),
    "cluster 50 %": (
        kcm.ClusterMasking(0.5, patch_size=PATCH_SIZE, seed=1),
        max(1, EPOCHS // 2),
    ),
}
for name, (masking, epochs) in runs.items():
    encoder = make_encoder()
    if masking is not None:
        encoder = kcm.with_masking(encoder, masking)
    accuracy, seconds = train_classifier(encoder, epochs)
    print(
        f"{name:13} {epochs} epochs in {seconds:3.0f} s, test accuracy {accuracy:.1%}"
    )

# %% [markdown]
# ## A masked autoencoder
#
# The decoder receives the encoded patches at their positions, and a learned token for every other
# patch. The `noise` determines which patches are kept. To know their positions, draw the noise first
# and pass it to both calls:
#
# - `masking.draw(batch, N)` draws the noise of a step,
# - `masking.select(images, tokens, noise)` returns the indices of the kept patches, and
# - `masked(images, training=True, noise=noise)` encodes the same patches, in the same order.


# %%
class MaskedAutoencoder(keras.Model):
    """Reconstructs the pixels of the patches that its encoder does not read."""

    def __init__(self, encoder, masking):
        super().__init__()
        self.masking = masking
        self.masked = kcm.with_masking(encoder, masking)
        self.project = keras.layers.Dense(DIM)
        self.mask_token = self.add_weight(shape=(DIM,), initializer="normal")
        self.positions = keras_hub.layers.PositionEmbedding(NUM_PATCHES)
        make_block = keras_hub.layers.TransformerEncoder
        self.blocks = [make_block(2 * DIM, 3, normalize_first=True) for _ in range(2)]
        self.pixels = keras.layers.Dense(PATCH_SIZE * PATCH_SIZE * 3)

    def call(self, images):
        noise = self.masking.draw(ops.shape(images)[0], NUM_PATCHES)
        tokens = self.masked.embed_patches(images)
        indices, _ = self.masking.select(images, tokens, noise)
        places = ops.one_hot(indices, NUM_PATCHES, dtype="float32")  # (batch, K, N)
        hidden = 1.0 - ops.sum(places, axis=1)[:, :, None]  # (batch, N, 1)

        encoded = self.masked(images, training=True, noise=noise)
        encoded = self.project(encoded[:, 1:])  # Without the class token.
        x = ops.einsum("bkn,bkd->bnd", places, encoded) + hidden * self.mask_token
        x = x + self.positions(x)
        for block in self.blocks:
            x = block(x)
        painted = self.pixels(x)
        patches = ops.image.extract_patches(images, (PATCH_SIZE, PATCH_SIZE))
        patches = ops.reshape(patches, (-1, NUM_PATCHES, PATCH_SIZE * PATCH_SIZE * 3))
        error = ops.mean(ops.square(painted - patches), axis=-1, keepdims=True)
        self.add_loss(ops.sum(error * hidden) / ops.sum(hidden))
        return patches, hidden, painted


encoder = make_encoder()
autoencoder = MaskedAutoencoder(encoder, kcm.RandomMasking(0.75, 1, seed=1))
autoencoder.compile(keras.optimizers.AdamW(1e-3))
history = autoencoder.fit(train_images, batch_size=64, epochs=EPOCHS)

# %% [markdown]
# The rows show the patches that the encoder reads, the reconstruction of the other patches, and the
# test image. After such a short run, the model reconstructs shapes and colors, but no details.


# %%
def assemble(patches):
    """Returns uint8 images from their patches."""
    rows = IMAGE_SIZE // PATCH_SIZE
    patches = ops.convert_to_numpy(patches)
    patches = patches.reshape(-1, rows, rows, PATCH_SIZE, PATCH_SIZE, 3)
    images = patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    return np.clip(127.5 * (images + 1.0), 0, 255).astype("uint8")


patches, hidden, painted = autoencoder(test_images[:8])
seen = patches * (1 - hidden)
rows = seen + 0.7 * hidden, seen + painted * hidden, patches
figure, axes = plt.subplots(3, 8, figsize=(10, 4), layout="constrained")
for row_axes, row in zip(axes, rows):
    for axis, image in zip(row_axes, assemble(row)):
        axis.imshow(image)
        axis.axis("off")
plt.close(figure)
show(figure, "mae")
