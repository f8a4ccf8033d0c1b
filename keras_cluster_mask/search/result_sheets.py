"""What was searched for and what was found, as one picture."""

import os

from keras_cluster_mask.data.decoding import read_image
from keras_cluster_mask.data.pictures import UnreadablePicture
from keras_cluster_mask.data.preparation.sheets import Cell, draw_sheet, fitted
from keras_cluster_mask.search.query_pictures import encode_picture
from keras_cluster_mask.search.searcher import SearchResult

# So much of a long key is shown, its end.
KEY_LENGTH = 48


def result_sheet(results, columns=10):
    """Shows queries and the pictures that were found for them.

    A query a row, at its left what was searched for; below each picture its place, its
    similarity and its key. A picture that is gone, or lies inside a shard, is a grey
    field that says so. Texts are written in DejaVu Sans, which matplotlib brings:
    Latin, Greek, Cyrillic and others, but boxes for Chinese, Japanese and Korean.

    Example:

    ```python
    match = kcm.search.Match("beach.jpg", similarity=0.31, row=0, path="beach.jpg")
    result = kcm.search.SearchResult("a dog on a beach", [match])
    kcm.search.result_sheet(result).save("results.png")
    ```

    Args:
        results: A `SearchResult` or a list of them, as `Searcher` returns them.
        columns: Integer. How many found pictures are in a row; more go on below.

    Returns:
        A `PIL.Image.Image`.

    Raises:
        ValueError: For no result, or `columns` below 1.
    """
    results = [results] if isinstance(results, SearchResult) else list(results)
    if not results:
        raise ValueError(
            "`results` must be a `SearchResult` or a list of at least one. "
            "Received: results=[]"
        )
    if columns < 1:
        raise ValueError(f"`columns` must be at least 1. Received: columns={columns}")
    rows = []
    for result in results:
        cells = [_found(*each) for each in enumerate(result.matches, 1)]
        first = _asked(result)
        for start in range(0, len(cells), columns):
            rows.append([first, *cells[start : start + columns]])
            first = None
    return draw_sheet(rows, max_lines=3)


def _asked(result):
    query = result.query
    if not result.is_image:
        return Cell(query, "", "searched for")
    name = os.path.basename(query) if isinstance(query, str | os.PathLike) else ""
    return Cell(_shown(encode_picture, query), name, "searched for")


def _found(place, match):
    key = match.key
    if len(key) > KEY_LENGTH:
        key = "…" + key[-KEY_LENGTH:]
    content = "no file of its own"
    if match.path is not None:
        content = _shown(read_image, match.path)
    return Cell(content, key, f"{place}.  {match.similarity:.3f}")


def _shown(read, picture):
    """A picture in the size that it has on a sheet, or why it cannot be shown."""
    try:
        return fitted(read(picture))
    except (UnreadablePicture, FileNotFoundError) as error:
        return str(error)
