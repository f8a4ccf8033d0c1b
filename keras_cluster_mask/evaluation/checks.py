"""Checks of embeddings, labels and numbers."""

import numpy as np

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.checks import check_integer


def check_read_once(name, data):
    """Raises an error for a dataset for training: endless and randomly cropped."""
    if stream_of(data) is not None:
        raise ValueError(
            f"`{name}` must hold each image once, without random crops: pass "
            "`training=False` to `image_text_dataset`. "
            f"Received: {name}={data}, a dataset for training"
        )


def check_matrix(name, values):
    """Returns values as a float32 matrix, after a check that all are finite."""
    values = np.asarray(values, dtype="float32")
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


def check_embeddings(name, embeddings):
    """Returns embeddings L2-normalized in float32; rows of zeros stay zero."""
    embeddings = check_matrix(name, embeddings)
    # The squares of very large or small values would overflow or underflow.
    largest = np.maximum(embeddings.max(axis=1), -embeddings.min(axis=1))
    embeddings = embeddings / np.where(largest, largest, 1)[:, None]
    lengths = np.sqrt(np.einsum("id,id->i", embeddings, embeddings, dtype="float64"))
    embeddings /= np.where(lengths, lengths, 1)[:, None].astype("float32")
    return embeddings


def check_ks(ks):
    """Returns ks as a tuple of ints, after a check that they are positive integers."""
    given = ks.tolist() if hasattr(ks, "tolist") else ks
    given = given if isinstance(given, tuple | list | range) else (given,)
    return tuple(check_integer("ks", k, 1) for k in given or [given])


def check_labels(name, labels, num_items, num_classes=None):
    """Returns labels as ints, after a check of their shape and, if given, range."""
    labels = np.asarray(labels)
    if labels.shape != (num_items,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be ints of shape ({num_items},), a class for each item. "
            f"Received: {name} of shape {labels.shape} and type {labels.dtype}"
        )
    if num_classes is None:
        return labels
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"`{name}` must be classes from 0 to {num_classes - 1}. Received: other "
            f"labels in {len(bad)} rows, the first {bad[:5].tolist()}: "
            f"{labels[bad[:5]].tolist()}"
        )
    return labels.astype("int64")
