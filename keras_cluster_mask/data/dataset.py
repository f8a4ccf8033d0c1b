"""Image-text pairs out of tar shards, ready to train on."""

import random

import keras
import numpy as np

from keras_cluster_mask import distribution
from keras_cluster_mask.data import images
from keras_cluster_mask.data.backgrounds import check_background, composite
from keras_cluster_mask.data.decoding import decoded_samples, fill_gaps
from keras_cluster_mask.data.encoded import (
    check_for_pairs,
    count_pairs,
    encoded_samples,
)
from keras_cluster_mask.data.position import Position
from keras_cluster_mask.data.sample_order import evaluation_samples, training_samples
from keras_cluster_mask.data.shards import list_shards
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.tokenizing import tokenize

try:
    import tensorflow as tf
except ImportError:
    tf = None


def image_text_dataset(
    source,
    tokenizer,
    image_size,
    batch_size,
    training,
    *,
    seed=None,
    shuffle_buffer=4096,
    crop_scale=(0.4, 1.0),
    horizontal_flip=False,
    background="white",
    image_keys=("jpg", "jpeg", "png", "webp"),
    caption_key="txt",
    on_error="skip",
    drop_remainder=None,
    data_format=None,
    include_captions=False,
    include_keys=False,
    process=None,
):
    """Batches of images and token ids from WebDataset shards, for `fit` and evaluation.

    A shard is a tar file in which `KEY.jpg` is followed by `KEY.txt`, as img2dataset
    writes them. In training the shards and the samples within a buffer are shuffled and
    a random part of each image is cropped; otherwise all samples come once, in the
    order of the files, each cut to its middle. Images are decoded in parallel and stay
    uint8: models scale them on the device. Photographs are turned upright as their
    EXIF tag says.

    Broken samples (no image, no caption, an empty one, bytes that do not decode) and
    the rest of damaged shards are skipped. The attribute `dataset.skipped` of the
    returned dataset, a `SkippedSamples`, counts them for the current or last pass.
    Methods such as `dataset.take` return new datasets without it: keep the first.

    In training each epoch is in another order, and what does not fill a batch at its
    end opens the next. Two datasets of one seed give the same batches, epoch for epoch.
    The attribute `dataset.position`, a `Position`, says what is read next;
    `kcm.callbacks.Checkpoint` saves it and sets it. For that reason a sample keeps its
    place even if its picture does not decode: its neighbour in the batch is then taken
    twice.

    Example:

    ```python
    import io, tarfile
    import numpy as np
    from PIL import Image

    captions = ["a red square", "a blue square"]
    with tarfile.open("squares.tar", "w") as tar:
        for index, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
            picture = io.BytesIO()
            Image.new("RGB", (64, 48), colour).save(picture, "PNG")
            caption = captions[index].encode()
            for name, content in (("png", picture.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{index:04}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=600)
    dataset = kcm.data.image_text_dataset(
        "squares.tar", tokenizer, image_size=32, batch_size=2, training=True, seed=1
    )
    for batch in dataset:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    print(dataset.skipped)  # <SkippedSamples count=0>
    ```

    Args:
        source: str or path, or a list of them. Tar files or patterns of them, such as
            `"data/train-{00000..00127}.tar"` or `"data/*.tar"`; see `list_shards`.
        tokenizer: A `CLIPTokenizer`; or any callable from a list of bytes to ints
            `(batch, length)`; or a Keras layer, such as a KerasHub `CLIPPreprocessor`,
            which runs inside the graph, does not clean, and may spell numbers
            differently from CLIP.
        image_size: int or `(height, width)`.
        batch_size: int. The number of samples in a batch, over all devices together.
        training: bool. Whether to shuffle and to crop at random.
        seed: int. Defaults to `None`: another order each time, unless
            `keras.utils.set_random_seed` was called.
        shuffle_buffer: int. How many samples, still encoded, the shuffle holds in
            memory. Defaults to `4096`.
        crop_scale: pair of floats. The range of the part of an image's area that is
            kept in training. Defaults to `(0.4, 1.0)`.
        horizontal_flip: bool. Whether to mirror every second image in training; not
            for captions that say left and right. Defaults to `False`.
        background: What is seen through transparent images: `"white"`, a tuple of
            three ints from 0 to 255, `"random"` (plain colours, gradients and
            textures), or a list of these to draw from for each image.
        image_keys: sequence of str. File extensions of images; the first that a sample
            has is used.
        caption_key: str. The file extension of captions. Defaults to `"txt"`.
        on_error: `"skip"`, or `"raise"` to stop at the first broken sample with an
            error that names its shard and key.
        drop_remainder: bool. Whether batches are full: in training what is left of an
            epoch opens the next, in evaluation it is dropped. Defaults to `None`: in
            training only.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `None`:
            `keras.config.image_data_format()`.
        include_captions: bool. Whether batches hold the `"captions"`, strings.
        include_keys: bool. Whether batches hold the samples' `"keys"`, strings.
        process: pair of ints. The number of this process, from 0, and how many there
            are; each gets its part of every batch, `batch_size` over the number of
            processes, and in training all take the same steps. Defaults to what JAX or
            `torch.distributed` say; for evaluation on torch to `(0, 1)`, all samples in
            every process. Every process reads all shards and decodes its own samples.

    Returns:
        A `tf.data.Dataset` of dicts: `"images"`, uint8 `(batch, height, width, 3)` or
        channels first, and `"token_ids"`, int32 `(batch, length)`.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an argument does not make sense, or the shards hold no sample
            with an image and a caption, or fewer than a batch where a batch that is
            not full is dropped.
    """
    if tf is None:
        raise ImportError(
            "`image_text_dataset` needs TensorFlow, whatever backend trains the model: "
            "`pip install tensorflow-cpu`."
        )
    shards = list_shards(source)
    image_size = images.height_and_width(image_size)
    check_background(background)
    data_format = data_format or keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            '`data_format` must be "channels_last" or "channels_first". Received: '
            f"{data_format!r}"
        )
    if drop_remainder is None:
        drop_remainder = training
    process = check_process(process, batch_size, seed, training, drop_remainder)
    image_keys = [image_keys] if isinstance(image_keys, str) else list(image_keys)
    if on_error not in ("skip", "raise"):
        raise ValueError(
            f'`on_error` must be "skip" or "raise". Received: {on_error!r}'
        )
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(
            "`crop_scale` must be two floats, 0 < lowest <= highest <= 1. Received: "
            f"{crop_scale}"
        )
    full_batch = batch_size if drop_remainder else 1
    check_for_pairs(shards, image_keys, caption_key, on_error, at_least=full_batch)
    if seed is None:
        seed = random.randint(0, 2**31 - 1) if training else 0

    def prepare(image, orientation, seed):
        image = images.upright(images.decode(image), orientation)
        image = composite(image, background, tf.stack([seed, 1]))
        if training:
            image = images.random_resized_crop(
                image, image_size, tf.stack([seed, 0]), crop_scale, flip=horizontal_flip
            )
        else:
            image = images.center_crop(image, image_size)
        return tf.ensure_shape(image, (*image_size, 3))

    def to_batch(index, columns):
        image, caption, key = (columns[name] for name in ("image", "caption", "key"))
        if training:
            place = [columns["pass"][-1], index, key]
            with tf.control_dependencies([tf.numpy_function(remember, place, "int32")]):
                image = tf.identity(image)
        if data_format == "channels_first":
            image = tf.transpose(image, [0, 3, 1, 2])
        batch = {"images": image, "token_ids": tokenize(tokenizer, caption)}
        if include_captions:
            batch["captions"] = caption
        if include_keys:
            batch["keys"] = key
        return batch

    def remember(number, batch, keys):
        position.report_batch(int(number), int(batch), keys.tolist())
        return np.int32(0)

    def read(number, seed):
        return encoded_samples(
            shards,
            image_keys,
            caption_key,
            skipped,
            number,
            seed,
            position.report_read if training else None,
        )

    skipped = SkippedSamples(raise_errors=on_error == "raise")
    if training:
        position = Position(
            seed,
            batch_size,
            lambda: count_pairs(shards, image_keys, caption_key),
            opens_next=drop_remainder,
        )
        samples = training_samples(
            read, skipped, position, process, shuffle_buffer, drop_remainder
        )
    else:
        samples = evaluation_samples(read, skipped, seed, process)
    samples = decoded_samples(
        samples, prepare, (*image_size, 3), skipped, keep_places=training
    )
    dataset = samples.batch(batch_size // process[1], drop_remainder=drop_remainder)
    if training:
        dataset = dataset.map(fill_gaps)
    dataset = (
        dataset.enumerate()
        .map(to_batch, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
    options = tf.data.Options()
    options.deterministic = True
    # The samples come out of Python: no files for `tf.distribute` to deal.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    dataset = dataset.with_options(options)
    dataset.skipped = skipped
    if training:
        dataset.position = position
    return dataset


def check_process(process, batch_size, seed, training, drop_remainder):
    """Checks which process reads a dataset; returns its number and the count."""
    index, count = distribution.process(training) if process is None else process
    if not 0 <= index < count:
        raise ValueError(
            "`process` must be a pair (number, count) with 0 <= number < count. "
            f"Received: process={process}"
        )
    if batch_size % count:
        raise ValueError(
            "`batch_size` counts the samples of all processes together, whose number "
            f"must divide it. Received: batch_size={batch_size}, {count} processes"
        )
    if count > 1 and training and seed is None:
        raise ValueError(
            "`seed` must be given if several processes share the samples, so that all "
            f"shuffle them alike. Received: seed=None, {count} processes"
        )
    if count > 1 and training and not drop_remainder:
        raise ValueError(
            "`drop_remainder` must be true in training if several processes share the "
            "samples: all take the same steps. Received: drop_remainder="
            f"{drop_remainder}, {count} processes"
        )
    return index, count
