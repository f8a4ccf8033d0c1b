# %% [markdown]
# # Compare maskings
#
# Maskings that drop the same number of patches cost nearly the same. They differ in which patches
# they keep. This guide compares
# [cluster masking](https://arxiv.org/abs/2405.08815) with random masking
# ([FLIP](https://arxiv.org/abs/2212.00794)) and with whole images. It shows
#
# - which patches each masking keeps in an image,
# - how often each masking keeps each position,
# - the recall of a small CLIP trained with each masking, from the same initial weights and for the
#   same number of steps.
#
# The guide takes about two minutes on two CPU cores, with torch and batches of 64. To compare another
# masking, add it to `MASKINGS`. [Methods and sources](../docs/which_masking.md) lists all maskings.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# %matplotlib inline
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_cluster_mask as kcm

IMAGES = kcm.data.example_images()
RESULTS = Path(os.environ.get("RESULTS", "results"))
IMAGE_SIZE = 48
PATCH_SIZE = 6  # 8 x 8 patches.
CONTEXT_LENGTH = 12
BATCH_SIZE = 64
EPOCHS = int(os.environ.get("EPOCHS", 6))
SEED = 1
MASKINGS = {
    "none": lambda: None,
    "random": lambda: kcm.RandomMasking(0.5, seed=SEED),
    "cluster": lambda: kcm.ClusterMasking(0.5, patch_size=PATCH_SIZE, seed=SEED),
}
RESULTS.mkdir(parents=True, exist_ok=True)


def show(figure, name):
    """Saves a figure, and displays it in a notebook."""
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    return figure


# %% [markdown]
# ## Kept patches
#
# On photographs, random masking keeps a part of every object. Cluster masking drops the sky, the
# table or the wall, and keeps most of the other patches. Each step draws new anchors, so the masks
# change.

# %%
names = "astronaut", "coffee", "chelsea", "rocket"
files = [IMAGES.parent / "photographs" / f"{name}.jpg" for name in names]
photographs = np.stack([plt.imread(file) for file in files])
columns = {
    "random": kcm.RandomMasking(0.5),
    "cluster": kcm.ClusterMasking(0.5, patch_size=16),
    "cluster,\nsoftness 0.3": kcm.ClusterMasking(0.5, patch_size=16, softness=0.3),
}
show(kcm.visualization.plot_masks(photographs, columns), "compared_masks")

# %% [markdown]
# ## Kept positions
#
# `masking.select` returns the `indices` of the kept patches, and `visible`, which is false for the
# padding of a masking with a threshold. Both maskings keep half of the patches of every image. They
# choose patches or anchors at random, so on this dataset, no part of the image is kept much more
# often than another.

# %%
captions = kcm.data.read_captions(IMAGES / "train-*.tar")
tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, CONTEXT_LENGTH)


def dataset(split, training=False, **options):
    return kcm.data.image_text_dataset(
        IMAGES / f"{split}-*.tar",
        tokenizer,
        IMAGE_SIZE,
        BATCH_SIZE,
        training=training,
        seed=SEED,
        **options,
    )


images = np.concatenate([batch["images"] for batch in dataset("validation")])
noise = np.random.default_rng(SEED).random((len(images), 64))
figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
for axis, name in zip(axes, ("random", "cluster")):
    selected = MASKINGS[name]().select(images, noise=noise)
    indices, visible = map(keras.ops.convert_to_numpy, selected)
    fraction = np.bincount(indices[visible], minlength=64) / len(images)
    print(f"{name:10}{fraction.min():.0%} to {fraction.max():.0%} of the images")
    drawn = axis.imshow(fraction.reshape(8, 8), vmin=0, vmax=1)
    axis.set_title(name)
figure.colorbar(drawn, ax=axes, label="fraction of images")
plt.close(figure)
show(figure, "kept_positions")

# %% [markdown]
# ## Train with each
#
# All models start from the same weights, and see the same images, crops and captions in the same
# order. The model without masking reads 64 patches per image, and the other models read 32.
#
# After every epoch, `kcm.callbacks.Retrieval` computes the recall on the validation pairs, on whole
# images. The epoch times do not include this evaluation.


# %%
class EpochTimes(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def train(masking):
    keras.utils.set_random_seed(SEED)
    backbone = kcm.models.clip_backbone(
        "tiny", IMAGE_SIZE, tokenizer.vocabulary_size, CONTEXT_LENGTH, PATCH_SIZE
    )
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    data = dataset("train", training=True, crop_scale=(0.6, 1.0))
    model.compile(kcm.small_data_optimizer(EPOCHS, len(data), 1.5e-3))
    times = EpochTimes()
    callbacks = [times, kcm.callbacks.Retrieval(dataset("validation"), ks=10)]
    history = model.fit(data, epochs=EPOCHS, callbacks=callbacks).history
    return {
        "seconds": EPOCHS * np.median(times.seconds),
        "curve": history["val_text_to_image_recall@10"],
        "recall": kcm.evaluation.evaluate_retrieval(model, dataset("test"), verbose=0),
    }


runs = {}
for name, make in MASKINGS.items():
    print(f"\n{name}")
    runs[name] = train(make())

# %% [markdown]
# ## Results
#
# Recall@10 on 346 test pairs has a 95 % confidence interval of about ± 3 to 4 points, so one short
# run says little about small differences. Repeat the runs with several seeds and on your own data.
# [Longer studies](../docs/benchmarks/from_nothing.md) use photographs and several seeds.

# %%
print(f"{'':10}{'seconds':>8}{'image to text':>16}{'text to image':>16}")
for name, run in runs.items():
    both = [run["recall"][f"{x}_recall@10"] for x in ("image_to_text", "text_to_image")]
    print(f"{name:10}{run['seconds']:8.0f}{both[0]:16.1%}{both[1]:16.1%}")

COLORS = {"none": "gray", "random": "C0", "cluster": "C1", "chance": "black"}
captions = kcm.data.read_captions(IMAGES / "validation-*.tar")
chance = kcm.evaluation.chance_recall(captions)["text_to_image_recall@10"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, run in runs.items():
    style = dict(marker=".", label=name, color=COLORS.get(name))
    epochs = np.arange(1, EPOCHS + 1)
    axes[0].plot(epochs, run["curve"], **style)
    axes[1].plot(epochs * run["seconds"] / EPOCHS, run["curve"], **style)
for axis, label in zip(axes, ("epochs", "seconds of training")):
    axis.axhline(chance, color=COLORS["chance"], linestyle=":", label="chance")
    axis.set(xlabel=label, ylabel="recall@10, text to image")
    axis.grid(alpha=0.3)
axes[0].legend()
plt.close(figure)
show(figure, "compared_recall")
