"""Reads all samples of a source: to check them, or to list their captions."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from keras_cluster_mask.data.files import Threads
from keras_cluster_mask.data.images import EncodedImage, UnreadableImage
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.parts import SHORT
from keras_cluster_mask.data.samples import Fault, Fields
from keras_cluster_mask.data.stream import SkippedSamples

# The threads of `read_all`, and the number of samples that each reads together.
READERS, TOGETHER = 16, 16
# Decoding to a small size is fast, and still reads a JPEG to its last byte.
TINY = 8, 8


def check(
    source: Any,
    *,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    index_dir: str | os.PathLike | None = None,
    num_workers: int = 0,
) -> dict:
    """Reads all samples of a source, and counts the broken ones by reason.

    A sample is broken if it has no image or no caption, if its image does not decode,
    if its key is a duplicate within the shard, or if it is a table row that names a
    missing local image file. A progress bar is shown after one second. Set the
    environment variable `TQDM_DISABLE=1` to hide it.

    Samples that a damaged file has lost count as broken. Their number is estimated by
    the size of the rest of the file. The full size of a truncated file is unknown. It
    is assumed to be that of the largest file of the source, or, if no other file is
    larger, twice the size that was found.

    Example:

    ```python
    result = kcm.data.check("shards/train-*.tar")
    print(result["samples"], result["broken"], result["by_reason"])
    ```

    Args:
        source: See `image_text_dataset`. Dictionaries are not supported.
        image_keys: String or sequence of strings; see `image_text_dataset`.
        caption_key: String or sequence of strings; see `image_text_dataset`.
        label_key: String or sequence of strings; see `image_text_dataset`. For example,
            `"folder"` for a folder with a subfolder for each class. Samples then need
            no caption, unless `caption_key` is given. Defaults to `None`: samples need
            no label.
        class_names: Sequence of strings; see `image_text_dataset`.
        index_dir: String or path; see `image_text_dataset`.
        num_workers: Integer. The number of processes that build the index. A program
            that uses them needs `if __name__ == "__main__":`. Defaults to `0`: none.

    Returns:
        Dictionary: `"samples"`, the number of intact samples; `"captions"`, the number
        of their captions; `"broken"`, the number of broken samples; `"by_reason"`, a
        dictionary from each reason to a count; and `"examples"`, a dictionary from each
        reason to a list of the first 20 broken samples, dictionaries of `"file"`,
        `"key"`, `"reason"` and `"details"`.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    wants_caption = label_key is None or caption_key is not None
    fields = Fields(image_keys, caption_key, wants_caption, label_key, class_names)
    index = open_index(source, fields, index_dir, num_workers)
    broken = SkippedSamples([index])
    samples = captions = 0
    for found in read_all(index, _captions_of, "check"):
        if isinstance(found, Fault):
            broken.add(found)
        else:
            samples += 1
            captions += found
    is_silent = not samples and "no caption" in broken.by_reason
    if is_silent and label_key is None and "folder" in index.fields:
        warnings.warn(
            "No image has a caption. If the folders in `source` are classes, pass "
            f'`label_key="folder"`. Received: label_key=None, {broken.reasons()}',
            stacklevel=2,
        )
    return {
        "samples": samples,
        "captions": captions,
        "broken": broken.count,
        "by_reason": broken.by_reason,
        "examples": {
            reason: [fault._asdict() for fault in faults]
            for reason, faults in broken.examples.items()
        },
    }


def _captions_of(sample):
    """Returns the number of captions of a sample, or a `Fault`. Decodes its image."""
    if isinstance(sample, Fault):
        return sample
    try:
        image = EncodedImage(sample.image, Image.MAX_IMAGE_PIXELS)
        # Evaluation decodes a JPEG at its full size.
        image.check_pixels()
        image.part((0, 0, *image.size), TINY)
    except UnreadableImage as error:
        return Fault(sample.file, sample.key, str(error))
    return len(sample.captions)


def read_captions(
    source: Any,
    caption_key: str | Sequence[str] | None = None,
) -> list[str]:
    """Reads all captions of a source, for training a tokenizer.

    Example:

    ```python
    captions = kcm.data.read_captions(kcm.data.example_images() / "train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: See `image_text_dataset`. Dictionaries are not supported.
        caption_key: String or sequence of strings. The field that holds captions; see
            `image_text_dataset`. Defaults to `None`: common names.

    Returns:
        List of strings, in the order of the samples. No images are needed or read.
    """
    index = open_index(source, Fields((), caption_key))
    for fault in index.damage:
        message = f"{fault.details}. Their captions are missing."
        warnings.warn(message, stacklevel=2)
    captions, fault = [], next(iter(index.examples(1)), None)
    for each in index.read(range(len(index)), with_images=False):
        if each.key is None:
            raise OSError(f"{each.reason}: {each.file}: {each.details}")
        if isinstance(each, Fault):
            fault = fault or each
        else:
            captions.extend(each.captions)
    if not captions:
        raise ValueError(
            "`caption_key` must name a field of `source` with captions. Received: "
            f"caption_key={caption_key}, with the fields {index.fields}, and first "
            f"{fault}"
        )
    return captions


def read_all(index, function, title):
    """Reads all samples in threads, with a progress bar.

    Args:
        index: `Index` or `ObjectIndex`.
        function: Function of a `Sample` or a `Fault`.
        title: String. The title of the progress bar.

    Yields:
        The result of the function for each sample, in order.
    """

    def read(first):
        numbers = range(first, min(first + TOGETHER, len(index)))
        return [*map(function, index.read(numbers))]

    bar = tqdm(total=len(index), desc=title, unit=" samples", delay=SHORT)
    with bar, Threads(READERS) as threads:
        groups = range(0, len(index), TOGETHER)
        for group in threads.in_order(read, groups, ahead=2 * READERS):
            bar.update(len(group))
            yield from group
