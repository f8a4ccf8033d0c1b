"""Batches of images out of whatever holds them."""

import keras

ARRAY_BATCH_SIZE = 64


def image_batches(data, max_images=None):
    """Yields batch after batch of images.

    Args:
        data: Images as an array, or an iterable of batches (a `tf.data.Dataset`, a
            `PyDataset`, a generator): arrays of images, dictionaries with the key
            `"images"`, or tuples whose first entry is one of these.
        max_images: Integer. Stop after this many images, and read no batch more
            than they take. `None` reads all.

    Yields:
        Images of `(batch, ...)`, at least one.

    Raises:
        ValueError: If there is no image in `data`, or it is none of the above.
    """
    count = 0
    for images in _all_batches(data):
        if max_images is not None:
            images = images[: max_images - count]
        if len(images):
            yield images
        count += len(images)
        if count == max_images:
            break
    if not count:
        raise ValueError(
            f"`data` must hold at least one batch of images. Received: data={data}"
        )


def count_images(data):
    """How many images are in `data` if it is an array or dictionary, or `None`."""
    return len(_images_of(data)) if _is_array(data) else None


def _all_batches(data):
    if _is_array(data):
        images = _images_of(data)
        for start in range(0, len(images), ARRAY_BATCH_SIZE):
            yield images[start : start + ARRAY_BATCH_SIZE]
    elif isinstance(data, keras.utils.PyDataset):
        for index in range(len(data)):
            yield _images_of(data[index])
    else:
        try:
            batches = iter(data)
        except TypeError:
            raise ValueError(
                "`data` must be an array of images or an iterable of batches. "
                f"Received: data={data} of type {type(data).__name__}"
            ) from None
        for batch in batches:
            yield _images_of(batch)


def _is_array(data):
    return isinstance(data, dict) or hasattr(data, "shape")


def _images_of(batch):
    while isinstance(batch, (tuple, list)):
        batch = batch[0]
    if isinstance(batch, dict):
        if "images" not in batch:
            raise ValueError(
                "A batch of `data` must have the key 'images'. "
                f"Received: keys={sorted(batch)}"
            )
        batch = batch["images"]
    # A backend other than the dataset's own takes arrays, not tensors.
    return batch.numpy() if hasattr(batch, "numpy") else batch
