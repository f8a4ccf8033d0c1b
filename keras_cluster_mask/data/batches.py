"""Batches of images and token ids, without TensorFlow."""

import functools
import itertools
import os
import random
import typing

import keras
import numpy as np

from keras_cluster_mask.data import order
from keras_cluster_mask.data.backgrounds import check_background
from keras_cluster_mask.data.captions import CaptionChoice
from keras_cluster_mask.data.checks import (
    check_for_pairs,
    check_process,
    count_pairs,
)
from keras_cluster_mask.data.decoding import Decoder, draws_of
from keras_cluster_mask.data.images import (
    MAX_PIXELS,
    NUM_DRAWS,
    Cutter,
    height_and_width,
)
from keras_cluster_mask.data.pairs import Labels, PairReader
from keras_cluster_mask.data.position import Position
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.sources import find_shards
from keras_cluster_mask.data.tokenizing import check_tokenizer, tokenize


class Spec(typing.NamedTuple):
    """The shape, with `None` for unknown sizes, and the type of an array."""

    shape: tuple
    dtype: str


class ImageTextBatches:
    """Batches of images and token ids for `fit` and evaluation, without TensorFlow.

    The batches equal those of `image_text_dataset` and are NumPy arrays, for machines
    without TensorFlow and for custom training loops. Each iteration over the object is
    an epoch. Images are decoded in threads while a model trains.

    Example:

    ```python
    import pathlib
    import numpy as np
    from PIL import Image

    folder = pathlib.Path("squares")
    folder.mkdir(exist_ok=True)
    lines = ["file_name,caption"]
    for color in ("red", "blue"):
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
        lines.append(f"{color}.png,a {color} square")
    (folder / "metadata.csv").write_text("\\n".join(lines))

    tokenizer = kcm.data.CLIPTokenizer.train(["a red square", "a blue square"], 600)
    batches = kcm.data.ImageTextBatches(
        folder, tokenizer, image_size=32, batch_size=2, training=True, seed=1
    )
    for batch in batches:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    ```

    Args:
        source: str or path, or a list of them: tar files, TFRecord files, tables,
            folders, or patterns; see `list_shards`.
        tokenizer: A `CLIPTokenizer`; or any callable from a list of bytes to ints
            `(batch, length)`; or a Keras layer, such as a KerasHub `CLIPPreprocessor`,
            which does not clean captions, may split numbers differently from CLIP, and
            needs TensorFlow. `None`: batches have no `"token_ids"`, and samples need no
            caption.
        image_size: int or `(height, width)`.
        batch_size: int. The global batch size, over all devices.
        training: bool. Whether to shuffle and to take random crops.
        seed: int. Defaults to `None`: a random seed, which depends on
            `keras.utils.set_random_seed`.
        shuffle_buffer: int. The number of encoded samples in the shuffle buffer.
            Defaults to `4096`.
        crop_scale: pair of floats. The range of the area of random crops, as a fraction
            of the image's area. Defaults to `(0.4, 1.0)`.
        horizontal_flip: bool. Whether to flip half of the images in training. Not
            suitable for captions that say left or right. Defaults to `False`.
        background: The background of transparent images: `"white"`, a tuple of three
            ints from 0 to 255, `"random"` (plain colors, gradients and textures), or a
            list of these, from which one is drawn for each image.
        image_keys: str or sequence of str. The field that holds the image: a file
            extension in a tar, a feature of a TFRecord, or a column of a table with the
            names of files. Of several, the first that a sample has is used. Defaults to
            `None`: common names.
        caption_key: str or sequence of str. The field that holds the caption; of
            several, the first that is not empty. `"json.caption"` is the entry
            `caption` of the file `KEY.json`. From a list of captions, one is drawn in
            each epoch; evaluation uses the first. Defaults to `None`: `"txt"` and other
            common names.
        caption_template: str or sequence of str that contain `{}` for the caption, such
            as `"a photo of a {}."`. Of several, one is drawn for each sample and epoch;
            evaluation uses the first.
        on_error: `"skip"`, or `"raise"` to stop at the first broken sample with an
            error that names its shard and key.
        max_skipped: float. The share of samples that may be broken. It is checked after
            1,000 samples, and a larger share raises an error. Defaults to `0.5`.
        max_image_pixels: int. Images of more pixels count as broken; JPEG files are
            reduced while they are decoded and may be larger. Defaults to 50 million.
        drop_remainder: bool. Whether all batches are full. In training, the last
            partial batch is carried over to the next epoch; in evaluation it is
            dropped. Defaults to `None`: in training only.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `None`:
            `keras.config.image_data_format()`.
        include_captions: bool. Whether batches hold the `"captions"`, UTF-8 bytes; with
            `"all"`, tuples of all captions of each image.
        include_keys: bool. Whether batches hold the `"keys"` of the samples, bytes.
        include_paths: bool. Whether batches hold the `"paths"` of the image files,
            bytes; empty for images inside of shards.
        label_key: str or sequence of str. The field that holds the class, such as
            `"cls"`, `"json.label"` or, for images in a folder, `"folder"`, the name of
            the folder. Batches then hold `"labels"`, int32. Defaults to `None`: no
            labels.
        class_names: sequence of str, for labels that are names: a label is the index of
            its name. Defaults to `None`: labels are numbers.
        process: pair of ints. The number of this process, from 0, and the number of
            processes. Each process gets its part of every batch, and in training all
            take the same number of steps. Defaults to the values of JAX or
            `torch.distributed`; for evaluation on torch to `(0, 1)`, all samples in
            every process. Every process reads all shards and decodes its own samples.
        num_threads: int. The number of images that are decoded at the same time.
            Defaults to `None`: the number of processors.

    Attributes:
        skipped: `SkippedSamples`. The samples that the current or last pass skipped.
        position: `Position`. In training, the next epoch and step.
        element_spec: dict. The shape and type of each entry of a batch.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If an argument is invalid, if the shards hold no sample with an
            image and a caption, or if they hold less than one batch and partial batches
            are dropped.
    """

    def __init__(
        self,
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
        image_keys=None,
        caption_key=None,
        caption_template=None,
        on_error="skip",
        max_skipped=0.5,
        max_image_pixels=MAX_PIXELS,
        drop_remainder=None,
        data_format=None,
        include_captions=False,
        include_keys=False,
        include_paths=False,
        label_key=None,
        class_names=None,
        process=None,
        num_threads=None,
    ):
        image_size = height_and_width(image_size)
        check_background(background)
        data_format = data_format or keras.config.image_data_format()
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                '`data_format` must be "channels_last" or "channels_first". Received: '
                f"{data_format!r}"
            )
        if on_error not in ("skip", "raise"):
            raise ValueError(
                f'`on_error` must be "skip" or "raise". Received: {on_error!r}'
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                "`crop_scale` must be two floats, 0 < lowest <= highest <= 1. "
                f"Received: {crop_scale}"
            )
        if include_captions not in (False, True, "all"):
            raise ValueError(
                '`include_captions` must be a boolean or "all". Received: '
                f"{include_captions!r}"
            )
        if class_names is not None and label_key is None:
            raise ValueError(
                "`class_names` need labels: pass the `label_key` of the field that "
                f"holds them. Received: class_names={class_names}, label_key=None"
            )
        check_tokenizer(tokenizer)
        drop_remainder = training if drop_remainder is None else drop_remainder
        process = check_process(process, batch_size, seed, training, drop_remainder)
        self._reader = PairReader(
            find_shards(source),
            image_keys,
            caption_key,
            wants_caption=bool(tokenizer is not None or include_captions),
            labels=None if label_key is None else Labels(label_key, class_names),
        )
        full_batch = batch_size if drop_remainder else 1
        check_for_pairs(self._reader, on_error, at_least=full_batch)
        if seed is None:
            seed = random.randint(0, 2**31 - 1) if training else 0
        self.skipped = SkippedSamples(on_error == "raise", max_skipped)
        self._training = training
        self._seed = seed
        self._batch_size = batch_size
        self._process = process
        self._buffer = shuffle_buffer
        self._whole = drop_remainder
        self._tokenizer = tokenizer
        self._choose = CaptionChoice(caption_template, training)
        wanted = {
            "images": True,
            "token_ids": tokenizer is not None,
            "captions": include_captions,
            "keys": include_keys,
            "paths": include_paths,
            "labels": label_key is not None,
        }
        self._names = [name for name, is_wanted in wanted.items() if is_wanted]
        self.all_captions = include_captions == "all"
        self._num_threads = num_threads
        self._channels_first = data_format == "channels_first"
        self._cutter = Cutter(
            image_size,
            training,
            crop_scale,
            horizontal_flip,
            background,
            max_image_pixels,
        )
        if training:
            count = functools.partial(count_pairs, self._reader)
            self.position = Position(seed, batch_size, count, opens_next=drop_remainder)
            # The epoch and its last partial batch.
            self._left_over = None, []

    @property
    def element_spec(self):
        """dict from the name of each entry of a batch to its `Spec`."""
        height, width = self._cutter.image_size
        rows = self._batch_size // self._process[1] if self._whole else None
        image = (3, height, width) if self._channels_first else (height, width, 3)
        length = getattr(self._tokenizer, "context_length", None)
        spec = {
            "images": Spec((rows, *image), "uint8"),
            "token_ids": Spec((rows, length), "int32"),
            "captions": Spec((rows,), "string"),
            "keys": Spec((rows,), "string"),
            "paths": Spec((rows,), "string"),
            "labels": Spec((rows,), "int32"),
        }
        return {name: spec[name] for name in self._names}

    def as_dataset(self):
        """The batches as a `tf.data.Dataset`."""
        return as_dataset(self)

    def repeat(self):
        """The batches of endless epochs."""
        return Endless(self)

    def __iter__(self):
        account = self.skipped.start_pass()
        if self._training:
            epoch, first = self.position.start_pass()
            steps = self._training_steps(account, epoch, first)
        else:
            steps = self._evaluation_steps(account)
        decoder = Decoder(
            self._cutter,
            self._channels_first,
            fill_gaps=self._training,
            report=account.report_unreadable,
            num_threads=self._num_threads,
        )
        rows = self._batch_size // self._process[1]
        for step, (pairs, draws, images) in enumerate(decoder.decoded(steps)):
            if not pairs or (self._whole and len(pairs) < rows):
                continue
            keys = [pair.key.encode("utf-8", "surrogateescape") for pair in pairs]
            if self._training:
                self.position.report_batch(epoch, first + step, keys)
            yield self._batch(pairs, draws, images, keys)
        account.end()

    def _batch(self, pairs, draws, images, keys):
        batch = {"images": images, "keys": _strings(keys)}
        if {"token_ids", "captions"} & {*self._names}:
            captions = self._choose(pairs, draws[:, NUM_DRAWS:])
            batch["captions"] = _strings(captions)
        if "token_ids" in self._names:
            batch["token_ids"] = tokenize(self._tokenizer, captions)
        if self.all_captions:
            batch["captions"] = _strings([self._choose.all_of(p) for p in pairs])
        if "paths" in self._names:
            paths = [p.image if isinstance(p.image, str) else "" for p in pairs]
            batch["paths"] = _strings([os.fsencode(path) for path in paths])
        if "labels" in self._names:
            batch["labels"] = np.array([pair.label for pair in pairs], "int32")
        return {name: batch[name] for name in self._names}

    def _training_steps(self, account, epoch, step):
        """The pairs of each step of an epoch, and their random numbers."""
        index, count = self._process
        rows = self._batch_size // count
        own = slice(index * rows, (index + 1) * rows)
        pairs = self._training_pairs(account, epoch, step)
        while batch := list(itertools.islice(pairs, self._batch_size)):
            if self._whole and len(batch) < self._batch_size:
                self._left_over = epoch, batch
                return
            draws = draws_of(self._seed, epoch, step, self._batch_size)
            yield batch[own], draws[: len(batch)][own]
            step += 1

    def _training_pairs(self, account, epoch, step):
        leave_out = step * self._batch_size - self.position.opening(epoch)
        if leave_out < 0:
            yield from self._last_pairs(epoch - 1, -leave_out)
        count = 0
        for pair in self._mixed(account.report, epoch):
            count += 1
            if count > leave_out:
                yield pair
        self.position.report_pairs(count)

    def _last_pairs(self, epoch, count):
        """The last partial batch of an epoch, kept in memory or read again."""
        if self._left_over[0] == epoch:
            return self._left_over[1]
        again = self._mixed(self.skipped.ignore, epoch)
        return itertools.islice(again, self.position.pairs - count, None)

    def _mixed(self, report, epoch):
        return order.mixed(self._reader, report, self._seed, epoch, self._buffer)

    def _evaluation_steps(self, account):
        index, count = self._process
        pairs = order.in_order(self._reader, account.report)
        for step in itertools.count():
            batch = list(itertools.islice(pairs, self._batch_size))
            if not batch or (self._whole and len(batch) < self._batch_size):
                return
            draws = draws_of(self._seed, 0, step, self._batch_size)
            yield batch[index::count], draws[: len(batch)][index::count]


def _strings(values):
    """An array with one entry of bytes, or a tuple of them, per sample."""
    array = np.empty(len(values), object)
    # One by one, because NumPy would take tuples of equal length as rows.
    for index, value in enumerate(values):
        array[index] = value
    return array


class Endless:
    """The batches of endless epochs.

    Args:
        batches: `ImageTextBatches`.
    """

    def __init__(self, batches):
        self._batches = batches
        self.skipped = batches.skipped
        self.element_spec = batches.element_spec

    def __iter__(self):
        empty = 0
        # The first epoch is empty if its start position is its end.
        while empty < 2:
            empty += 1
            for batch in self._batches:
                empty = 0
                yield batch
        raise ValueError(
            "`source` must give batches, but two epochs had none. Received: "
            f"{self.skipped}"
        )

    def as_dataset(self):
        """The batches as a `tf.data.Dataset`."""
        return as_dataset(self)


def as_dataset(batches):
    """Converts batches to a `tf.data.Dataset`.

    Args:
        batches: `ImageTextBatches`, or `Endless` ones.
    """
    import tensorflow as tf

    if getattr(batches, "all_captions", False):
        raise ValueError(
            '`include_captions="all"` needs `ImageTextBatches`: a `tf.data.Dataset` '
            "holds no tuples of strings. Received: include_captions='all'"
        )
    signature = {
        name: tf.TensorSpec(*spec) for name, spec in batches.element_spec.items()
    }
    dataset = tf.data.Dataset.from_generator(
        lambda: batches, output_signature=signature
    )
    options = tf.data.Options()
    options.deterministic = True
    # The samples come from Python, so `tf.distribute` has no files to distribute.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # There is nothing to tune, and an epoch would wait up to a second for the tuner.
    options.autotune.enabled = False
    return dataset.with_options(options).prefetch(2)
