"""Checks of the embeddings that are searched, and of those that are searched for."""

import numpy as np

# How far from 1 the length of an embedding may be, as that of float16 ones is.
TOLERANCE = 1e-2


def check_embeddings(embeddings, keys):
    """Embeddings as a float32 array; an error names rows that are not normalised."""
    embeddings = np.ascontiguousarray(embeddings, "float32")
    if embeddings.ndim != 2 or not embeddings.size or len(embeddings) != len(keys):
        raise ValueError(
            "`embeddings` must have shape (pictures, d), a row for each of `keys`. "
            f"Received: embeddings.shape={embeddings.shape}, {len(keys)} keys"
        )
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings))
    # Not so for NaN either.
    bad = np.flatnonzero(~(np.abs(lengths - 1) <= TOLERANCE))
    if len(bad):
        named = ", ".join(
            f"{row} ({keys[row]!r}, length {lengths[row]:.3g})" for row in bad[:5]
        )
        raise ValueError(
            "`embeddings` must be L2-normalised and finite. "
            f"Received: {len(bad)} rows that are not, the first of them {named}"
        )
    return embeddings


def check_queries(embeddings, width):
    """One or several embeddings as a `(queries, width)` array, L2-normalised."""
    queries = np.atleast_2d(np.asarray(embeddings, "float32"))
    if queries.ndim != 2 or not queries.size:
        raise ValueError(
            "`embeddings` must have shape (d,) or (queries, d), of at least one query. "
            f"Received: embeddings.shape={np.shape(embeddings)}"
        )
    if queries.shape[1] != width:
        raise ValueError(
            f"`embeddings` must be as wide as those of the index, {width}: was the "
            "index built with another model? "
            f"Received: embeddings.shape={np.shape(embeddings)}"
        )
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
    if len(bad):
        raise ValueError(
            "`embeddings` must be finite and not zero. "
            f"Received: the queries {bad[:5].tolist()} are not"
        )
    return queries / lengths
