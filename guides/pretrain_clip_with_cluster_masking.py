"""
Title: Pre-train an image-text model with cluster masking
Author: the keras_cluster_mask authors
Date created: 2026/11/24
Last modified: 2026/11/24
Description: Train CLIP from scratch on captioned pictures and search pictures by words.
Accelerator: None
"""

"""
## Introduction

[CLIP](https://arxiv.org/abs/2103.00020) learns what pictures show from nothing but
pictures and their captions: an image encoder and a text encoder are trained until the
embedding of a picture is nearer to that of its own caption than to all others of the
batch. The result finds pictures by words and sorts them into classes it was never
taught.

[Cluster masking](https://arxiv.org/abs/2405.08815) makes the training cheaper and the
task more telling. In every step a few random patches of each picture become anchors, and
the patches that look like them are left out: a piece of sky, a shirt, half a face. The
model reads half the patches, and has to infer from the rest which words belong to it.

This guide trains a small CLIP on 3,223 captioned emoji and drawings, in a few minutes on
two CPU cores. It shows

- what cluster masking leaves out of real photographs,
- how to read image-text pairs from WebDataset shards,
- how to put a masking into CLIP and train it with `fit()`,
- how well held-out pictures and captions find one another, and
- search by typed queries.

It runs on JAX, TensorFlow and PyTorch alike; choose one with the environment variable
`KERAS_BACKEND`.
"""

"""
## Setup

Point `TRAIN`, `VALIDATION` and `TEST` at shards of your own to train on them: tar files
in which `KEY.jpg` (or png, webp) is followed by `KEY.txt`, as
[img2dataset](https://github.com/rom1504/img2dataset) writes them. Photographs want a
larger `IMAGE_SIZE` (224 pixels with patches of 16, say), and large data a larger model: see
`SIZES` in `keras_cluster_mask/models/clip_sizes.py`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import keras
import numpy as np
import scipy.stats
from PIL import Image

import keras_cluster_mask as kcm

DATASETS = Path(__file__).resolve().parent.parent / "datasets"
TRAIN = DATASETS / "pictures" / "train-*.tar"
VALIDATION = DATASETS / "pictures" / "validation-*.tar"
TEST = DATASETS / "pictures" / "test-*.tar"
PHOTOGRAPHS = DATASETS / "photographs"
RESULTS = Path(os.environ.get("RESULTS", "results"))

IMAGE_SIZE = 48
PATCH_SIZE = 8
BACKGROUNDS = ["white", "random"]  # Behind transparent pictures, in training.
VOCABULARY_SIZE = 3000
CONTEXT_LENGTH = 12
BATCH_SIZE = 64
EPOCHS = int(os.environ.get("EPOCHS", 9))
LEARNING_RATE = 1.5e-3
QUERIES = [
    "smiling face",
    "red heart",
    "green flag",
    "clock",
    "woman",
    "flower",
    "musical instrument",
    "computer",
    "road sign",
    "yellow star",
]

keras.utils.set_random_seed(1)
RESULTS.mkdir(parents=True, exist_ok=True)
print(f"Backend: {keras.backend.backend()}; results go to {RESULTS.resolve()}")

"""
## What cluster masking leaves out

The pixels of each patch are compared with those of a few random anchors, and the most
similar ones are left out with them until half the patches are gone. Random masking tears
holes into everything; cluster masking takes whole surfaces and leaves others intact. The
last column shows the similarity that decides.
"""

photographs = np.stack(
    [
        np.asarray(Image.open(PHOTOGRAPHS / f"{name}.jpg"))
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
)
figure = kcm.visualization.plot_masks(
    photographs, kcm.ClusterMasking(patch_size=16, mask_ratio=0.5)
)
figure.savefig(RESULTS / "masks.png", dpi=80)

"""
## Data

The tokenizer is trained on the captions at hand, so nothing has to be downloaded. For
natural web captions use CLIP's own vocabulary, for example with
`kcm.data.CLIPTokenizer.from_open_clip()`.

The pictures come on transparent ground. A model that only ever saw white behind them
learns to rely on it, and fails on anything else, so half of the training pictures stand on
a plain, shaded or textured ground drawn at random. Held-out pictures are shown on white.
Images stay uint8 until they are on the device.
"""

captions = kcm.data.read_captions(TRAIN)
tokenizer = kcm.data.CLIPTokenizer.train(
    captions, vocabulary_size=VOCABULARY_SIZE, context_length=CONTEXT_LENGTH
)
train = kcm.data.image_text_dataset(
    TRAIN,
    tokenizer,
    image_size=IMAGE_SIZE,
    batch_size=BATCH_SIZE,
    training=True,
    background=BACKGROUNDS,
    crop_scale=(0.6, 1.0),
    seed=1,
)


def read_all(source):
    """Reads a small data set into arrays; returns the batch and its captions."""
    dataset = kcm.data.image_text_dataset(
        source,
        tokenizer,
        image_size=IMAGE_SIZE,
        batch_size=BATCH_SIZE,
        training=False,
        include_captions=True,
    )
    batches = list(dataset.as_numpy_iterator())
    whole = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    return whole, whole.pop("captions").astype(str)


validation, _ = read_all(VALIDATION)
test, test_captions = read_all(TEST)
print(f"{len(captions)} pairs to train on, {len(test_captions)} to test on.")

"""
## Model

A CLIP by size from scratch, with the masking behind its patch embedding. The loss is
built in: compile with an optimizer alone. Any keras_hub CLIP works in its place, a
pre-trained one too, and `kcm.with_masking` puts the masking into other vision
transformers.
"""

backbone = kcm.models.clip_backbone(
    "tiny",
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    vocabulary_size=tokenizer.vocabulary_size,
    context_length=CONTEXT_LENGTH,
)
masking = kcm.ClusterMasking(patch_size=PATCH_SIZE, mask_ratio=0.5, seed=1)
model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)

steps = EPOCHS * (len(captions) // BATCH_SIZE)
schedule = keras.optimizers.schedules.CosineDecay(
    0.0,
    decay_steps=max(1, steps - steps // 10),
    warmup_target=LEARNING_RATE,
    warmup_steps=steps // 10,
)
model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98))

"""
## Training

The progress bar shows the loss, how often the right partner of the batch is found, and
the share of patches that were left out.
"""

history = model.fit(train, epochs=EPOCHS, validation_data=validation, verbose=2)
kcm.visualization.plot_history(history).savefig(RESULTS / "training.png", dpi=100)
model.save(RESULTS / "model.keras")

"""
## Retrieval of held-out pictures

None of the test captions was seen in training. Recall@k is the share of pictures whose
caption is among the k nearest captions, and the reverse. Equal captions count as one.
"""

embeddings = model.predict(test, verbose=0)
images, texts = embeddings["image_embeddings"], embeddings["text_embeddings"]
recall = kcm.evaluation.retrieval_recall(images, texts, test_captions)
chance = kcm.evaluation.chance_recall(len(images), image_labels=test_captions)
print(f"{'':26}recall   95 % interval   chance")
for name, value in recall.items():
    hits = scipy.stats.binomtest(round(value * len(images)), len(images))
    low, high = hits.proportion_ci(method="wilson")
    print(
        f"{name:25} {value:6.1%}   {low:5.1%} - {high:5.1%}   {chance[name]:5.1%}"
        f"   {value / chance[name]:4.1f} times chance"
    )

"""
## Search by words

Embed a few queries, and rank all pictures that were held out by their similarity to
each.
"""

held_out = np.concatenate([validation["images"], test["images"]])
validation_images = model.predict(validation, verbose=0)["image_embeddings"]
everything = np.concatenate([validation_images, images])
query_embeddings = model.encode_text(tokenizer(QUERIES))
similarity = keras.ops.convert_to_numpy(query_embeddings) @ everything.T
figure = kcm.visualization.plot_retrieval(QUERIES, held_out, similarity, k=5)
figure.savefig(RESULTS / "search.png", dpi=100)
print(f"Pictures: {', '.join(str(p) for p in sorted(RESULTS.glob('*.png')))}")

"""
## Where to go from here

- `backbone.save_to_preset(path)` saves the trained CLIP for keras_hub, which needs nothing
  of this library to load it.
- `kcm.ClusterMasking(patch_size, min_mask_ratio=0.3)` masks by threshold, as in the paper;
  `masking.adapt(images)` finds the threshold.
- A strategy of your own is a subclass of `kcm.PatchMasking` with one method, `score`.
"""
