"""Checks of embeddings and labels."""

import numpy as np


def check_embeddings(name, embeddings):
    embeddings = np.asarray(embeddings, dtype="float32")
    if embeddings.ndim != 2 or not embeddings.size:
        raise ValueError(
            f"`{name}` must have shape (items, d). "
            f"Received: {name}.shape={embeddings.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} rows, "
            f"the first {bad[:5].tolist()}"
        )
    return embeddings


def check_ks(ks):
    """Returns ks as a tuple, after a check that they are positive integers."""
    given = tuple(ks) if isinstance(ks, tuple | list) else (ks,)
    if not given or not all(isinstance(k, int) and k > 0 for k in given):
        raise ValueError(f"`ks` must be positive integers. Received: ks={ks!r}")
    return given


def check_labels(name, labels, num_items, num_classes):
    """Returns labels as int64, after a check of their shape and range."""
    labels = np.asarray(labels)
    if labels.shape != (num_items,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be ints of shape ({num_items},), a class for each item. "
            f"Received: {name} of shape {labels.shape} and type {labels.dtype}"
        )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"`{name}` must be classes from 0 to {num_classes - 1}. Received: other "
            f"labels in {len(bad)} rows, the first {bad[:5].tolist()}: "
            f"{labels[bad[:5]].tolist()}"
        )
    return labels.astype("int64")
