# %% [markdown]
# # Write your own masking
#
# A masking decides which patches of an image the encoder reads in training. To write your own,
# subclass `kcm.PatchMasking` and implement one method, `score`: the patches with the highest
# scores are kept. The base class handles random numbers, the exact number of patches, prefix
# tokens, several devices, and saving.
#
# The example is for drawings and products on a plain background, where random masking keeps many
# blank patches. `ContentMasking` drops blank patches first, then random other patches.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# %matplotlib inline
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_cluster_mask as kcm

IMAGES = kcm.data.example_images()
RESULTS = Path(os.environ.get("RESULTS", "results"))
IMAGE_SIZE = 48
PATCH_SIZE = 6
EPOCHS = int(os.environ.get("EPOCHS", 4))

keras.utils.set_random_seed(1)
RESULTS.mkdir(parents=True, exist_ok=True)


def show(figure, name):
    """Saves a figure, and displays it in a notebook."""
    figure.savefig(RESULTS / f"{name}.png", dpi=80)
    return figure


# %% [markdown]
# ## The score
#
# `score` receives the `noise` of a step, `(batch, N)` uniform random numbers, and the normalized
# images. It returns `(batch, N)` scores. Patches with equal scores are ranked by their noise, so
# `ContentMasking` only needs to score blank patches 0 and all others 1. It then keeps random patches
# with content, and random blank patches if there are too few.
#
# Four rules make a masking correct on every backend and on any number of devices:
#
# - compute with `keras.ops`;
# - take sizes from `ops.shape(noise)`: the batch size may be unknown when TensorFlow compiles;
# - take all randomness from `noise`;
# - score each image independently, because a device sees only its part of the batch.
#
# The attribute `patch_size` lets the base class count the patches of an image. Register the
# class, and return its arguments from `get_config`, so that Keras can save models with it.


# %%
@keras.saving.register_keras_serializable(package="my_project")
class ContentMasking(kcm.PatchMasking):
    """Drops blank patches first, then random ones.

    Args:
        patch_size: Integer, in pixels.
        mask_ratio: Float in `[0, 1)`. The fraction of patches to drop.
        contrast: Float. A patch is blank if the standard deviation of its normalized
            pixels is at most this.
        **kwargs: Arguments of `kcm.PatchMasking`, such as `seed`.
    """

    def __init__(self, patch_size, mask_ratio=0.5, contrast=0.05, **kwargs):
        super().__init__(mask_ratio, **kwargs)
        self.patch_size = patch_size
        self.contrast = contrast

    def score(self, noise, images=None, tokens=None):
        sides = (self.patch_size, self.patch_size)
        images = ops.cast(images, "float32")
        patches = ops.image.extract_patches(images, sides)  # (batch, rows, columns, n)
        patches = ops.reshape(patches, (*ops.shape(noise), -1, images.shape[-1]))
        spread = ops.max(ops.std(patches, axis=2), axis=-1)  # (batch, N)
        return ops.cast(spread > self.contrast, "float32")

    def get_config(self):
        config = super().get_config()
        return {**config, "patch_size": self.patch_size, "contrast": self.contrast}


# %% [markdown]
# ## Look at the masks
#
# `plot_masks` shows several maskings with the same noise. It only normalizes images if you pass it a
# model. Here, the images are floats in [0, 1], where a contrast of 0.05 corresponds to about 0.2 on
# normalized images. A patch of a single color inside an object also counts as blank, so
# `ContentMasking` prefers outlines and details.

# %%
captions = kcm.data.read_captions(IMAGES / "train-*.tar")
tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=12)


def dataset(split, training=False, **options):
    source = IMAGES / f"{split}-*.tar"
    return kcm.data.image_text_dataset(
        source, tokenizer, IMAGE_SIZE, batch_size=64, training=training, **options
    )


images = np.concatenate([x["images"] for x in dataset("validation")])
maskings = {
    "RandomMasking": kcm.RandomMasking(0.5, num_prefix_tokens=0),
    "ClusterMasking": kcm.ClusterMasking(0.5, patch_size=PATCH_SIZE),
    "ContentMasking": ContentMasking(PATCH_SIZE, 0.5),
}
show(kcm.visualization.plot_masks(images[:4] / 255.0, maskings), "own_masks")

# %% [markdown]
# ## Check the numbers
#
# A model still trains if its masking keeps the wrong patches, so test the masking on many images.
# `ContentMasking` must not keep a blank patch while it drops a patch with content.
# [Compare maskings](compare_maskings.py) counts how often each position is kept.

# %%
content = maskings["ContentMasking"].score(np.zeros((len(images), 64)), images / 255.0)
for name, masking in maskings.items():
    # Instead of tokens: 1 for a patch with content, and 0 for a blank patch.
    kept = masking(content[:, :, None], images=images / 255.0, training=True)
    print(f"{name:15} {float(ops.mean(kept)):.1%} of the kept patches show something")

# %% [markdown]
# ## Train with it
#
# Pass the masking to `ContrastiveModel.from_backbone`, or to `kcm.with_masking` for other vision
# transformers. The metric `mask_ratio` should equal the ratio that you set.

# %%
backbone = kcm.models.clip_backbone(
    "tiny", IMAGE_SIZE, tokenizer.vocabulary_size, 12, PATCH_SIZE
)
masking = ContentMasking(PATCH_SIZE, mask_ratio=0.5, contrast=0.2, seed=1)
model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
model.compile(keras.optimizers.AdamW(1e-3, weight_decay=0.1))
history = model.fit(dataset("train", training=True, seed=1), epochs=EPOCHS)

# %% [markdown]
# ## Save and load the model
#
# The loaded model has the same masking with its settings, and continues its sequence of random
# numbers. A program that loads the model must import the module that registers the class.

# %%
model.save(RESULTS / "own_masking.keras")
loaded = keras.saving.load_model(RESULTS / "own_masking.keras")
config = loaded.masking.get_config()
print(type(loaded.masking).__name__, {k: config[k] for k in ("mask_ratio", "contrast")})

batch = next(iter(dataset("test")))
difference = np.abs(
    model.predict(batch, verbose=0)["image_embeddings"]
    - loaded.predict(batch, verbose=0)["image_embeddings"]
).max()
print(f"largest difference of an embedding: {difference:.1e}")

# %% [markdown]
# ## Next steps
#
# - With `hides_tokens = True`, a score of `-inf` excludes a patch from the step, so images may keep
#   different numbers of patches; see `kcm.PatchMasking`.
# - [Compare](compare_maskings.py) the masking with other maskings, for the same number of steps.
