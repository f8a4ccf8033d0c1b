"""Reads and checks what functions of evaluation take."""

import os
import re
from collections.abc import Mapping

import keras
import numpy as np

from keras_cluster_mask.batches import as_array, is_endless, read_batches
from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.data.dataset import image_text_dataset
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.types import Items

# How to get data with an entry that is missing.
REMEDIES = {
    "captions": "pass `include_captions=True` to `image_text_dataset`",
    "labels": "pass `label_key` to `image_text_dataset`",
    "token_ids": "pass a tokenizer to `image_text_dataset`, or here for captions",
}


# === Data ===


def pairs_of(model, data):
    """Returns a dataset of the pairs of a source; returns other data unchanged."""
    first, others = data, Mapping | Stream | keras.utils.PyDataset
    if isinstance(data, Items) and not isinstance(data, others | str) and len(data):
        # A table of pandas has names, and `image_text_dataset` says so.
        try:
            first = data[0]
        except (KeyError, TypeError):
            first = {}
    # Rows of an object, and not batches.
    is_rows = isinstance(first, Mapping) and first is not data
    if is_rows and "images" in first:
        return data
    if not is_rows and not isinstance(first, str | os.PathLike):
        return data
    size, resize = (model.preprocessing[name] for name in ("image_size", "resize"))
    return image_text_dataset(
        data,
        None,
        image_size=size,
        training=False,
        resize=resize,
        include_captions=True,
        process=(0, 1),
    )


def check_read_once(data):
    """Raises an error for a dataset for training: endless and randomly cropped."""
    if is_endless(data):
        raise ValueError(
            "`data` must contain each image once, without random crops: pass "
            f"`training=False` to `image_text_dataset`. Received: data={data}, a "
            "dataset for training"
        )


def check_whole(data):
    """Raises an error for a dataset of which each process reads a part."""
    check_read_once(data)
    process = data.process if isinstance(data, Stream) else (0, 1)
    if process[1] > 1:
        raise ValueError(
            "`data` must contain all images in each process: pass `process=(0, 1)` to "
            f"`image_text_dataset`. Received: data={data}, with process={process}"
        )


def check_class_names(data, class_names):
    """Raises an error unless class names fit the labels of a dataset.

    Labels are indices of names. With another list of names, they are other classes.

    Args:
        data: See `embed`.
        class_names: List of str: those of the dataset, which more may follow, or as
            many other names.
    """
    found, expected = (
        [re.sub("[_-]", " ", name.lower()) for name in names]
        for names in (class_names_of(data), class_names)
    )
    is_renamed = len(found) == len(expected) and {*found}.isdisjoint(expected)
    if is_renamed or found == expected[: len(found)]:
        return
    others = sorted({*found} ^ {*expected}) or "the order"
    raise ValueError(
        "`class_names` must match the class names of `data`, because labels are "
        "indices into them: pass the same `class_names` to each `image_text_dataset`. "
        "Without `class_names`, the classes are the folders that contain images. To "
        "use other words in the texts, pass a dictionary as `templates`. Received: "
        f"{len(found)} classes of `data` for {len(expected)}, which differ in "
        f"{others[:10]}"
    )


def class_names_of(data):
    """Returns the `class_names` of an `image_text_dataset`; `[]` for other data."""
    # A `tf.data.Dataset` of Keras may have other ones.
    return data.class_names if isinstance(data, Stream) else []


def check_entry(batch, key):
    """Raises an error for a batch without an entry, and says how to get it."""
    if key not in batch:
        raise ValueError(
            f"`data` must contain {key!r}: {REMEDIES[key]}. Received: a batch with "
            f"{sorted(batch)}"
        )


def select_entries(data, keys):
    """Reads only the images and some other entries of batches.

    Args:
        data: See `embed`. A dataset for training, or for one of several processes, is
            refused before anything is read.
        keys: List of str. One of those in `REMEDIES` must be in each batch.

    Returns:
        An iterator of dictionaries of arrays.
    """
    check_whole(data)

    def select(batch):
        if not {*keys} & {*REMEDIES} & {*batch}:
            check_entry(batch, keys[0])
        return {key: batch[key] for key in ("images", *keys) if key in batch}

    return map(select, read_batches(data))


def read_labeled(data, class_names):
    """Reads only the images and labels of batches, after a check of the labels.

    A misspelled class is an error at the end of the data: no image has its label, and
    there are images with other labels.

    Args:
        data: See `select_entries`.
        class_names: List of str, of which the labels are indices.

    Returns:
        An iterator of dictionaries of arrays.
    """
    check_class_names(data, class_names)
    batches = select_entries(data, ["labels"])
    unseen = dict(enumerate(class_names_of(data)))

    def check():
        for batch in batches:
            labels = check_labels(
                "labels",
                batch["labels"],
                num_items=len(batch["images"]),
                num_classes=len(class_names),
            )
            for label in np.unique(labels).tolist():
                unseen.pop(label, None)
            yield {**batch, "labels": labels}
        skipped = unseen and data.skipped.by_reason.get("unknown label")
        if skipped:
            raise ValueError(
                "`class_names` of `data` must include the labels of all images. "
                f"Received: {[*unseen.values()][:5]}, which no image has, and "
                f"{skipped} images with other labels"
            )

    return check()


def texts_of(batch):
    """Returns the captions of a batch in one list, and the row of each one's image."""
    check_entry(batch, "captions")
    several = list | tuple | np.ndarray
    rows = [x if isinstance(x, several) else [x] for x in batch["captions"]]
    owners = np.repeat(np.arange(len(rows)), [len(captions) for captions in rows])
    return [encoded(text) for captions in rows for text in captions], owners


def encoded(text):
    if not isinstance(text, str | bytes):
        raise ValueError(f"`captions` and `texts` must be str. Received: {text!r}")
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


# === Arrays and numbers ===


def check_matrix(name, values, dtype="float32"):
    """Returns values as a matrix of floats, after a check that all are finite."""
    values = np.asarray(as_array(values), dtype)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"`{name}` must have shape (items, d). "
            f"Received: {name}.shape={values.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} rows, "
            f"the first {bad[:5].tolist()}"
        )
    return values


def check_ks(ks):
    """Returns ks as a tuple of ints, after a check that they are positive integers."""
    given = np.ravel(np.asarray(ks, dtype=object)).tolist()
    return tuple(check_integer("ks", k) for k in given or [ks])


def check_labels(name, labels, num_items, num_classes):
    """Returns labels as ints, after a check of their shape and range."""
    labels = np.asarray(labels)
    if labels.shape != (num_items,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be ints of shape ({num_items},), one for each item. "
            f"Received: {name} of shape {labels.shape} and type {labels.dtype}"
        )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"`{name}` must be from 0 to {num_classes - 1}. Received: other values in "
            f"{len(bad)} rows, the first {bad[:5].tolist()}: {labels[bad[:5]].tolist()}"
        )
    return labels.astype("int64")
