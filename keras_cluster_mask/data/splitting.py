"""`split`: divides a source into training and test data by the hash of each image."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_choice, check_integer, check_range
from keras_cluster_mask.data.check import read_all
from keras_cluster_mask.data.images import UnreadableImage
from keras_cluster_mask.data.index import no_intact_sample, open_index
from keras_cluster_mask.data.samples import Fields, hash_of, hash_of_image


class SourcePart:
    """One of the two sources that `split` returns.

    Args:
        source: The source that was split, which may be a part.
        index: `Index` or `ObjectIndex` of the source.
        keep: See `Index.select`.
        sides: Tuple of strings, `"train"` or `"test"`: the sides in all splits.
        fields: `Fields` that hold the images.
        index_dir: See `image_text_dataset`.
    """

    def __init__(self, source, index, keep, sides, fields, index_dir):
        self.source, self.keep, self.sides = source, keep, sides
        self.fields, self.index_dir = fields, index_dir
        self.stamps, self.count = index.stamps, len(index.select(keep))
        self.name = index.paths[0] + ", ..." * (len(index.paths) > 1)

    def open_index(self, fields, index_dir=None, num_workers=0, process=(0, 1)):
        """Opens the index of the samples of this part; see `open_index`."""
        fields = fields.replaced(self.fields)
        if fields.image_keys not in ((), self.fields.image_keys):
            raise ValueError(
                "`image_keys` must match `split`, which finds the images with them: "
                f"pass the same to both. Received: image_keys={fields.image_keys}, and "
                f"in `split` {self.fields.image_keys}"
            )
        index_dir = index_dir or self.index_dir
        index = open_index(self.source, fields, index_dir, num_workers, process)
        if index.stamps != self.stamps:
            raise ValueError(
                "`source` must not change after it was split: split it again. Samples "
                f"stay on their sides. Received: {self}, with changed files"
            )
        return index.select(self.keep)

    def __len__(self):
        return self.count

    def __repr__(self):
        sides = "/".join(self.sides)
        return f"<SourcePart {sides} of {self.name}: {self.count} samples>"


def split(
    source: Any,
    test: float = 0.2,
    by: str = "image",
    *,
    seed: int = 0,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    index_dir: str | os.PathLike | None = None,
) -> tuple[SourcePart, SourcePart]:
    """Splits a source into training and test data that share no image.

    The side of a sample depends only on a hash of its image, and on `test` and `seed`.
    So copies of an image are on the same side, even across files, and a sample stays
    on its side when other samples are added, removed or sorted. A larger `test` only
    moves samples from the training data to the test data. The fractions are
    approximate.

    All images are read once, with a progress bar after one second. Only images of
    objects are decoded. For large files, `by="key"` reads no images.

    A sample with a missing or unreadable image is on the side of its key, and counts as
    broken there. Samples that a damaged file has lost count on both sides. If files
    change later, the part raises an error: split again. Changes are not noticed in
    image files that a table or folder names, or in objects of the same length.

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
        test: Float. The fraction of test data, between 0 and 1. Defaults to `0.2`.
        by: String. `"image"`: by the bytes of the file of an image, or the pixels of an
            array or a `PIL.Image.Image`. `"key"`: by the key of a sample, such as its
            file name in a tar or the first column of a table. Copies of an image with
            other keys may then be on both sides. Defaults to `"image"`.
        seed: Integer. The random seed of the sides. Defaults to `0`.
        image_keys: String or sequence of strings; see `image_text_dataset`. Also used
            to read the parts. Defaults to `None`: common names.
        caption_key: String or sequence of strings; see `image_text_dataset`. The
            default for the parts. Defaults to `None`: common names.
        index_dir: String or path; see `image_text_dataset`. The default for the parts.

    Returns:
        Two sources for `image_text_dataset`, `read_captions`, `check` and `split`: the
        training data and the test data. Both have a `len`, the number of samples with
        an image, and can be pickled.

    Raises:
        ValueError: If an argument is invalid, or if a side has no sample.
        OSError: If a file cannot be read.
    """
    check_range("test", test, 0, 1, "()")
    check_choice("by", by, ("image", "key"))
    check_integer("seed", seed, 0)
    fields = Fields(image_keys, caption_key, wants_caption=False)
    if isinstance(source, SourcePart):
        fields = fields.replaced(source.fields)
    index = open_index(source, fields, index_dir)
    if not len(index):
        raise no_intact_sample(index)
    if by == "image":
        hashes = np.fromiter(read_all(index, _hash, "split"), "u8", len(index))
    else:
        hashes = index.key_hashes()
    # The product with an odd number is another hash, which makes the split of a part
    # independent of the split before.
    sides = source.sides if isinstance(source, SourcePart) else ()
    factor = np.uint64(hash_of(f"{seed} {len(sides)}") | 1)
    of_shards = index.record_hashes(hashes)
    is_test = [of_shard * factor < test * 2.0**64 for of_shard in of_shards]
    is_train = [~each for each in is_test]
    options = fields, index_dir
    parts = (
        SourcePart(source, index, is_train, (*sides, "train"), *options),
        SourcePart(source, index, is_test, (*sides, "test"), *options),
    )
    if not all(parts):
        raise ValueError(
            "`test` must leave samples on both sides: pass another fraction or more "
            f"samples. Received: test={test}, {len(index)} samples with an image"
        )
    return parts


def _hash(sample):
    """Returns the hash of the image of a sample, or of its key if it has none."""
    with contextlib.suppress(UnreadableImage):
        return hash_of_image(getattr(sample, "image", None))
    if sample.key is None:
        raise OSError(f"{sample.reason}: {sample.file}: {sample.details}")
    return hash_of(sample.key)
