"""The rows most similar to queries: all compared, or by faiss."""

import math

import numpy as np

from keras_cluster_mask.evaluation.ranks import TIE

# So many queries are compared at a time, and with so many rows as make so many
# similarities: 16 MB.
QUERIES, SIMILARITIES = 256, 2**22
# So many rows are compared in 64 bits at a time.
ORDERED = 4096
# faiss learns its cells from so many rows each; more do not make them better.
ROWS_PER_CELL = 64
# The share of the cells that faiss looks into for a query.
SHARE = 1 / 16


def nearest(rows, queries, k):
    """The k most similar rows of each query, found by comparing all.

    Memory is that of a block of similarities, whatever the number of rows.

    Args:
        rows: `(rows, d)` float32 array, L2-normalised.
        queries: `(queries, d)` float32 array, L2-normalised.
        k: Integer, at most the number of rows.

    Yields:
        For each query a tuple of int64 `(k,)`, row numbers, and float32 `(k,)`, their
        similarities, the highest first and equal ones in the order of rows.
    """
    for start in range(0, len(queries), QUERIES):
        chunk = queries[start : start + QUERIES]
        found = [(np.empty(0, "int64"), np.empty(0, "float32")) for _ in chunk]
        # What a row must exceed to be among the k best so far.
        bounds = np.full(len(chunk), -np.inf, "float32")
        step = max(SIMILARITIES // len(chunk), 1)
        for first in range(0, len(rows), step):
            similarity = chunk @ rows[first : first + step].T
            # What is equal but for rounding is kept, to be put in order at the end.
            for i in np.flatnonzero(similarity.max(axis=1) > bounds - TIE):
                new = _candidates(similarity[i], bounds[i] - TIE, k)
                numbers = np.concatenate([found[i][0], first + new])
                values = np.concatenate([found[i][1], similarity[i, new]])
                if len(values) >= k:
                    bounds[i] = np.partition(values, len(values) - k)[-k]
                best = values >= bounds[i] - TIE
                found[i] = numbers[best], values[best]
        for query, (numbers, _) in zip(chunk, found):
            yield tuple(each[:k] for each in ordered(rows, query, numbers))


def ordered(rows, query, numbers):
    """Row numbers and their similarities to a query, the most similar first.

    Products of matrices round equal rows differently by where they stand; here equal
    rows are equally similar, and stay in their order.
    """
    numbers = np.sort(numbers)
    similarity = np.empty(len(numbers), "float32")
    for start in range(0, len(numbers), ORDERED):
        part = slice(start, start + ORDERED)
        products = rows[numbers[part]].astype("float64") * query
        similarity[part] = products.sum(axis=1)
    order = np.argsort(-similarity, kind="stable")
    return numbers[order], similarity[order]


class Cells:
    """The most similar rows by faiss: those of the cells a query is nearest to.

    An inverted file: it is made in a tenth of the time that a graph (HNSW) takes, and a
    query compares about one row in 16.

    Args:
        rows: `(rows, d)` float32 array, L2-normalised.

    Raises:
        ImportError: If faiss is not installed.

    Reference:
        - Sivic and Zisserman, "Video Google: A Text Retrieval Approach to Object
          Matching in Videos", 2003.
        - [The Faiss library](https://arxiv.org/abs/2401.08281)
    """

    def __init__(self, rows):
        # Imported here: exact search does without.
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                f"`approximate=True` searches by faiss, which cannot be imported "
                f"({error}): `pip install faiss-cpu`."
            ) from error
        count, width = rows.shape
        num_cells = max(math.isqrt(count), 1)
        self._rows = rows
        self._index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT
        )
        # Where there are few rows, faiss says that its cells are learned from few.
        self._index.cp.min_points_per_centroid = 1
        self._index.cp.max_points_per_centroid = ROWS_PER_CELL
        self._index.nprobe = max(math.ceil(SHARE * num_cells), min(num_cells, 8))
        self._index.train(rows)
        self._index.add(rows)

    def nearest(self, queries, k):
        """As the function `nearest`, but a row may be missed."""
        for query, numbers in zip(queries, self._index.search(queries, k)[1]):
            # -1 stands for nothing, where the cells hold fewer rows than k.
            yield ordered(self._rows, query, numbers[numbers >= 0])


def _candidates(similarity, bound, k):
    """Where similarities exceed a bound, or the k highest of them and their equals."""
    above = np.flatnonzero(similarity > bound)
    if len(above) > k:
        values = similarity[above]
        above = above[values >= np.partition(values, len(values) - k)[-k] - TIE]
    return above
