"""The search for the threshold that leaves out a wanted share of the patches."""

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.masking.similarity import STEPS

TOLERANCE = 0.01


def collect_similarities(data, similarity, max_images):
    """Computes similarities for batch after batch of images.

    Args:
        data: Images as an array, or an iterable of batches.
        similarity: Function from `(batch, ...)` images to `(batch, N)` floats.
        max_images: Integer. Stop reading after this many images.

    Returns:
        `(images, N)` float32 array.
    """
    found, count = [], 0
    for images in _image_batches(data):
        found.append(ops.convert_to_numpy(similarity(ops.convert_to_tensor(images))))
        count += len(found[-1])
        if count >= max_images:
            break
    if not count:
        raise ValueError(
            f"`data` must hold at least one batch of images. Received: data={data}"
        )
    return np.concatenate(found)[:max_images]


def find_threshold(similarities, mask_ratio, max_visible):
    """Finds the threshold whose mean mask ratio is nearest to the wanted one.

    Similarities are multiples of `1 / STEPS`, so there are `2 STEPS + 1`
    thresholds that differ, half a step above each. The mask ratio falls as the
    threshold rises, and bisection visits at most 14 of them.

    Args:
        similarities: `(images, N)` array.
        mask_ratio: Float, the share of patches wanted out on average.
        max_visible: Integer. At most this many patches of an image stay.

    Returns:
        The threshold, a float.

    Raises:
        ValueError: If no threshold comes within `TOLERANCE`.
    """

    def threshold(step):
        return (step + 0.5) / STEPS

    def ratio(step):
        visible = np.sum(similarities <= threshold(step), axis=1)
        return 1 - np.mean(np.clip(visible, 1, max_visible)) / similarities.shape[1]

    # The invariant: `low` leaves out too much or just enough, `high` less.
    low, high = -STEPS - 1, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if ratio(middle) >= mask_ratio:
            low = middle
        else:
            high = middle
    best = min(low, high, key=lambda step: abs(ratio(step) - mask_ratio))
    if abs(ratio(best) - mask_ratio) > TOLERANCE:
        raise ValueError(
            f"No threshold leaves out `mask_ratio` of the patches of these images on "
            f"average: the nearest shares within reach are {ratio(low):.3f} and "
            f"{ratio(high):.3f}. Received: mask_ratio={mask_ratio}, "
            f"{len(similarities)} images with {similarities.shape[1]} patches"
        )
    return min(max(threshold(best), -1.0), 1.0)


def _image_batches(data):
    """Yields arrays of images from arrays, datasets, dictionaries and tuples."""
    if isinstance(data, dict) or hasattr(data, "shape"):
        images = _images_of(data)
        for start in range(0, len(images), 64):
            yield images[start : start + 64]
    elif isinstance(data, keras.utils.PyDataset):
        for index in range(len(data)):
            yield _images_of(data[index])
    else:
        try:
            batches = iter(data)
        except TypeError:
            raise ValueError(
                "`data` must be an array of images or an iterable of batches. "
                f"Received: data={data} of type {type(data).__name__}"
            ) from None
        for batch in batches:
            yield _images_of(batch)


def _images_of(batch):
    while isinstance(batch, (tuple, list)):
        batch = batch[0]
    if isinstance(batch, dict):
        if "images" not in batch:
            raise ValueError(
                "A batch of `data` must have the key 'images'. "
                f"Received: keys={sorted(batch)}"
            )
        batch = batch["images"]
    # A backend other than the dataset's own takes arrays, not tensors.
    return batch.numpy() if hasattr(batch, "numpy") else batch
