"""Batches of images, and of what belongs to them, from data of any kind."""

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops


def read_batches(data: Any, batch_size: int = 64) -> Iterator[dict[str, np.ndarray]]:
    """Reads data batch by batch.

    Args:
        data: Arrays, or an iterable of batches (a `tf.data.Dataset`, a `PyDataset`, a
            list, a generator); of an endless `image_text_dataset` one epoch is read. A
            batch is a dictionary with the key `"images"`, a pair `(images, labels)`, or
            images alone. One such dictionary, pair or array of images holds all data.
        batch_size: Integer. The size of batches that are cut from arrays. Other data
            keeps its own batches.

    Yields:
        Dictionaries of NumPy arrays of equal lengths: `"images"`, of a pair also
        `"labels"`, and all other entries. `"captions"` is an array of str or bytes, or
        an object array of sequences of them.

    Raises:
        ValueError: If `data` is of another kind, if a batch has no images, or if its
            entries have different lengths.
    """
    if _is_whole(data):
        whole = _dictionary(data)
        for start in range(0, _length(whole["images"]), batch_size):
            yield _arrays({k: v[start : start + batch_size] for k, v in whole.items()})
        return
    if isinstance(data, keras.utils.PyDataset):
        # Its own iterator never ends.
        batches = map(data.__getitem__, range(len(data)))
    else:
        try:
            batches = iter(data)
        except TypeError:
            raise ValueError(
                "`data` must be arrays or an iterable of batches. "
                f"Received: data={data} of type {type(data).__name__}"
            ) from None
    if stream_of(data) is not None:
        batches = itertools.islice(batches, len(data))
    for batch in batches:
        yield _arrays(_dictionary(batch))


def stream_of(data: Any):
    """The endless `ImageTextDataset` that data is or was made of, or `None`."""
    stream = getattr(data, "stream", None)
    return stream if getattr(stream, "training", False) else None


def read_images(data: Any, max_images: int | None = None) -> Iterator[np.ndarray]:
    """Reads the images of data batch by batch, at least one.

    Args:
        data: As for `read_batches`.
        max_images: Integer. Stop after this many images, without reading another
            batch. `None` reads all.

    Yields:
        Arrays of images `(batch, ...)`, none of them empty.

    Raises:
        ValueError: If there is no image in `data`, and as `read_batches` does.
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
    if not count:
        raise ValueError(f"`data` must hold at least one image. Received: data={data}")


def num_images(data: Any) -> int | None:
    """The number of images in arrays, or in an `image_text_dataset` for evaluation.

    Broken images of a dataset are included. `None` for other data, which must be read
    to count.
    """
    if _is_whole(data):
        return _length(_dictionary(data)["images"])
    return getattr(getattr(data, "stream", None), "num_images", None)


def _is_whole(data):
    if isinstance(data, tuple):
        return bool(data) and hasattr(data[0], "shape")
    return isinstance(data, dict) or hasattr(data, "shape")


def _dictionary(batch):
    if isinstance(batch, tuple | list) and len(batch):
        images, *labels = batch
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
    lengths = {name: _length(values) for name, values in batch.items()}
    if len({*lengths.values()}) > 1:
        raise ValueError(
            "The entries of a batch of `data` must have equal lengths. Received: "
            + ", ".join(f"{name} of {length}" for name, length in lengths.items())
        )
    return batch


def _length(values):
    """The number of rows of an array, a tensor or a list; `None` if it has none."""
    if hasattr(values, "shape"):
        return values.shape[0] if len(values.shape) else None
    return len(values) if hasattr(values, "__len__") else None


def _arrays(batch):
    return {
        name: _captions(values) if name == "captions" else as_array(values)
        for name, values in batch.items()
    }


def as_array(values: Any) -> np.ndarray:
    """A NumPy array of a list, an array, or a tensor of any backend."""
    if ops.is_tensor(values):
        return ops.convert_to_numpy(values)
    # A tensor of TensorFlow is no tensor to another backend.
    return values.numpy() if hasattr(values, "numpy") else np.asarray(values)


def _captions(values):
    # NumPy would make a matrix of captions if each image has the same number of them.
    if hasattr(values, "shape"):
        values = as_array(values)
        if values.ndim == 1:
            return values
        values = map(tuple, values)
    captions = list(values)
    array = np.empty(len(captions), object)
    for index, caption in enumerate(captions):
        array[index] = caption
    return array
