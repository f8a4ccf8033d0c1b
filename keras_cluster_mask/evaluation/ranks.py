"""The ranks of matching items, among all images or all texts."""

import numpy as np

# The shape of the part of the similarity matrix that is in memory at a time.
TILE = 2040, 4096
# The maximum number of rows that are counted in 8 bits.
ROWS = 255
# Similarities of unit vectors count as equal within this distance: in float32 their
# last digits depend on the order of a sum.
TIE = 2.0**-22
NEVER = np.iinfo("int64").max


def ranks_of_partners(images, texts, image_labels, text_labels):
    """Counts the wrong items ahead of the best match of each image and each text.

    The similarity of all images to all texts is computed once for both directions, tile
    by tile.

    Args:
        images: `(images, d)` float32 array of L2-normalized rows.
        texts: `(texts, d)` float32 array of L2-normalized rows.
        image_labels: `(images,)` array. Items match if their labels are equal.
        text_labels: `(texts,)` array.

    Returns:
        Two int64 arrays, `(images,)` and `(texts,)`.
    """
    # In the order of labels, the matches of an item are consecutive.
    labels = np.concatenate([image_labels, text_labels])
    codes = np.unique(labels, return_inverse=True)[1].reshape(-1)
    codes = codes[: len(images)], codes[len(images) :]
    orders = [np.argsort(each, kind="stable") for each in codes]
    sides = [each[order] for each, order in zip((images, texts), orders)]
    codes = [each[order] for each, order in zip(codes, orders)]
    right = [_ranges(*codes), _ranges(*codes[::-1])]

    bounds = [
        _best(queries, items, *ranges) - TIE
        for queries, items, ranges in zip(sides, sides[::-1], right)
    ]
    ranks = _count(*sides, right[0], *bounds)
    for each, (first, last), order in zip(ranks, right, orders):
        each[first == last] = NEVER
        each[order] = each.copy()
    return ranks


def _count(rows, columns, right, row_bounds, column_bounds):
    """Counts the columns that reach the bound of each row, and vice versa.

    Matching pairs are not counted.
    """
    counts = [np.zeros(len(each), "int64") for each in (rows, columns)]
    first, last = right
    for i in range(0, len(rows), TILE[0]):
        part = slice(i, i + TILE[0])
        for j in range(0, len(columns), TILE[1]):
            other = slice(j, j + TILE[1])
            similarity = rows[part] @ columns[other].T
            for row in np.flatnonzero((last[part] > j) & (first[part] < other.stop)):
                own = slice(max(first[i + row] - j, 0), max(last[i + row] - j, 0))
                similarity[row, own] = -np.inf
            reached = similarity >= row_bounds[part, None]
            counts[0][part] += np.count_nonzero(reached, axis=1)
            np.greater_equal(similarity, column_bounds[other], out=reached)
            for k in range(0, len(reached), ROWS):
                some = reached[k : k + ROWS].view("uint8")
                counts[1][other] += np.add.reduce(some, 0, dtype="uint8")
    return counts


def _ranges(codes, others):
    """Returns where each code begins and ends among others; both are sorted."""
    return [np.searchsorted(others, codes, side) for side in ("left", "right")]


def _best(queries, items, first, last):
    """Returns the highest similarity of each query to the items in its range."""
    best = np.full(len(queries), -np.inf, "float32")
    changes = np.diff(first, prepend=-1) | np.diff(last, prepend=-1)
    starts = np.flatnonzero(changes)
    for start, stop in zip(starts, [*starts[1:], len(queries)]):
        right = items[first[start] : last[start]].T
        if not right.size:
            continue
        for i in range(start, stop, TILE[0]):
            rows = slice(i, min(i + TILE[0], stop))
            for j in range(0, right.shape[1], TILE[1]):
                highest = np.max(queries[rows] @ right[:, j : j + TILE[1]], axis=1)
                np.maximum(best[rows], highest, out=best[rows])
    return best
