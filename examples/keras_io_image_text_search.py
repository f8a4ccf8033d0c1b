"""
Title: Image search by text with two pre-trained encoders
Author: The keras_cluster_mask authors
Date created: 2026/12/03
Last modified: 2026/12/03
Description: Train projections on frozen DINOv2 and MiniLM, and search photographs.
Accelerator: None
"""

"""
## Introduction

[CLIP](https://arxiv.org/abs/2103.00020) embeds images and texts in a shared space, in
which an image is close to its captions. With a few thousand photographs, do not train a
CLIP from scratch. Connect encoders that were pre-trained separately, here DINOv2 for
images and MiniLM for sentences. Both stay frozen and run once. Only two projections are
trained.

The program needs `keras-hub` and `matplotlib`. It runs on JAX, TensorFlow and PyTorch
(`KERAS_BACKEND`), and takes six minutes on two cores of an AMD EPYC (PyTorch, float32).
"""

import collections
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from keras import initializers, layers, ops

IMAGE_SHAPE = (168, 168, 3)  # A patch of DINOv2 has 14 x 14 pixels.
NUM_TRAIN = 4000  # Of 6,000 photographs.
BATCH_SIZE, EPOCHS = 500, 30
keras.utils.set_random_seed(1)

"""
## Data

Flickr8k has 8,000 photographs with five captions each. The first run downloads 1 GB.
"""

URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_"
photographs = keras.utils.get_file(origin=URL + "Dataset.zip", extract=True)
folder = pathlib.Path(keras.utils.get_file(origin=URL + "text.zip", extract=True))
captions = collections.defaultdict(list)
for line in (folder / "Flickr8k.token.txt").read_text("utf-8").splitlines():
    name, caption = line.split("\t")
    captions[name.split("#")[0]].append(caption)
train_names = (folder / "Flickr_8k.trainImages.txt").read_text().split()[:NUM_TRAIN]
test_names = (folder / "Flickr_8k.testImages.txt").read_text().split()

"""
## Features

The features of an image are DINOv2's class token and the mean of its patch tokens.
MiniLM comes with a tokenizer and its own pooling. 32 tokens are enough for these
captions.
"""

dino = keras_hub.models.Backbone.from_preset("dinov2_small", image_shape=IMAGE_SHAPE)
pixels = keras.Input(IMAGE_SHAPE)
scaled = keras.applications.imagenet_utils.preprocess_input(pixels, mode="torch")
tokens = dino({"images": scaled})
pooled = ops.concatenate([tokens[:, 0], ops.mean(tokens[:, 1:], axis=1)], axis=1)
image_encoder = keras.Model(pixels, pooled)
text_encoder = keras_hub.models.TextEmbedder.from_preset("all_minilm_l6_v2_en")
text_encoder.preprocessor.sequence_length = 32


def load_image(name):
    path = f"{photographs}/Flicker8k_Dataset/{name}"
    options = dict(interpolation="bicubic", keep_aspect_ratio=True)
    return np.array(keras.utils.load_img(path, target_size=IMAGE_SHAPE[:2], **options))


def compute_features(names):
    images = np.stack([load_image(name) for name in names])
    sentences = [caption for name in names for caption in captions[name]]
    return image_encoder.predict(images), text_encoder.predict(sentences, batch_size=64)


train_images, train_texts = compute_features(train_names)
test_images, test_texts = compute_features(test_names)

"""
## Projections

A projection standardizes features and has one hidden layer. Each step uses one random
caption per image. The loss is the cross-entropy over the batch in both directions: find
the caption of each image, and the image of each caption.
"""


def projection(features):
    standardize = layers.Normalization()
    standardize.adapt(features)
    hidden, dropout = layers.Dense(1024, activation="gelu"), layers.Dropout(0.3)
    output, normalize = layers.Dense(512, use_bias=False), layers.UnitNormalization()
    return keras.Sequential([standardize, hidden, dropout, output, normalize])


class ImageTextModel(keras.Model):
    def __init__(self, image_features, text_features):
        super().__init__()
        self.image_projection = projection(image_features)
        self.text_projection = projection(text_features)
        self.log_temperature = self.add_weight((), initializers.Constant(np.log(0.07)))
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs, training=False):
        images, texts = inputs
        chosen = keras.random.randint((ops.shape(texts)[0], 1, 1), 0, 5, seed=self.seed)
        texts = ops.take_along_axis(texts, chosen, axis=1)[:, 0]
        images = self.image_projection(images, training=training)  # JAX needs it.
        return images, self.text_projection(texts, training=training)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        images, texts = y_pred
        logits = images @ ops.transpose(texts) / ops.exp(self.log_temperature)
        log_probs = ops.log_softmax(logits, axis=0) + ops.log_softmax(logits, axis=1)
        return -ops.mean(ops.diagonal(log_probs)) / 2


model = ImageTextModel(train_images, train_texts)
rate = keras.optimizers.schedules.CosineDecay(1e-3, EPOCHS * NUM_TRAIN // BATCH_SIZE)
model.compile(keras.optimizers.AdamW(rate, weight_decay=0.1))
data = train_images, train_texts.reshape(len(train_names), 5, -1)
model.fit(data, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)

"""
## Search

Recall@10 is the fraction of test captions with their image among the top 10 of 1,000.
"""

image_embeddings = model.image_projection.predict(test_images)
text_embeddings = model.text_projection.predict(test_texts)
best = np.argsort(-text_embeddings @ image_embeddings.T)[:, :10]
is_found = best == np.repeat(np.arange(len(test_names)), 5)[:, None]
print(f"Text-to-image recall@10: {np.mean(np.any(is_found, axis=1)):.1%}")

features = text_encoder.predict(["a dog runs through the snow"])
(similarity,) = model.text_projection.predict(features) @ image_embeddings.T
best = [test_names[index] for index in np.argsort(-similarity)[:4]]
plt.imshow(np.hstack([load_image(name) for name in best]))
plt.axis("off")
plt.show()

"""
This example does not tune the encoders. `keras_cluster_mask` does this, with masking.
"""
