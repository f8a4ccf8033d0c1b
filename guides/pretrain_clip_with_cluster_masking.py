"""
Title: Pre-train an image-text model with cluster masking
Author: the keras_cluster_mask authors
Date created: 2026/11/24
Last modified: 2026/11/26
Description: Train CLIP from scratch on captioned images and search images by text.
Accelerator: None
"""

"""
## Introduction

[CLIP](https://arxiv.org/abs/2103.00020) trains an image encoder and a text encoder on
images and their captions. The embedding of an image becomes more similar to that of its own
caption than to the other captions of the batch. The trained model searches images by text
and classifies images without training on labels.

[Cluster masking](https://arxiv.org/abs/2405.08815) reduces the cost of this training. In
every step a few random patches of each image are anchors, and the patches most similar to
them are left out. The model reads half of the patches.

This guide trains a small CLIP on 3,223 captioned emoji and drawings, in a few minutes on
two CPU cores. It shows how to

- plot the patches that cluster masking leaves out,
- read image-text pairs from WebDataset shards,
- add a masking to CLIP and train it with `fit()`,
- compute the recall on held-out pairs, and
- search images by text.

It runs on JAX, TensorFlow and PyTorch; choose one with the environment variable
`KERAS_BACKEND`.
"""

"""
## Setup

To train on your own data, set `TRAIN`, `VALIDATION` and `TEST` to your shards: tar files in
which `KEY.jpg` (or png, webp) is followed by `KEY.txt`, as
[img2dataset](https://github.com/rom1504/img2dataset) writes them. For photographs use a
larger `IMAGE_SIZE`, such as 224 pixels with patches of 16, and a larger model, such as
`"vit_b_16"`; see `kcm.models.clip_backbone`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_cluster_mask as kcm

DATASETS = Path(__file__).resolve().parent.parent / "datasets"
TRAIN = DATASETS / "images" / "train-*.tar"
VALIDATION = DATASETS / "images" / "validation-*.tar"
TEST = DATASETS / "images" / "test-*.tar"
PHOTOGRAPHS = DATASETS / "photographs"
RESULTS = Path(os.environ.get("RESULTS", "results"))

IMAGE_SIZE = 48
PATCH_SIZE = 8
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
## Masks

Cluster masking compares the pixels of each patch with those of the anchors, and leaves out
the most similar patches until half are gone. Random masking leaves gaps everywhere; cluster
masking removes whole surfaces and keeps others complete. The last column is the similarity
to the nearest anchor.
"""

photographs = np.stack(
    [
        np.asarray(Image.open(PHOTOGRAPHS / f"{name}.jpg"))
        for name in ("astronaut", "coffee", "chelsea", "rocket")
    ]
)
kcm.visualization.plot_masks(
    photographs, kcm.ClusterMasking(patch_size=16, mask_ratio=0.5)
).savefig(RESULTS / "masks.png", dpi=80)

"""
## Data

The tokenizer is trained on the captions of the training data, so nothing is downloaded. For
web captions use CLIP's own vocabulary: `kcm.data.CLIPTokenizer.from_open_clip()`.

The images have transparent backgrounds. A model trained on white backgrounds alone fails on
all others, so half of the training images get a random background: plain, shaded or
textured. Held-out images are on white.
"""

captions = kcm.data.read_captions(TRAIN)
tokenizer = kcm.data.CLIPTokenizer.train(
    captions, vocabulary_size=VOCABULARY_SIZE, context_length=CONTEXT_LENGTH
)


def dataset(source, training=False, **options):
    return kcm.data.image_text_dataset(
        source,
        tokenizer,
        image_size=IMAGE_SIZE,
        batch_size=BATCH_SIZE,
        training=training,
        **options,
    )


train = dataset(
    TRAIN,
    training=True,
    background=["white", "random"],
    crop_scale=(0.6, 1.0),
    seed=1,
)
validation, test = dataset(VALIDATION), dataset(TEST)

"""
## Model

`clip_backbone` makes a CLIP with fresh weights, and `from_backbone` adds the masking after
its patch embedding. A pre-trained CLIP of keras_hub works in the same way, and
`kcm.with_masking` adds a masking to other vision transformers. The loss is built in: compile
the model with an optimizer alone.
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

The logs show the loss, the accuracies within the batch (the share of images whose own
caption is the most similar one, and the reverse), and the share of patches left out.
"""

history = model.fit(train, epochs=EPOCHS, validation_data=validation, verbose=2)
kcm.visualization.plot_history(history).savefig(RESULTS / "training.png", dpi=100)
model.save(RESULTS / "model.keras")

"""
## Retrieval

Recall@k on the test pairs: the share of images whose caption is among the k most similar
captions, and the reverse. The chance is that of a random ranking.
"""

recall = kcm.evaluation.evaluate_retrieval(model, test, verbose=0)
chance = kcm.evaluation.chance_recall(len(kcm.data.read_captions(TEST)))
for name, value in recall.items():
    print(f"{name:25} {value:6.1%}   chance {chance[name]:5.1%}")

"""
## Search by text

Embed the queries and rank all held-out images by their similarity to each.
"""

images = np.concatenate(
    [batch["images"] for part in (validation, test) for batch in part]
)
image_embeddings = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
text_embeddings = kcm.evaluation.embed_texts(model, QUERIES, tokenizer, verbose=0)
figure = kcm.visualization.plot_retrieval(
    QUERIES, images, text_embeddings @ image_embeddings.T, k=5
)
figure.savefig(RESULTS / "search.png", dpi=100)
print(f"Plots: {', '.join(str(path) for path in sorted(RESULTS.glob('*.png')))}")

"""
## Next steps

- `backbone.save_to_preset(path)` saves the trained CLIP for keras_hub, which loads it
  without this library.
- `kcm.ClusterMasking(patch_size, min_mask_ratio=0.3)` masks by a threshold, as in the paper;
  `masking.adapt(images)` finds the threshold.
- For your own masking subclass `kcm.PatchMasking` and write its `score` method.
- The [guide to evaluation](evaluate_zero_shot.py) and the
  [guide to scaling up](scaling_up.py) continue from here.
"""
