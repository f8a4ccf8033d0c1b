# %% [markdown]
# # Connect two pre-trained encoders
#
# With a few hundred or thousand photographs, do not train from scratch. Connect two encoders that
# were pre-trained separately: DINOv2 for images, and MiniLM for sentences. You only train a small
# projection from each encoder into a shared embedding space.
#
# This guide shows how to
#
# - prepare your own photographs and captions,
# - run the frozen encoders once, and train the projections on their features, in seconds,
# - search your photographs by text,
# - tune both encoders on whole images and, in the same time, with random masking (50 %).
#
# For 400 images, it takes about ten minutes on two CPU cores, with torch and batches of 64.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import csv
import shutil
import time
from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_cluster_mask as kcm

# %% [markdown]
# ## Settings
#
# [KerasHub](https://keras.io/keras_hub/presets/) downloads the encoders. To use local files, set
# `KERAS_CLUSTER_MASK_ENCODERS` to a folder with one subfolder per encoder, in the format of KerasHub
# or Hugging Face.

# %%
FOLDER = os.environ.get("KERAS_CLUSTER_MASK_ENCODERS")
IMAGE_ENCODER = f"{FOLDER}/dinov2_small" if FOLDER else "dinov2_small"
TEXT_ENCODER = f"{FOLDER}/all_minilm_l6_v2" if FOLDER else "all_minilm_l6_v2_en"
RESULTS = Path(os.environ.get("RESULTS", "results"))
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", 168))  # 144 patches of 14 pixels.
EPOCHS = int(os.environ.get("EPOCHS", 3))

# %% [markdown]
# ## Your photographs
#
# You need a folder of images and two CSV files, one for training and one for testing, with the
# columns `file_name` and `caption`. Replace this cell with the paths of your own files.
#
# Here, the folder contains 400 captioned drawings, a quarter of them for testing, and six photographs
# for testing. This data shows that each step works. It does not show how well the model works on
# photographs like yours, because the model is trained only on drawings.

# %%
PHOTOGRAPHS = RESULTS / "photographs"
TRAIN, TEST = PHOTOGRAPHS / "train.csv", PHOTOGRAPHS / "test.csv"
PHOTOGRAPHS.mkdir(parents=True, exist_ok=True)
IMAGES = kcm.data.example_images()
captions = ["an astronaut", "a cat", "coffee", "galaxies", "a retina", "a rocket"]
files = sorted((IMAGES.parent / "photographs").glob("*.jpg"))
rows = {TRAIN: [], TEST: [(file.name, text) for file, text in zip(files, captions)]}
for file in files:
    shutil.copy(file, PHOTOGRAPHS)
options = dict(training=False, include_captions=True)
source = IMAGES / "train-00000.tar"
batches = kcm.data.image_text_dataset(source, None, IMAGE_SIZE, 64, **options)
drawings = [pair for x in batches for pair in zip(x["images"], x["captions"])]
for number, (image, (caption,)) in enumerate(drawings[:400]):
    Image.fromarray(image).save(PHOTOGRAPHS / f"{number}.png")
    table = TRAIN if number % 4 else TEST
    rows[table].append((f"{number}.png", caption))
for table, content in rows.items():
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *content])

# %% [markdown]
# ## Two encoders, one model
#
# `from_encoders` loads the presets, and chooses the pooling of each encoder by its family. For
# DINOv2, it uses the class token and the mean of the patch tokens. The preprocessor of the text
# encoder becomes the model's tokenizer.


# %%
def connect(masking=None):
    """Returns a model with new copies of the pre-trained encoders."""
    keras.utils.set_random_seed(1)
    return kcm.ContrastiveModel.from_encoders(
        IMAGE_ENCODER,
        TEXT_ENCODER,
        image_size=IMAGE_SIZE,
        projection_dim=256,
        masking=masking,
    )


model = connect()

# %% [markdown]
# ## Train projections on features
#
# Frozen encoders return the same features in every epoch. With `epochs=0`, `fine_tune` stores these
# features in a folder, trains only the projections on them, and stops. To resume an interrupted run,
# repeat the same call.

# %%
start = time.perf_counter()
kcm.fine_tune(model, TRAIN, epochs=0, folder=RESULTS / "run", verbose=2)
seconds = {"projections": time.perf_counter() - start}
results = {"projections": kcm.evaluation.evaluate_retrieval(model, TEST, verbose=0)}

# %% [markdown]
# ## Search your photographs
#
# Each row shows the test images that best match a query. The projections were trained only on
# drawings, so some photographs rank below drawings.

# %%
options = dict(training=False)
test = kcm.data.image_text_dataset(TEST, model, **options)
pixels = np.concatenate([batch["images"] for batch in test])
embeddings = kcm.evaluation.embed(model, pixels, verbose=0)["image_embeddings"]
queries = ["a cat", "a cup of coffee", "a rocket", "a flag", "a person", "food"]
similarity = model.encode_text(queries) @ embeddings.T
figure = kcm.visualization.plot_retrieval(queries, pixels, similarity, k=6)
figure.savefig(RESULTS / "own_photographs.png", dpi=80)
figure

# %% [markdown]
# ## Tune with and without masking
#
# With `epochs` above 0, `fine_tune` first trains the projections, and then tunes all weights on crops
# of the photographs. Earlier blocks have lower learning rates, and projections have a higher one. All
# rates decay to zero. A step on half of the patches takes about half the time, so the masked model
# trains for twice as many epochs. Evaluation always uses whole images.

# %%
ways = {"whole images": (None, 1), "random masking": (kcm.RandomMasking(0.5), 2)}
for name, (masking, factor) in ways.items():
    tuned = connect(masking)
    start = time.perf_counter()
    kcm.fine_tune(tuned, TRAIN, epochs=factor * EPOCHS, verbose=2)
    seconds[name] = time.perf_counter() - start
    results[name] = kcm.evaluation.evaluate_retrieval(tuned, TEST, verbose=0)

# %% [markdown]
# ## Recall
#
# With 106 test pairs, the 95 % confidence interval of the recall is about ± 9 points, and each run
# has one seed. These numbers do not show which run is better. On your own data, compare several
# seeds.

# %%
print(f"{'recall@10':16}{'image to text':>15}{'text to image':>15}{'seconds':>10}")
for name, recall in results.items():
    shares = [recall[f"{x}_recall@10"] for x in ("image_to_text", "text_to_image")]
    print(f"{name:16}{shares[0]:15.1%}{shares[1]:15.1%}{seconds[name]:10.0f}")
tuned.save(RESULTS / "connected.keras")

# %% [markdown]
# On 6,090 photographs, two changes gave
# [better results](../docs/benchmarks/quality.md): a hidden layer in the projections
# (`head="mlp"`), and more epochs.
# [Connect two encoders](../docs/how_to/connect_two_encoders.md) describes the options.
