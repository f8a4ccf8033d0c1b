# %% [markdown]
# # Pre-train CLIP on half of each image
#
# [CLIP](https://arxiv.org/abs/2103.00020) trains an image encoder and a text encoder on images
# and their captions. The embedding of an image becomes more similar to its own caption than to the
# other captions in the batch. The trained model can search images by text, and classify images
# without training on labels.
#
# Masking makes training cheaper: in each step, the image encoder reads half of each image.
#
# This guide trains a small CLIP on 3,223 captioned emoji and drawings, with JAX, TensorFlow or
# PyTorch (`KERAS_BACKEND`). On JAX, it takes about two minutes on two CPU cores, in batches of 64.
# It shows how to
#
# - plot the patches that a masking drops,
# - add a masking to CLIP and train it with `fit()` on WebDataset shards,
# - measure the recall on held-out pairs, and search images by text.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# %matplotlib inline
import random
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_cluster_mask as kcm

# %% [markdown]
# ## Settings
#
# To train on your own data, set `TRAIN`, `VALIDATION` and `TEST` to your shards: tar files in which
# `KEY.txt` follows `KEY.jpg` (or png, webp), as written by
# [img2dataset](https://github.com/rom1504/img2dataset). For photographs, use a larger
# `IMAGE_SIZE`, such as 224 pixels with patches of 16, and a larger model, such as `"vit_b_16"`.

# %%
IMAGES = kcm.data.example_images()
SPLITS = "train", "validation", "test"
TRAIN, VALIDATION, TEST = (IMAGES / f"{split}-*.tar" for split in SPLITS)
RESULTS = Path(os.environ.get("RESULTS", "results"))

MODEL = "tiny"
IMAGE_SIZE = 48
PATCH_SIZE = 8
VOCABULARY_SIZE, CONTEXT_LENGTH = 3000, 12
EPOCHS = int(os.environ.get("EPOCHS", 10))
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-3

random.seed(1)  # Keras draws the seeds of weights from Python's generator.
RESULTS.mkdir(parents=True, exist_ok=True)
print(f"Backend: {keras.backend.backend()}; results go to {RESULTS.resolve()}")


def show(figure, name):
    """Saves a figure, and displays it in a notebook."""
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    return figure


# %% [markdown]
# ## Masks
#
# Random masking leaves gaps everywhere. Cluster masking removes whole surfaces and keeps others
# intact: a few random patches become anchors, and the patches most similar to an anchor are
# dropped, until half of all patches are dropped.
#
# This guide uses random masking, which we recommend as the first choice
# ([measurements](../docs/benchmarks/from_nothing.md)).

# %%
names = "astronaut", "coffee", "chelsea", "rocket"
files = [IMAGES.parent / "photographs" / f"{name}.jpg" for name in names]
photographs = np.stack([plt.imread(file) for file in files])
maskings = {
    "random masking": kcm.RandomMasking(0.5),
    "cluster masking": kcm.ClusterMasking(0.5, patch_size=16),
}
show(kcm.visualization.plot_masks(photographs, maskings), "masks")

# %% [markdown]
# ## Data
#
# The tokenizer is trained on the captions, so nothing is downloaded. For web captions, use
# CLIP's own vocabulary: `kcm.data.CLIPTokenizer.from_open_clip()`.
#
# Transparent backgrounds become white.

# %%
captions = kcm.data.read_captions(TRAIN)
tokenizer = kcm.data.CLIPTokenizer.train(captions, VOCABULARY_SIZE, CONTEXT_LENGTH)


def dataset(source, training=False, **options):
    return kcm.data.image_text_dataset(
        source, tokenizer, IMAGE_SIZE, BATCH_SIZE, training=training, **options
    )


def flip(image, generator):
    """Flips half of the images."""
    return image[:, ::-1] if generator.random() < 0.5 else image


train = dataset(TRAIN, True, seed=1, crop_scale=(0.5, 1.0), image_transform=flip)
validation, test = dataset(VALIDATION), dataset(TEST)

# %% [markdown]
# ## Model
#
# `clip_backbone` creates a CLIP with random weights, and `from_backbone` inserts the masking after
# the patch embedding. A pre-trained CLIP from keras_hub works the same way.
#
# To use cluster masking instead, pass `kcm.ClusterMasking(patch_size=PATCH_SIZE)`.
# `small_data_optimizer` returns AdamW with a learning rate that warms up and then decays to zero.
# The loss is built in, so `compile` only needs an optimizer.

# %%
backbone = kcm.models.clip_backbone(
    MODEL, IMAGE_SIZE, tokenizer.vocabulary_size, CONTEXT_LENGTH, PATCH_SIZE
)
model = kcm.ContrastiveModel.from_backbone(
    backbone, masking=kcm.RandomMasking(0.5, seed=1), tokenizer=tokenizer
)
model.compile(kcm.small_data_optimizer(EPOCHS, len(train), LEARNING_RATE))

# %% [markdown]
# ## Training
#
# The progress bar shows the loss and the `accuracy`. The accuracy is the fraction of images that are
# most similar to their own caption in the batch, averaged with the same fraction for captions. After
# each epoch, `kcm.callbacks.Retrieval` adds the recall on the validation images.

# %%
recall = kcm.callbacks.Retrieval(validation, ks=10)
history = model.fit(
    train, epochs=EPOCHS, validation_data=validation, callbacks=[recall]
)
chance = {"loss": np.log(BATCH_SIZE)} | recall.chance
show(kcm.visualization.plot_history(history, chance=chance), "training")

# %% [markdown]
# The model overfits: the training loss keeps falling, while the validation loss is lowest after
# 3 or 4 epochs and ends above chance. The recall keeps rising for longer, because it depends only on
# the order of the similarities, not on the model's confidence.
#
# ## Recall
#
# Image-to-text recall@k is the fraction of test images with their caption among the k most similar
# captions. Text-to-image recall@k is the reverse. Chance is the recall of a random ranking.

# %%
recall = kcm.evaluation.evaluate_retrieval(model, test, verbose=0)
chance = recall.pop("chance")
for name, value in recall.items():
    print(f"{name:25} {value:6.1%}   chance {chance[name]:5.1%}")

# %% [markdown]
# ## Search by text
#
# Embed the queries and rank the test images by their similarity to each query. We chose the queries
# on the validation images. The model finds common kinds of images: flags, faces and people, though
# not all of the people are women. It recognizes few specific objects.

# %%
QUERIES = ["flag", "face", "woman"]
images = np.concatenate([batch["images"] for batch in test])
image_embeddings = kcm.evaluation.embed(model, images, verbose=0)["image_embeddings"]
similarity = model.encode_text(QUERIES) @ image_embeddings.T
show(kcm.visualization.plot_retrieval(QUERIES, images, similarity), "search")

# %% [markdown]
# ## Save
#
# Load `model.keras` with this library to embed texts or continue training. The preset contains the
# CLIP and its tokenizer. keras_hub loads both without this library, with
# `CLIPBackbone.from_preset(path)` and `CLIPTokenizer.from_preset(path)`.

# %%
model.save(RESULTS / "model.keras")
model.save_to_preset(RESULTS / "clip")

# %% [markdown]
# ## Next steps
#
# - [Evaluate](evaluate_zero_shot.py) this model, or [fine-tune](fine_tune_clip.py) it.
# - [Compare maskings](compare_maskings.py), or [write your own](write_your_own_masking.py).
