"""Reads batches of images, with their captions or labels, from any kind of data."""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cluster_mask.stream import Stream


def read_batches(data: Any, batch_size: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Reads data batch by batch.

    Args:
        data: Arrays, or an iterable of batches (a `tf.data.Dataset`, a `PyDataset`, a
            list, a generator). An endless `image_text_dataset` is read for one epoch. A
            batch is a dictionary with the key `"images"`, a pair `(images, labels)`, or
            only images. A single dictionary, pair or array of images is the whole
            data.
        batch_size: Integer. The batch size for arrays. Other data keeps its own
            batches.

    Yields:
        Dictionaries of NumPy arrays of equal lengths: `"images"`, for a pair also
        `"labels"`, and all other entries. `"captions"` is an array of str or bytes, or
        an object array of sequences of them.

    Raises:
        ValueError: If a batch has no images, or file names in place of images, or if
            its entries have different lengths.
        TypeError: If `data` is neither arrays nor an iterable.
    """
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    if _is_whole(data):
        whole = _dictionary(data)
        for start in range(0, len(whole["images"]), batch_size):
            yield _arrays({k: v[start : start + batch_size] for k, v in whole.items()})
        return
    # A `PyDataset`'s own iterator never ends.
    is_sequence = isinstance(data, keras.utils.PyDataset)
    batches = map(data.__getitem__, range(data.num_batches)) if is_sequence else data
    if isinstance(data, Stream):
        batches = itertools.islice(batches, len(data))
    for batch in batches:
        yield _arrays(_dictionary(batch))


def is_tf_dataset(data: Any) -> bool:
    """Returns whether data is a `tf.data.Dataset`. TensorFlow may not be installed."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(data, tensorflow.data.Dataset)


def is_endless(data: Any) -> bool:
    """Returns whether data never ends, as a stream for training."""
    if isinstance(data, Stream):
        return data.training
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    # It knows whether it repeats without end.
    return is_tf_dataset(data) and int(data.cardinality()) == -1


def read_images(data: Any, max_images: int | None = None) -> Iterator[np.ndarray]:
    """Reads the images of data batch by batch.

    Args:
        data: As for `read_batches`.
        max_images: Integer. Stop after this many images, without reading another
            batch. `None` reads all.

    Yields:
        Non-empty arrays of images `(batch, ...)`.

    Raises:
        ValueError: If there is no image in `data`, and in the cases of `read_batches`.
    """
    count = 0
    for batch in read_batches(data):
        images = batch["images"]
        if max_images is not None:
            images = images[: max_images - count]
        if len(images):
            yield images
        count += len(images)
        if count == max_images:
            break
    check_not_empty(count, data)


def check_not_empty(count: int, data: Any) -> None:
    """Raises an error for data without images."""
    if not count:
        raise ValueError(
            f"`data` must contain at least one image. Received: data={data}"
        )


def num_images(data: Any) -> int | None:
    """Returns the number of images, or `None` if the data must be read to count them.

    The number is known for arrays, and for an `image_text_dataset` for evaluation,
    where it includes broken images.
    """
    if _is_whole(data):
        return len(_dictionary(data)["images"])
    return data.num_images if isinstance(data, Stream) else None


def num_batches(data: Any) -> int | None:
    """Returns the length of an `image_text_dataset` for evaluation, or `None`."""
    is_known = isinstance(data, Stream) and not data.training
    return len(data) if is_known else None


def _is_whole(data):
    if isinstance(data, tuple):
        return bool(data) and hasattr(data[0], "shape")
    return isinstance(data, dict | str) or hasattr(data, "shape")


def _dictionary(batch):
    if isinstance(batch, tuple | list) and len(batch):
        images, *labels = batch
        if len(labels) > 1:
            raise ValueError(
                "A batch of `data` must be a dictionary, images, or a pair of images "
                f"and labels. Received: a {type(batch).__name__} of {len(batch)}"
            )
        batch = images if isinstance(images, dict) else {"images": images}
        if labels:
            batch = {**batch, "labels": labels[0]}
    elif not isinstance(batch, dict):
        batch = {"images": batch}
    batch = {name: values for name, values in batch.items() if values is not None}
    if "images" not in batch:
        raise ValueError(
            "A batch of `data` must have the key 'images'. "
            f"Received: keys={sorted(batch)}"
        )
    check_equal_lengths(batch)
    return batch


def check_equal_lengths(batch: dict[str, Any]) -> None:
    """Raises an error unless all entries of a batch have one row per image."""
    lengths = {}
    for name, values in batch.items():
        if hasattr(values, "shape"):
            lengths[name] = values.shape[0] if len(values.shape) else None
        else:
            lengths[name] = len(values) if hasattr(values, "__len__") else None
    if len({*lengths.values()}) > 1:
        raise ValueError(
            "All entries of a batch, and all arrays, must have equal lengths. "
            "Received: "
            + ", ".join(f"{name} of {length}" for name, length in lengths.items())
        )


def _arrays(batch):
    arrays = {
        name: _captions(values) if name == "captions" else as_array(values)
        for name, values in batch.items()
    }
    # Names of files are strings, or objects.
    if arrays["images"].dtype.kind in "OSU":
        raise ValueError(
            "`data` must contain images as arrays: read files and folders with "
            "`kcm.data.image_text_dataset(source, model, training=False)`. Received: "
            f"images={batch['images']!r}"
        )
    return arrays


def as_array(values: Any) -> np.ndarray:
    """Converts a list, an array, or a tensor of any backend to a NumPy array."""
    if ops.is_tensor(values):
        return ops.convert_to_numpy(values)
    # `ops.is_tensor` does not recognize TensorFlow tensors on another backend.
    return values.numpy() if hasattr(values, "numpy") else np.asarray(values)


def _captions(values):
    # NumPy would make a 2D array if every image had the same number of captions.
    if hasattr(values, "shape"):
        values = as_array(values)
        if values.ndim == 1:
            return values
        values = map(tuple, values)
    return np.fromiter(values, object)
