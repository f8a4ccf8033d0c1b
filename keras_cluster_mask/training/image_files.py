"""Reads image files, and images of any size, as the arrays of a model."""

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

# The number of images read at a time.
BATCH_SIZE = 64


def read_image_files(
    images: Sequence[Any], image_size: tuple[int | None, int | None], resize: str
) -> Iterator[np.ndarray]:
    """Reads images as `image_text_dataset` does for evaluation.

    Args:
        images: List of paths and URLs, `PIL.Image.Image`, and uint8 arrays
            `(height, width, 3)`.
        image_size: Pair of integers. The height and width of the results.
        resize: See `image_text_dataset`.

    Yields:
        `(batch, height, width, 3)` uint8 arrays, or channels first.

    Raises:
        ValueError: If an image cannot be read, with its place in the list.
    """
    # Imported here: it needs packages that `import keras` does not.
    from keras_cluster_mask.data.images import Images, UnreadableImage
    from keras_cluster_mask.data.samples import Fault, Fields, read_named_files
    from keras_cluster_mask.data.sources import read_items

    if None in image_size:
        raise ValueError(
            "`images` must be an array `(batch, H, W, C)` for an encoder that does not "
            "define the size of its images. Received: a list, and an encoder of images "
            f"of {image_size}"
        )
    data_format = keras.config.image_data_format()
    decode = Images(image_size, False, resize=resize, data_format=data_format)
    paths = [os.fspath(x) if isinstance(x, os.PathLike) else x for x in images]
    fields, source = Fields(wants_caption=False), [{"image": path} for path in paths]

    def read(number):
        (sample,) = read_named_files(
            [*map(fields.sample, read_items(source, [number]))]
        )
        image = paths[number]
        name = image if isinstance(image, str) else type(image).__name__
        try:
            if not isinstance(sample, Fault):
                return decode(sample.image, None)
            # The details of a file start with its name.
            reason = f"{sample.reason} {sample.details or ''}".replace(f" {name}:", ":")
        except UnreadableImage as error:
            reason = str(error)
        raise ValueError(
            "`images` must be a list of paths, `PIL.Image.Image` and uint8 arrays "
            f"(height, width, 3). Received: images[{number}], {name}: {reason}"
        )

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for start in range(0, len(images), BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, len(images)))
            yield np.stack([*threads.map(read, numbers)])
