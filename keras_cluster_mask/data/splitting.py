"""Parts of a source: `split`, by the hash of each image, and `subset`."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import (
    check_choice,
    check_integer,
    check_range,
    is_integer,
)
from keras_cluster_mask.data.check import read_all
from keras_cluster_mask.data.images import UnreadableImage
from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import Fields, hash_of, hash_of_image
from keras_cluster_mask.data.sources import Subset, check_readable
from keras_cluster_mask.types import AnySource


def split(
    source: AnySource,
    test: float | int = 0.2,
    by: str = "image",
    *,
    seed: int = 0,
    image_keys: str | Sequence[str] | None = None,
) -> tuple[Subset, Subset]:
    """Splits a source into training and test data that share no image.

    The side of a sample depends only on a hash of its image, and on `test` and `seed`.
    So copies of an image are on the same side, even across files, and a sample stays
    on its side when other samples are added, removed or sorted. A larger `test` only
    moves samples from the training data to the test data. The fractions are
    approximate.

    All samples are read once, with a progress bar after one second. Only images of
    objects are decoded. A sample with a missing or unreadable image is on the side of
    its key, and counts as broken there.

    Example:

    ```python
    source = kcm.data.example_images() / "test-*.tar"
    train, rest = kcm.data.split(source, test=0.4)
    validation, test = kcm.data.split(rest, test=0.5)
    print(len(train), len(validation), len(test))
    captions = kcm.data.read_captions(train)
    ```

    Args:
        source: See `image_text_dataset`, or a part that this function returned. Instead
            of a dictionary, split each of its sources.
        test: Float, the fraction of test data, between 0 and 1. Or an integer, the
            number of test samples; it may be a few less, as copies of an image stay
            together, and the sides change when samples are added. Defaults to `0.2`.
        by: String. `"image"`: by the bytes of the file of an image, or the pixels of an
            array or a `PIL.Image.Image`. `"key"`: by the key of a sample, such as its
            file name in a tar or the first column of a table. Copies of an image with
            other keys may then be on both sides. Defaults to `"image"`.
        seed: Integer. The random seed of the sides. Defaults to `0`.
        image_keys: String or sequence of strings; see `image_text_dataset`. Defaults to
            `None`: common names.

    Returns:
        Two sources: the training data and the test data.

    Raises:
        ValueError: If an argument is invalid, or if a side has no sample.
        OSError: If a file cannot be read.
    """
    if is_integer(test):
        check_integer("test", test, 1)
    else:
        check_range("test", test, 0, 1, "()")
    check_choice("by", by, ("image", "key"))
    check_integer("seed", seed, 0)
    fields = Fields(image_keys, wants_caption=False)
    source = open_source(source, fields.image_keys)
    if by == "key":
        fields.image_keys = ()
    check_readable(source, fields)
    hashes = np.fromiter(read_all(source, fields, _hash, "split"), "u8", len(source))
    # The product with an odd number is another hash, which makes the split of a part
    # independent of the split before.
    splits = getattr(source, "splits", 0)
    hashes *= np.uint64(hash_of(f"{seed} {splits}") | 1)
    limit = min(test, 1) * 2.0**64
    if is_integer(test) and test < len(hashes):
        limit = np.sort(hashes)[test]
    is_test = hashes < limit
    parts = [Subset(source, np.flatnonzero(side)) for side in (~is_test, is_test)]
    if not all(parts):
        raise ValueError(
            "`test` must leave at least one sample on each side of the split: pass "
            f"another value, or more samples. Received: test={test}, {len(source)} "
            "samples"
        )
    for part in parts:
        part.splits = splits + 1
    return parts[0], parts[1]


def subset(
    source: Any,
    indices: Sequence[int],
    *,
    image_keys: str | Sequence[str] | None = None,
) -> Subset:
    """Returns a source of some samples of another source.

    Example:

    ```python
    source = [{"image": np.zeros((8, 8), "uint8"), "caption": f"{n}"} for n in range(9)]
    print(kcm.data.read_captions(kcm.data.subset(source, [4, 2])))  # ["4", "2"]
    ```

    Args:
        source: See `image_text_dataset`.
        indices: Sequence of integers, from 0 to `len(source) - 1`. The samples, in this
            order. A sample may occur several times.
        image_keys: String or sequence of strings; see `image_text_dataset`. The rows of
            a table with the same image are one sample.

    Returns:
        A source with the length of `indices`.

    Raises:
        ValueError: If there is no such sample, or if no sample is chosen.
    """
    keys = Fields(image_keys, wants_caption=False).image_keys
    source, chosen = open_source(source, keys), np.asarray(indices)
    is_valid = chosen.ndim == 1 and chosen.size and chosen.dtype.kind in "iu"
    if not is_valid or chosen.min() < 0 or chosen.max() >= len(source):
        raise ValueError(
            f"`indices` must be one or more integers from 0 to {len(source) - 1}. "
            f"Received: indices={indices}, a source of {len(source)} samples"
        )
    return Subset(source, chosen)


def _hash(sample):
    """Returns the hash of the image of a sample, or of its key if it has none."""
    with contextlib.suppress(UnreadableImage):
        return hash_of_image(getattr(sample, "image", None))
    return hash_of(sample.key)
