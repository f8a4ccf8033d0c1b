"""
Title: Evaluate an image-text model: retrieval, zero-shot classification, linear probe
Author: the keras_cluster_mask authors
Date created: 2026/11/25
Last modified: 2026/11/26
Description: Measure what a CLIP model has learned, during fit() and after it, and search images with it.
Accelerator: None
"""

"""
## Introduction

A contrastive model is trained on pairs, and its loss says little about its quality. These
metrics, on images that it has not seen, say more:

- **Retrieval**: does an image find its caption among all captions, and a caption its image?
- **Zero-shot classification**: does the model classify images from the names of the classes
  alone?
- **Linear probe**: how well does a linear classifier work on its embeddings?
- **Composition**: does the model prefer "a red cup on a blue plate" to "a blue cup on a red
  plate"?

This guide trains a small CLIP for a few minutes on two CPU cores, follows its retrieval
metrics during training, evaluates it afterwards, and searches images by text and by image.
Recall and accuracies equal those of
[CLIP_benchmark](https://github.com/LAION-AI/CLIP_benchmark).

It runs on JAX, TensorFlow and PyTorch; choose one with the environment variable
`KERAS_BACKEND`. Give both `MODEL` and `TOKENIZER`, files saved by `model.save` and
`tokenizer.save`, to evaluate a model of your own instead of training one. The search needs
[faiss](https://github.com/facebookresearch/faiss): `pip install faiss-cpu`.
"""

"""
## Setup
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import re
from pathlib import Path

import faiss
import keras
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

import keras_cluster_mask as kcm

DATA = Path(__file__).resolve().parent.parent / "datasets" / "images"
TRAIN = DATA / "train-*.tar"
VALIDATION = DATA / "validation-*.tar"
TEST = DATA / "test-*.tar"
RESULTS = Path(os.environ.get("RESULTS", "results"))
MODEL = os.environ.get("MODEL")
EPOCHS = int(os.environ.get("EPOCHS", 9))
BATCH_SIZE = 64

keras.utils.set_random_seed(1)
RESULTS.mkdir(parents=True, exist_ok=True)
print(f"Backend: {keras.backend.backend()}; results go to {RESULTS.resolve()}")

"""
## Data

`image_text_dataset` reads shards, tables and folders of images. For evaluation it gives every
image once, in order, with the center crop of open_clip. `format="grain"` gives NumPy arrays on
every backend.
"""

captions = kcm.data.read_captions(TRAIN)
if MODEL:
    model = keras.saving.load_model(MODEL)
    tokenizer = kcm.data.CLIPTokenizer.from_file(os.environ["TOKENIZER"])
    image_size = kcm.models.image_size_of(model)
else:
    tokenizer = kcm.data.CLIPTokenizer.train(
        captions, vocabulary_size=3000, context_length=12
    )
    image_size = 48


def batches(source):
    """Images with their captions, for evaluation."""
    return kcm.data.image_text_dataset(
        source,
        tokenizer,
        image_size=image_size,
        batch_size=BATCH_SIZE,
        training=False,
        format="grain",
        include_captions=True,
    )


"""
## Retrieval during training

`kcm.callbacks.Retrieval` computes the recall on validation pairs at the end of epochs and adds
it to the logs, for `History`, `CSVLogger`, `TensorBoard`, `ModelCheckpoint` and
`EarlyStopping`. Here the weights of the epoch with the best recall are kept.
"""

if not MODEL:
    backbone = kcm.models.clip_backbone(
        "tiny",
        image_size=image_size,
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
    )
    masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    train = kcm.data.image_text_dataset(
        TRAIN,
        tokenizer,
        image_size=image_size,
        batch_size=BATCH_SIZE,
        training=True,
        background=["white", "random"],
        crop_scale=(0.6, 1.0),
        seed=1,
    )
    steps = EPOCHS * (len(captions) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=max(1, steps - steps // 10),
        warmup_target=1.5e-3,
        warmup_steps=steps // 10,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98))
    best = str(RESULTS / "best.weights.h5")
    model.fit(
        train,
        epochs=EPOCHS,
        callbacks=[
            kcm.callbacks.Retrieval(batches(VALIDATION)),
            keras.callbacks.ModelCheckpoint(
                best,
                monitor="val_text_to_image_recall@10",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
            ),
        ],
        verbose=2,
    )
    model.load_weights(best)
    model.save(RESULTS / "model.keras")
    tokenizer.save(RESULTS / "tokenizer.json")

"""
## Retrieval

Recall@k on held-out pairs, in both directions, beside the recall of a random ranking. All
captions of this data set differ; if some are equal, `duplicates="positive"` counts each of
them as right. For images with several captions, read them with `include_captions="all"` and
pass `tokenizer=tokenizer`.
"""

recall = kcm.evaluation.evaluate_retrieval(model, batches(TEST), verbose=0)
count = len(kcm.data.read_captions(TEST))
chance = kcm.evaluation.chance_recall(count)
print(f"{'':26}recall   95 % interval   chance")
for name, value in recall.items():
    hits = scipy.stats.binomtest(round(value * count), count)
    low, high = hits.proportion_ci(method="wilson")
    print(f"{name:25} {value:6.1%}   {low:5.1%} - {high:5.1%}   {chance[name]:5.1%}")

"""
## Zero-shot classification

The model gets only the names of the classes. Each is put into templates, and an image is
assigned to the class with the most similar texts. Usually the data has labels
(`image_text_dataset(..., label_key="cls")` for WebDataset, `label_key="folder"` for a folder
for each class). This data set has captions only, so the guide uses the images whose caption
contains exactly one of these words, and the word is their class.
"""

NAMES = ["flag", "food", "sign", "face", "animal", "woman", "man", "plant", "computer"]
TEMPLATES = ["{}", "{}, symbol", "a {}", "flat drawing of a {}"]


def labelled(source):
    """Images whose caption names exactly one class, with their labels."""
    for batch in batches(source):
        words = [set(re.split("[ ,]+", x.decode())) for x in batch["captions"]]
        named = np.array([[name in each for name in NAMES] for each in words])
        rows = named.sum(axis=1) == 1
        if rows.any():
            labels = named[rows].argmax(axis=1)
            yield {"images": batch["images"][rows], "labels": labels}


zero_shot = kcm.evaluation.evaluate_zero_shot(
    model, labelled(TEST), NAMES, tokenizer, TEMPLATES, ks=(1, 2), verbose=0
)
counts = np.bincount(
    np.concatenate([batch["labels"] for batch in labelled(TEST)]),
    minlength=len(NAMES),
)
print("Images of each class:", dict(zip(NAMES, counts.tolist())))
print("Always the most frequent class:", f"{counts.max() / counts.sum():.1%}")
for name, value in zero_shot.items():
    print(f"{name:16} {value:.1%}")

"""
## Linear probe

A logistic regression on the frozen embeddings. Its regularization is chosen on the validation
images; the test images are used once, at the end.
"""

probe = kcm.evaluation.evaluate_linear_probe(
    model,
    labelled(TRAIN),
    labelled(TEST),
    validation=labelled(VALIDATION),
    verbose=0,
)
for name in ("top_1", "mean_per_class"):
    print(f"{name:16} {probe[name]:.1%}")

"""
## Search

Embeddings are L2-normalised, so an inner product is a cosine similarity, and an index of
inner products searches images by text and by image. `IndexFlatIP` is exact;
`IndexIVFFlat` and `IndexHNSWFlat` of faiss are faster for millions of images.
"""

QUERIES = ["smiling face", "red heart", "green flag", "fruit", "road sign"]
held_out = [batch["images"] for part in (VALIDATION, TEST) for batch in batches(part)]
images = np.concatenate(held_out)
embeddings = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
index = faiss.IndexFlatIP(embeddings.shape[1])
index.add(embeddings)

texts = kcm.evaluation.embed_texts(model, QUERIES, tokenizer, verbose=0)
scores, found = index.search(texts, 6)
# The best image of each text is the next query, and its own best result.
image_scores, image_found = index.search(embeddings[found[:, 0]], 6)
rows = [*zip(scores, found), *zip(image_scores, image_found)]
titles = [*QUERIES, *[f"like the first image\nof {query!r}" for query in QUERIES]]
figure, axes = plt.subplots(len(rows), 6, figsize=(8, 1.5 * len(rows)))
for row_axes, title, row in zip(axes, titles, rows):
    row_axes[0].text(-0.1, 0.5, title, ha="right", transform=row_axes[0].transAxes)
    for axis, score, image in zip(row_axes, *row):
        axis.imshow(images[image])
        axis.set_title(f"{score:.2f}", fontsize=9)
        axis.axis("off")
figure.savefig(RESULTS / "search.png", dpi=100, bbox_inches="tight")
print(f"Search results: {RESULTS / 'search.png'}")

"""
## Public benchmarks

[CLIP_benchmark](https://github.com/LAION-AI/CLIP_benchmark) has dozens of data sets with
their classes and templates. Its own code evaluates a Keras model as it does open_clip's:

```bash
pip install clip-benchmark
python -m keras_cluster_mask.interop.clip_benchmark eval --model my_clip \\
    --pretrained results/model.keras --tokenizer results/tokenizer.json \\
    --dataset wds/vtab/cifar10 --dataset_root "wds_cifar10" --output result.json
```

[SugarCrepe](https://github.com/RAIVNLab/sugar-crepe) measures composition: the right one of
two captions that differ in a word or two. `sugar_crepe` is all of its seven data sets. The
folder holds its JSON files and COCO's `val2017/`; what is missing is downloaded.

```bash
python -m keras_cluster_mask.interop.clip_benchmark eval --model my_clip \\
    --pretrained results/model.keras --tokenizer results/tokenizer.json \\
    --dataset sugar_crepe --dataset_root sugarcrepe --output "{dataset}.json"
```

Weights of open_clip are evaluated in the same way, and your own weights can be saved for
open_clip. The folder of a downloaded model holds its `open_clip_config.json`, which says
what the weights do not. Weights alone need the name of the config:

```
model = kcm.interop.load_open_clip("CLIP-ViT-B-32-DataComp.XL-s13B-b90K")
model = kcm.interop.load_open_clip("epoch_32.pt", "ViT-B-32")
kcm.interop.save_open_clip(model, "mine/open_clip_model.safetensors")
```

CLIP, MetaCLIP 2 and SigLIP of Hugging Face's transformers are loaded by
`kcm.interop.load_hugging_face(folder)`.
"""
