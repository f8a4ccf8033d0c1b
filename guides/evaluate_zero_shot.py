# %% [markdown]
# # Evaluate an image-text model
#
# The loss of a contrastive model says little about its quality. These metrics on unseen images say
# more:
#
# - **retrieval**: does the model find the caption of an image among all captions, and the reverse?
# - **zero-shot classification**: does the model classify images from only the class names?
# - **linear probe**: how well does a linear classifier work on the embeddings?
#
# This guide evaluates the model of the [first guide](pretrain_clip.py). Run the first guide before
# this one, or load your own model below. Recall and accuracy match
# [CLIP_benchmark](https://github.com/LAION-AI/CLIP_benchmark), except for ties and equal captions.
# The guide needs scikit-learn and [faiss](https://github.com/facebookresearch/faiss):
# `pip install scikit-learn faiss-cpu`.

# %%
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
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

import keras_cluster_mask as kcm

IMAGES = kcm.data.example_images()
RESULTS = Path(os.environ.get("RESULTS", "results"))

keras.utils.set_random_seed(1)
model = keras.saving.load_model(RESULTS / "model.keras")


def show(figure, name):
    """Saves a figure, and displays it in a notebook."""
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    return figure


# %% [markdown]
# For evaluation, `image_text_dataset` yields every image once, in order, with open_clip's center
# crop. It uses the model's tokenizer and image size.


# %%
def dataset(split, training=False):
    return kcm.data.image_text_dataset(
        IMAGES / f"{split}-*.tar",
        model,
        batch_size=64,
        training=training,
        include_captions=not training,
    )


# %% [markdown]
# ## Retrieval
#
# The table shows recall@k on held-out pairs in both directions, with its 95 % confidence interval
# and the recall of a random ranking. If two images have the same caption, both count as correct for
# it, as in training. With `duplicates="negative"`, the other image counts as wrong. All captions of
# an image are used.

# %%
recall = kcm.evaluation.evaluate_retrieval(model, IMAGES / "test-*.tar", verbose=0)
count = len(kcm.data.read_captions(IMAGES / "test-*.tar"))
chance = recall.pop("chance")
print(f"{'':26}recall   95 % interval   chance")
for name, value in recall.items():
    hits = scipy.stats.binomtest(round(value * count), count)
    low, high = hits.proportion_ci(method="wilson")
    print(f"{name:25} {value:6.1%}   {low:5.1%} - {high:5.1%}   {chance[name]:5.1%}")

# %% [markdown]
# ## Zero-shot classification
#
# The model receives only the class names. Templates turn each name into texts, and each image is
# assigned to the class with the most similar texts. Data usually has labels
# (`image_text_dataset(..., label_key="cls")`, or `label_key="folder"` for one folder per class).
# This dataset has only captions, so the guide uses the images whose caption contains exactly one
# class name.

# %%
NAMES = ["flag", "food", "sign", "face", "animal", "woman", "man", "plant", "computer"]
TEMPLATES = ["{}", "{}, symbol", "a {}", "flat drawing of a {}"]


def labeled(split):
    """Yields images whose caption contains exactly one class name, and labels."""
    for batch in dataset(split):
        words = [set(re.split("[ ,]+", text)) for (text,) in batch["captions"]]
        named = np.array([[name in each for name in NAMES] for each in words])
        rows = named.sum(axis=1) == 1
        if rows.any():
            labels = named[rows].argmax(axis=1)
            yield {"images": batch["images"][rows], "labels": labels}


zero_shot = kcm.evaluation.evaluate_zero_shot(
    model, labeled("test"), NAMES, templates=TEMPLATES, ks=(1, 2), verbose=0
)
labels = np.concatenate([batch["labels"] for batch in labeled("test")])
print(f"Always the most frequent class: {np.bincount(labels).max() / len(labels):.1%}")
for name, value in zero_shot.items():
    print(f"{name:16} {value:.1%}")

# %% [markdown]
# A confusion matrix shows which classes the model confuses:

# %%
images = np.concatenate([batch["images"] for batch in labeled("test")])
classifier = kcm.evaluation.zero_shot_classifier(
    model, NAMES, templates=TEMPLATES, verbose=0
)
embeddings = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
found = (embeddings @ np.asarray(classifier)).argmax(axis=1)
figure, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
confusion = metrics.confusion_matrix(labels, found)
metrics.ConfusionMatrixDisplay(confusion, display_labels=NAMES).plot(
    cmap="Blues", xticks_rotation=45, colorbar=False, ax=axis
)
plt.close(figure)
show(figure, "confusion")

# %% [markdown]
# ## Linear probe
#
# A linear probe is a logistic regression on frozen embeddings. Its regularization is chosen on the
# validation images. The test images are used once, at the end.


# %%
def embedded(split):
    found = kcm.evaluation.embed(model, labeled(split), verbose=0)
    return found["image_embeddings"], found["labels"]


train, validation, (images, labels) = map(embedded, ("train", "validation", "test"))
probes = [LogisticRegression(C=c, max_iter=1000).fit(*train) for c in (1, 10, 100)]
probe = max(probes, key=lambda probe: probe.score(*validation))
print(f"top_1            {probe.score(images, labels):.1%}")
accuracy = metrics.balanced_accuracy_score(labels, probe.predict(images))
print(f"mean_per_class   {accuracy:.1%}")

# %% [markdown]
# ## Metrics during training
#
# `kcm.callbacks.Retrieval` computes the recall on validation pairs at the end of each epoch, for
# `History`, `TensorBoard`, `ModelCheckpoint` and `EarlyStopping`. Here, the model trains for two
# more epochs, and `ModelCheckpoint` saves the weights with the best recall.

# %%
best = str(RESULTS / "best.weights.h5")
callbacks = [
    kcm.callbacks.Retrieval(dataset("validation")),
    keras.callbacks.ModelCheckpoint(
        best, "val_text_to_image_recall@10", 0, True, save_weights_only=True, mode="max"
    ),
]
model.compile(keras.optimizers.AdamW(2e-4))
model.fit(dataset("train", training=True), epochs=2, callbacks=callbacks)
model.load_weights(best)

# %% [markdown]
# ## Search
#
# Embeddings are L2-normalized, so an inner product is a cosine similarity. `IndexFlatIP` of faiss
# is exact. `IndexIVFFlat` and `IndexHNSWFlat` are faster for millions of images. In each row, the
# first image is the query, and the others are the images most similar to it.

# %%
images = np.concatenate([batch["images"] for batch in dataset("test")])
embeddings = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
index = faiss.IndexFlatIP(embeddings.shape[1])
index.add(embeddings)
queries = [3, 14, 15, 92]
scores, found = index.search(embeddings[queries], 7)
figure, axes = plt.subplots(len(queries), 7, figsize=(9, 5.6), layout="constrained")
for axis, image, score in zip(axes.flat, found.flat, scores.flat):
    axis.imshow(images[image])
    axis.set_title(f"{score:.2f}", fontsize=9)
    axis.axis("off")
plt.close(figure)
show(figure, "similar")

# %% [markdown]
# ## Public benchmarks
#
# [This page](../docs/how_to/evaluate.md#clip_benchmark) shows how to evaluate a model on the datasets
# of CLIP_benchmark.
