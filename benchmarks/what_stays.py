"""What each masking leaves of an image, in numbers.

    KERAS_BACKEND=torch python benchmarks/what_stays.py
    KERAS_BACKEND=torch python benchmarks/what_stays.py --data DIR \
        --caption-key json.captions --image-size 64 --patch-size 8

Without training. `AttentiveMasking` is missing, as it needs a trained encoder.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from quality_data import IMAGES, splits
from quality_methods import PATCHES, has_threshold
from reporting import parser, publish

import keras_cluster_mask as kcm

BATCH = 100
# Those that look at pixels or at nothing: others need a trained encoder.
METHODS = [
    name
    for name, method in PATCHES.items()
    if method.masking and not method.needs_encoder and name != "embedding cluster"
]


def arguments(given=None):
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--data", default=str(IMAGES), help="folder of WebDataset shards by split")
    add("--caption-key", default="txt", help="field of captions, or of class names")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="by name")
    add("--images", type=int, default=1000, help="of the training data")
    add("--image-size", type=int, default=48, help="side in pixels")
    add("--patch-size", type=int, default=6, help="side of a patch in pixels")
    add("--results", default="results", help="folder for the JSON file")
    return parsed.parse_args(given)


def main():
    options = arguments()
    images = read_images(options)
    rows = [
        {"method": name, **measure(name, images, options.patch_size)}
        for name in options.methods
    ]
    name = Path(options.data).resolve().name
    title = f"{name}, {len(images)} images of {options.image_size} px"
    shown = [
        {key: f"{x:.3g}" if isinstance(x, float) else x for key, x in row.items()}
        for row in rows
    ]
    publish(
        Path(options.results) / f"what_stays-{name}.json", title, shown, measured=rows
    )


def read_images(options):
    """Whole training images, from 0 to 1."""
    batches = kcm.data.image_text_dataset(
        splits(options.data)["train"],
        None,
        image_size=options.image_size,
        batch_size=BATCH,
        training=False,
        caption_key=options.caption_key,
        format="grain",
    )
    images = []
    for batch in batches:
        images.append(batch["images"])
        if BATCH * len(images) >= options.images:
            break
    return np.concatenate(images)[: options.images] / np.float32(255)


def measure(name, images, patch_size):
    """What the masks of a method leave of images, means over images.

    Returns:
        A dictionary: `"kept"`, the share of the patches; `"look-alike"`, the similarity
        of a patch that is left out to the most similar one that stays; `"colors"`, the
        share of the variance between the mean colors of the patches that is known if
        each is taken from the nearest patch that stays.
    """
    keras.utils.set_random_seed(0)
    masking = PATCHES[name].new_masking(patch_size, None, None)
    masking.num_prefix_tokens = 0
    if has_threshold(masking):
        masking.adapt(images)
    side = images.shape[1] // patch_size
    tokens = np.zeros((BATCH, side * side, 1), "float32")
    found = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH].astype("float32")
        indices, visible = map(
            keras.ops.convert_to_numpy, masking.select(batch, tokens[: len(batch)])
        )
        stays = np.zeros((len(batch), side * side), bool)
        np.put_along_axis(stays, indices, visible, axis=1)
        patches = cut(batch, patch_size)
        found += [numbers(*each, side) for each in zip(stays, patches)]
    # A blank image has no variance, and a mask may leave out nothing.
    return {key: float(np.nanmean([x[key] for x in found])) for key in found[0]}


def cut(images, patch_size):
    """`(batch, N, n)` patches of images, by NumPy."""
    count, size, _, channels = images.shape
    side = size // patch_size
    x = images.reshape(count, side, patch_size, side, patch_size, channels)
    return x.swapaxes(2, 3).reshape(count, side * side, -1, channels)


def numbers(stays, patches, side):
    """What a mask leaves of one image.

    Args:
        stays: `(N,)` booleans.
        patches: `(N, pixels, channels)` array.
        side: The square root of N.
    """
    means = patches.mean(axis=1)
    patterns = (patches - means[:, None]).reshape(len(patches), -1)
    floor = 1e-3 * max(patches.std(), 1e-12)
    unit = patterns / np.maximum(np.linalg.norm(patterns, axis=1), floor)[:, None]
    places = np.stack(np.divmod(np.arange(len(patches)), side), axis=1)
    gone = ~stays
    distances = np.linalg.norm(places[:, None] - places[None, stays], axis=-1)
    nearest = np.flatnonzero(stays)[distances.argmin(axis=1)]
    error = np.square(means - means[nearest]).sum()
    variance = np.square(means - means.mean(axis=0)).sum()
    alike = unit[gone] @ unit[stays].T
    return {
        "kept": stays.mean(),
        "look-alike": alike.max(axis=1).mean() if gone.any() else np.nan,
        "colors": 1 - error / variance if variance else np.nan,
    }


if __name__ == "__main__":
    main()
