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
from keras_cluster_mask.data.pairs import Labels, PairReader
from keras_cluster_mask.data.pictures import (
    MAX_PIXELS,
    NUM_DRAWS,
    Cutter,
    height_and_width,
)
from keras_cluster_mask.data.position import Position
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.sources import find_shards
from keras_cluster_mask.data.tokenizing import check_tokenizer, tokenize


class Spec(typing.NamedTuple):
    """The shape, with `None` for what varies, and the type of an array."""

    shape: tuple
    dtype: str


class ImageTextBatches:
    """Batches of images and token ids for `fit` and evaluation, without TensorFlow.

    The same batches as those of `image_text_dataset`, as NumPy arrays: for machines
    with JAX or PyTorch alone, and for programs of your own. Each time it is iterated
    over is an epoch. Pictures are decoded in threads while a model trains.

    Example:

    ```python
    import pathlib
    import numpy as np
    from PIL import Image

    folder = pathlib.Path("squares")
    folder.mkdir(exist_ok=True)
    lines = ["file_name,caption"]
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 48), colour).save(folder / f"{colour}.png")
        lines.append(f"{colour}.png,a {colour} square")
    (folder / "metadata.csv").write_text("\\n".join(lines))

    tokenizer = kcm.data.CLIPTokenizer.train(["a red square", "a blue square"], 600)
    batches = kcm.data.ImageTextBatches(
        folder, tokenizer, image_size=32, batch_size=2, training=True, seed=1
    )
    for batch in batches:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    ```

    Args:
        source: str or path, or a list of them: tar files, TFRecord files, manifests,
            folders with a manifest, or patterns; see `list_shards`.
        tokenizer: A `CLIPTokenizer`; or any callable from a list of bytes to ints
            `(batch, length)`; or a Keras layer, such as a KerasHub `CLIPPreprocessor`,
            which does not clean, may spell numbers differently from CLIP, and needs
            TensorFlow. `None`: batches without `"token_ids"`, and samples need no
            caption.
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
        image_keys: str or sequence of str. The field that holds the image: a file
            extension in a tar, a feature of a TFRecord, a column of a manifest, whose
            cells name files. Of several the first that a sample has. Defaults to
            `None`: the usual names.
        caption_key: str or sequence of str. The field that holds the caption; of
            several the first that is not empty. `"json.caption"` is the entry `caption`
            of the file `KEY.json`. A list of captions there is drawn from anew in each
            epoch; in evaluation the first counts. Defaults to `None`: `"txt"` and other
            usual names.
        caption_template: str or sequence of str that hold `{}`, such as
            `"a photo of a {}."`, into which captions are put; of several one is drawn
            for each sample and epoch, and in evaluation the first counts.
        on_error: `"skip"`, or `"raise"` to stop at the first broken sample with an
            error that names its shard and key.
        max_skipped: float. The share of samples that may be broken: of more, once 1,000
            have been looked at, an error stops the run. Defaults to `0.5`.
        max_image_pixels: int. Pictures of more pixels count as broken; JPEG files are
            shrunk while they are decoded and may be larger. Defaults to 50 million.
        drop_remainder: bool. Whether batches are full: in training what is left of an
            epoch opens the next, in evaluation it is dropped. Defaults to `None`: in
            training only.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `None`:
            `keras.config.image_data_format()`.
        include_captions: bool. Whether batches hold the `"captions"`, UTF-8 bytes; with
            `"all"`, tuples of all captions of each picture.
        include_keys: bool. Whether batches hold the samples' `"keys"`, bytes.
        include_paths: bool. Whether batches hold the `"paths"` of the pictures' files,
            bytes; empty for pictures inside of shards.
        label_key: str or sequence of str. The field that holds the class, such as
            `"cls"`, `"json.label"` or, of pictures in a folder, `"folder"`, the name of
            the folder. Batches then hold `"labels"`, int32. Defaults to `None`: none.
        class_names: sequence of str, for labels that are names: a label is the place of
            its name. Defaults to `None`: labels are numbers.
        process: pair of ints. The number of this process, from 0, and how many there
            are; each gets its part of every batch, `batch_size` over the number of
            processes, and in training all take the same steps. Defaults to what JAX or
            `torch.distributed` say; for evaluation on torch to `(0, 1)`, all samples in
            every process. Every process reads all shards and decodes its own samples.
        num_threads: int. How many pictures are decoded at a time. Defaults to `None`:
            the number of processors.

    Attributes:
        skipped: `SkippedSamples`. What the current or last pass left out.
        position: `Position`. In training, what is read next.
        element_spec: dict. The shape and type of each entry of a batch.

    Raises:
        FileNotFoundError: if a shard is missing.
        ValueError: if an argument does not make sense, or the shards hold no sample
            with an image and a caption, or fewer than a batch where a batch that is
            not full is dropped.
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
                "`class_names` are for labels: give the `label_key` of the field that "
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
            # Of which epoch, and what.
            self._left_over = None, []

    @property
    def element_spec(self):
        """dict from the name of each entry of a batch to its shape and type."""
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
        """The batches of one epoch after another, without an end."""
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
        for step, (pairs, draws, pictures) in enumerate(decoder.decoded(steps)):
            if not pairs or (self._whole and len(pairs) < rows):
                continue
            keys = [pair.key.encode("utf-8", "surrogateescape") for pair in pairs]
            if self._training:
                self.position.report_batch(epoch, first + step, keys)
            yield self._batch(pairs, draws, pictures, keys)
        account.end()

    def _batch(self, pairs, draws, pictures, keys):
        batch = {"images": pictures, "keys": _strings(keys)}
        if {"token_ids", "captions"} & {*self._names}:
            captions = self._choose(pairs, draws[:, NUM_DRAWS:])
            batch["captions"] = _strings(captions)
        if "token_ids" in self._names:
            batch["token_ids"] = tokenize(self._tokenizer, captions)
        if self.all_captions:
            batch["captions"] = _strings([self._choose.all_of(p) for p in pairs])
        if "paths" in self._names:
            images = [pair.image for pair in pairs]
            paths = [image if isinstance(image, str) else "" for image in images]
            batch["paths"] = _strings([os.fsencode(path) for path in paths])
        if "labels" in self._names:
            batch["labels"] = np.array([pair.label for pair in pairs], "int32")
        return {name: batch[name] for name in self._names}

    def _training_steps(self, account, epoch, step):
        """The pairs of each step of an epoch, and the numbers they depend on."""
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
        """What was left of an epoch, kept or read again."""
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
    """An array of bytes, or of tuples of them, one a sample."""
    array = np.empty(len(values), object)
    # One by one: NumPy would take tuples of one length for rows.
    for index, value in enumerate(values):
        array[index] = value
    return array


class Endless:
    """The batches of one epoch after another.

    Args:
        batches: `ImageTextBatches`.
    """

    def __init__(self, batches):
        self._batches = batches
        self.skipped = batches.skipped
        self.element_spec = batches.element_spec

    def __iter__(self):
        empty = 0
        # One may be, if it was to start at its end.
        while empty < 2:
            empty += 1
            for batch in self._batches:
                empty = 0
                yield batch
        raise ValueError(
            "`source` gives no batches any more: two epochs had none. Received: "
            f"{self.skipped}"
        )

    def as_dataset(self):
        """The batches as a `tf.data.Dataset`."""
        return as_dataset(self)


def as_dataset(batches):
    """A `tf.data.Dataset` of batches that are made in Python.

    Args:
        batches: `ImageTextBatches`, or `Endless` ones.
    """
    import tensorflow as tf

    if getattr(batches, "all_captions", False):
        raise ValueError(
            'A `tf.data.Dataset` holds no tuples of strings: `include_captions="all"` '
            "is for `ImageTextBatches`. Received: include_captions='all'"
        )
    signature = {
        name: tf.TensorSpec(*spec) for name, spec in batches.element_spec.items()
    }
    dataset = tf.data.Dataset.from_generator(
        lambda: batches, output_signature=signature
    )
    options = tf.data.Options()
    options.deterministic = True
    # The samples come out of Python: no files for `tf.distribute` to deal.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    # There is nothing to tune, and the tuner lets an epoch wait for it to end: up to a
    # second.
    options.autotune.enabled = False
    return dataset.with_options(options).prefetch(2)
