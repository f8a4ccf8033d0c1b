"""Reads all samples of a source: to check them, or to list their captions."""

from collections.abc import Sequence

from PIL import Image
from tqdm import tqdm

from keras_cluster_mask.data.files import Threads
from keras_cluster_mask.data.formats.indexed import SHORT
from keras_cluster_mask.data.images import EncodedImage, UnreadableImage
from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import Fault, Fields, read_named_files
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.sources import check_readable, folders_of, read_items
from keras_cluster_mask.types import AnySource

# The threads of `read_all`, and the number of samples that each reads together.
READERS, TOGETHER = 16, 16
# Decoding to a small size is fast, and still reads a JPEG to its last byte.
TINY = 8, 8


def check(
    source: AnySource,
    *,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict:
    """Reads all samples of a source, and counts the broken ones by reason.

    A sample is broken if it has no image or no caption, or if its image cannot be read
    or does not decode. A progress bar is shown after one second. Set the environment
    variable `TQDM_DISABLE=1` to hide it.

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
    source = open_source(source, fields.image_keys)
    broken, captions = SkippedSamples(), 0
    if fields.labels:
        fields.labels.add_folders(folders_of(source))
    for found in read_all(source, fields, _captions_of, "check"):
        if isinstance(found, Fault):
            broken.add(found)
        else:
            captions += found
    samples = len(source) - broken.count
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
    source: AnySource,
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
    fields = Fields((), caption_key)
    source, captions = open_source(source), []
    for sample in read_all(source, fields, lambda sample: sample, "captions"):
        captions.extend(getattr(sample, "captions", ()))
    if not captions:
        check_readable(source, fields)
    return captions


def read_all(source, fields, function, title):
    """Reads all samples in threads, with a progress bar.

    Args:
        source: The source.
        fields: `Fields`.
        function: Function of a `Sample` or a `Fault`.
        title: String. The title of the progress bar.

    Yields:
        The result of the function for each sample, in order.
    """

    def read(first):
        numbers = [*range(first, min(first + TOGETHER, len(source)))]
        items = read_items(source, numbers)
        return [*map(function, read_named_files([*map(fields.sample, items)]))]

    bar = tqdm(total=len(source), desc=title, unit=" samples", delay=SHORT)
    with bar, Threads(READERS) as threads:
        groups = range(0, len(source), TOGETHER)
        for group in threads.in_order(read, groups, ahead=2 * READERS):
            bar.update(len(group))
            yield from group
