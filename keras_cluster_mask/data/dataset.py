"""Datasets of batches from sources of samples, for `fit` and evaluation."""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import time
import types
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_integer, check_range, is_positive
from keras_cluster_mask.data.files import is_address
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.images import Images
from keras_cluster_mask.data.loading import REPORT, TEXTS, Batches, Captions
from keras_cluster_mask.data.order import Order
from keras_cluster_mask.data.paths import open_source
from keras_cluster_mask.data.samples import Fields
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.sources import (
    Concatenation,
    check_readable,
    describe,
    folders_of,
    parts_of,
    paths_of,
    versions_of,
)
from keras_cluster_mask.data.text_masking import TextMasking
from keras_cluster_mask.data.tokenizing import length_of
from keras_cluster_mask.data.workers import in_processes
from keras_cluster_mask.stream import Stream
from keras_cluster_mask.types import AnySource, Tokenizer

# The largest default block size for object stores and Parquet, and the number of
# blocks that a batch must contain to be well mixed.
BLOCK, RUNS = 64, 16
# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# More threads in one process would wait for each other.
MAX_THREADS = 16


def image_text_dataset(
    source: AnySource,
    model_or_tokenizer: Tokenizer | None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    training: bool = True,
    *,
    seed: int = 0,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    label_key: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    image_transform: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    | None = None,
    crop_scale: tuple[float, float] | None = None,
    resize: str | None = None,
    text_masking: TextMasking | None = None,
    include_captions: bool = False,
    include_keys: bool = False,
    block_size: int | None = None,
    process: tuple[int, int] | None = None,
    num_workers: int = 0,
    max_skipped: float = 0.01,
) -> "ImageTextDataset":
    """Reads images and captions, from files, folders or objects, as batches.

    A source is an object with a length, whose items are dictionaries of fields, such as
    a list of dictionaries. Paths become one: WebDataset shards, tar files as
    img2dataset writes them (`KEY.jpg` is followed by `KEY.txt`), Parquet files, tables
    (CSV, TSV, JSON lines) that list image files, or folders of images, in which
    `KEY.txt` is the caption of `KEY.jpg`. Files are indexed on first use: a small file
    for each, in a cache folder, stores the position of each sample.

    Rows of a table or Parquet file with the same image form one sample with several
    captions. They must be in one file and have the same label.

    In training, the dataset is an endless stream. Each epoch is a new permutation of
    all samples. The last partial batch of an epoch is carried over to the next epoch.
    Each image is cropped at random. `len(dataset)` is the number of full batches in an
    epoch. The same seed gives the same batches with any number of processes and
    workers. `ContrastiveModel.fit` needs no `steps_per_epoch`. Other Keras models take
    `fit(((batch,) for batch in dataset), steps_per_epoch=len(dataset))`, or
    `dataset.as_dataset()`.

    With `training=False`, each sample is read once, in the order of the source, with a
    center crop.

    A sample is broken if it has no image or no caption, or if it cannot be read or
    decoded. In training, another sample of its source replaces it, so the number of
    steps never depends on broken samples. In evaluation, it is skipped.
    `dataset.skipped`, a `SkippedSamples`, counts both cases, and `check` finds broken
    samples before. A read is tried three times within 4 seconds. If storage at a URL
    does not answer three times, each within 35 seconds, the run ends with an error.

    Images stay uint8, and models scale them on the device. The EXIF orientation is
    applied. Transparent pixels become white. The order of the axes is
    `keras.config.image_data_format()`.

    An image of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels counts as broken. The
    limit is read when the dataset is created, also for worker processes, and must stay
    the same while the dataset is read; `None` means no limit. In training, a large JPEG
    is reduced while it is decoded, so its reduced size must be within the limit, and
    its full size within twice the limit.

    Training shuffles samples of local files one by one. Files at URLs and Parquet files
    are read in blocks of up to 64 consecutive samples; see `block_size`.

    Example:

    ```python
    import pathlib
    from PIL import Image

    folder = pathlib.Path("squares")
    folder.mkdir(exist_ok=True)
    lines = ["file_name,caption"]
    for color in ("red", "blue"):
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
        lines.append(f"{color}.png,a {color} square")
    (folder / "metadata.csv").write_text("\\n".join(lines))

    tokenizer = kcm.data.CLIPTokenizer.train(["a red square", "a blue square"], 600)
    dataset = kcm.data.image_text_dataset(
        folder, tokenizer, image_size=32, batch_size=2, training=False
    )
    for batch in dataset:
        print(batch["images"].shape, batch["token_ids"].shape)  # (2, 32, 32, 3) (2, 32)
    print(len(dataset), dataset.skipped)  # 1 <SkippedSamples count=0>
    ```

    Args:
        source: String or path, or a list of them. A file; a folder with one table,
            named `metadata`, `manifest` or `captions` with the extension `.csv`, `.tsv`
            or `.jsonl`; a folder of images, which may have subfolders; a pattern with
            `*`, `?` or `[...]` for all existing files that match it; or a pattern with
            `{a,b}` or `{000..123}`, for files that must all exist. Each may be a URL,
            such as `"s3://bucket/train-*.tar"`, or an fsspec chain, such as
            `"simplecache::s3://bucket/train-*.tar"`. All files are sorted by path, and
            each is read once. Or an object with `__len__` and
            `__getitem__` that holds dictionaries, such as a `Dataset` of the package
            `datasets`, or a part that `split` or `subset` returned; an image is bytes,
            a file name, a `PIL.Image.Image`, or a uint8 array. One thread at a time
            reads items of objects. A method `__getitems__` reads several at once, for
            neighbors, and an entry `"__key__"` is its key. Or a list of such
            objects, one after the other. Or a dictionary from several of all these to
            weights, to mix them in these proportions.
        model_or_tokenizer: A `ContrastiveModel`, to use its tokenizer, image size and
            `resize`; if `label_key` is given without `caption_key`, its tokenizer is
            not used. Or a tokenizer: a `CLIPTokenizer`; any callable from a list of
            strings to integers `(batch, length)`; an open_clip tokenizer; a Hugging
            Face tokenizer, with rows padded and truncated to its `model_max_length`; or
            a Keras layer, such as a KerasHub `CLIPPreprocessor`, which does not clean
            captions, may split numbers differently from CLIP, and needs TensorFlow.
            With `None`, batches have no `"token_ids"`, and samples need no caption.
        image_size: Integer or `(height, width)`, in pixels. Must be `None` for a model,
            unless its image encoder takes images of any size.
        batch_size: Integer. The global batch size, over all processes and devices.
            Defaults to `64`.
        training: Boolean. Whether to shuffle, to repeat, and to take random crops.
            Defaults to `True`.
        seed: Integer. The random seed of the order, crops and captions. Defaults to
            `0`.
        image_keys: String or sequence of strings. The field that holds the image: a
            file extension in a tar, or a column of a table with file names. If several
            are given, the first that a sample has is used. Defaults to `None`: common
            names.
        caption_key: String or sequence of strings. The field that holds the caption. If
            several are given, the first that is not empty is used. `"json.caption"` is
            the entry `caption` of the file `KEY.json`. If the field is a list of
            captions, one is drawn in each epoch; evaluation uses the first. Captions
            are UTF-8: invalid bytes become U+FFFD, and a sample in UTF-16 is broken.
            Defaults to `None`: `"txt"` and other common names. Each line of the field
            `txt` is then a caption, as in shards of CLIP_benchmark, unless `KEY.json`
            has the entry `caption`, as in shards of img2dataset. `"txt"` makes the
            whole field one caption.
        label_key: String or sequence of strings. The field that holds the class, such
            as `"cls"`, `"json.label"` or, for images in a folder, `"folder"`, the name
            of the folder. Batches then hold `"labels"`, int32. Defaults to `None`: no
            labels.
        class_names: Sequence of strings, for labels that are names: a label is the
            index of its name. Defaults to `None`: labels are numbers, or, if
            `label_key` is `"folder"` and not all folders have numbers, indices of the
            sorted names of the folders with images.
        resize: String. `"crop"`: random crops in training, and CLIP's center crop in
            evaluation. `"squash"`: the whole image with a changed aspect ratio, as for
            SigLIP. Defaults to `None`: the model's value, or `"crop"` without a model.
        crop_scale: Pair of floats. The range of the area of random crops, as a fraction
            of the image's area. Must be `None` for `resize="squash"` and in evaluation.
            Defaults to `None`: `(0.4, 1.0)`.
        image_transform: Function of a cropped training image, uint8
            `(height, width, 3)`, and a `np.random.Generator`, that returns an image of
            the same shape and dtype. It may change the image in place. Must be `None`
            in evaluation. Defaults to `None`.
        include_captions: Boolean. Whether batches contain `"captions"`, for each image
            a tuple of all its captions, str. Defaults to `False`.
        include_keys: Boolean. Whether batches contain the `"keys"` of samples, str. The
            key of a table row is the value of its first column. Defaults to `False`.
        max_skipped: Float. The maximum fraction of samples that may be broken, from 0
            to 1, in each source of a dictionary. An error is raised if more are broken
            of the samples that a process reads in one pass over the source. Samples
            that a damaged file has lost count as broken; see `check`. Defaults to
            `0.01`.
        text_masking: A `TextMasking` for training, such as `RandomTextMasking`,
            `BlockTextMasking` or `FrequencyTextMasking`. It shortens captions that have
            more tokens than the `context_length` of the `tokenizer`, which must pad the
            ends of rows. It does not change `"captions"`, and evaluation is never
            masked. Defaults to `None`: captions that are too long are truncated.
        block_size: Integer. In training, blocks of this many consecutive samples are
            read together, which is faster on object stores and hard disks. A block may
            begin in one batch and end in the next. The number of processes must divide
            `batch_size // block_size`. Defaults to `None`: 1 for local files; for URLs
            and Parquet files the largest power of two up to 64 that leaves 16 blocks in
            a batch.
        process: Pair of integers. The index of this process and the number of
            processes. Each process reads only its rows of every batch. In evaluation,
            some processes may get one batch more than others. Defaults to the values of
            JAX or `torch.distributed`; for evaluation on torch to `(0, 1)`, all samples
            in every process.
        num_workers: Integer. The number of worker processes. They are spawned, so a
            program needs `if __name__ == "__main__":`. Defaults to `0`: threads of this
            process, which share the GIL and decode at most about 2,200 images per
            second on any number of cores.

    Returns:
        An `ImageTextDataset`, an iterable of dictionaries of NumPy arrays: `"images"`,
        uint8 `(batch, height, width, 3)` or channels first, and `"token_ids"`, int32
        `(batch, length)`. It has a length, and `dataset[n]` is the batch `n`.

    Raises:
        FileNotFoundError: If a file is missing.
        OSError: If a file cannot be read.
        ValueError: If an argument is invalid, if a file does not support random
            access, if there is no intact sample, or if training has fewer samples than
            a batch.
        ImportError: If a package that reads the files is not installed.
    """
    import keras

    tokenizer = model_or_tokenizer
    # A model: `data` imports no models, and worker processes must not receive one.
    if (of_model := getattr(tokenizer, "preprocessing", None)) is not None:
        size, own = of_model["image_size"], of_model["resize"]
        for name, given, expected in (
            ("image_size", image_size, None if None in size else size),
            ("resize", resize, own),
        ):
            if given is not None and expected is not None:
                raise ValueError(
                    f"`{name}` must be None if a model is passed, because the model "
                    f"defines it. Received: {name}={given!r}, and a model with "
                    f"{name}={expected!r}"
                )
        tokenizer, image_size, resize = of_model["tokenizer"], image_size or size, own
        if label_key is not None and caption_key is None:
            tokenizer = None
        elif tokenizer is None:
            raise ValueError(
                "`model_or_tokenizer` must be a model with a tokenizer: set "
                "`model.tokenizer` to the tokenizer that the model was trained with. "
                "Received: a model with tokenizer=None"
            )
    images = Images(
        image_size=image_size,
        training=training,
        resize=resize or "crop",
        crop_scale=crop_scale,
        image_transform=image_transform,
        data_format=keras.config.image_data_format(),
    )
    captions = Captions(tokenizer, training, text_masking, include_captions)
    fields = Fields(image_keys, caption_key, captions.are_read, label_key, class_names)
    process = _process(process, training)
    seed = check_integer("seed", seed, 0)
    if check_integer("batch_size", batch_size, 1) % process[1]:
        raise ValueError(
            "`batch_size` is the global batch size and must be divisible by the number "
            f"of processes. Received: batch_size={batch_size}, {process[1]} processes"
        )
    mix = source if isinstance(source, Mapping) else {"": 1.0}
    if not (
        mix and all(map(is_positive, mix.values())) and (training or mix is not source)
    ):
        raise ValueError(
            "`source` may be a dict in training only, and must map sources to positive "
            f"weights. Received: source={source!r}, training={training}"
        )
    several = [*mix] if mix is source else [source]
    opened = [open_source(each, fields.image_keys) for each in several]
    source = opened[0] if len(opened) == 1 else Concatenation(opened)
    if fields.labels:
        fields.labels.add_folders(folders_of(source))
    for each in opened:
        check_readable(each, fields)
    order = range(len(source))
    if training:
        if len(source) < batch_size:
            raise ValueError(
                "`batch_size` must not exceed the number of samples, because training "
                f"uses full batches only. Received: batch_size={batch_size}, "
                f"{len(source)} samples"
            )
        block_size = _block_size(block_size, batch_size, source, process[1])
        order = Order([*map(len, opened)], [*mix.values()], seed, block_size)
    elif block_size is not None:
        raise ValueError(
            "`block_size` must be None in evaluation, which reads all of `source` in "
            f"order. Received: block_size={block_size}, training=False"
        )
    batches = Batches(
        source=source,
        order=order,
        images=images,
        captions=captions,
        fields=fields,
        batch_size=int(batch_size),
        seed=seed,
        process=process,
        include_keys=include_keys,
    )
    return ImageTextDataset(batches, [*map(str, mix)], max_skipped, num_workers)


def _process(process, training):
    """Returns the index of this process, and the number of processes."""
    if process is None:
        from keras_cluster_mask.distribution.replicas import process_index_and_count

        process = process_index_and_count(training)
    index, count = process
    if not 0 <= index < count:
        raise ValueError(
            "`process` must be a pair (index, count) with 0 <= index < count. "
            f"Received: process={process}"
        )
    return index, count


def _block_size(block_size, batch_size, source, processes):
    """Returns the number of neighbors that are read together in training."""
    if is_default := block_size is None:
        # Neighbors are read much faster together than one by one.
        is_parquet = any(isinstance(each, Parquet) for each in parts_of(source))
        is_slow = is_parquet or any(map(is_address, paths_of(source)))
        block_size = math.gcd(batch_size, BLOCK) if is_slow else 1
        while block_size > 1 and batch_size < block_size * RUNS:
            block_size //= 2
    block_size = check_integer("block_size", block_size, 1)
    # The default may be a little slower with many processes.
    processes = 1 if is_default else processes
    if batch_size % block_size or batch_size // block_size % processes:
        raise ValueError(
            "`block_size` must divide `batch_size`, and the number of processes "
            "must divide the number of blocks in a batch. Received: "
            f"block_size={block_size}, batch_size={batch_size}, "
            f"{processes} processes"
        )
    return block_size


class ImageTextDataset(Stream):
    """A dataset of batches of image-text pairs; see `image_text_dataset`.

    The dataset is an iterable with a length. Training reads it as an endless stream,
    and evaluation reads each sample once. Pass it directly to `ContrastiveModel.fit`.
    Other Keras models take a generator:
    `fit(((batch,) for batch in dataset), steps_per_epoch=len(dataset))`. `dataset[n]`
    is the batch `start + n`, so a
    `torch.utils.data.DataLoader(dataset, batch_size=None)` also reads it, in training
    for one epoch from `start` on. Set `start` for another epoch.

    Args:
        batches: `Batches`.
        names: List of strings, the names of the sources for messages.
        max_skipped: See `image_text_dataset`.
        num_workers: See `image_text_dataset`.

    Attributes:
        start: Integer. The batch at which an iteration starts. `ContrastiveModel.fit`
            sets it to the batch after the last one that it trained on.
        skipped: `SkippedSamples`. The broken samples of the last pass.
        unused_captions: Integer. The number of captions dropped in the last pass, for
            images with several, unless batches contain them.
        batch_size: Integer. The global batch size.
        num_samples: Integer. The number of samples, broken ones included.
        element_spec: Dictionary from the name of each entry of a batch to its `Spec`.
        description: Dictionary. The settings that determine the samples of each batch.
            A run can only be resumed on a dataset with an equal `description`.
        versions: String, which changes with the sizes and dates of files. Each access
            reads these, and tables.
        tokenizer: The tokenizer, or `None`.
        process: Pair of integers. The index of this process, and the number of
            processes.
        class_names: List of strings, the names that labels index, if known.
        waited: Float. The seconds that the program has waited for batches. On JAX and
            TensorFlow, earlier steps may run meanwhile.
    """

    def __init__(
        self,
        batches: Batches,
        names: Sequence[str] = ("",),
        max_skipped: float = 0.01,
        num_workers: int = 0,
    ):
        check_range("max_skipped", max_skipped, 0, 1)
        self._batches, self._num_workers = batches, num_workers
        self._names, self._max_skipped = names, max_skipped
        check_integer("num_workers", num_workers, 0)
        lengths = [length // batches.process[1] for length in batches.lengths]
        # Makes the counters of a pass.
        self._skipped = functools.partial(
            SkippedSamples, [*zip(names, lengths)], max_skipped
        )
        self.start, self.waited, self.skipped = 0, 0.0, self._skipped()
        self.unused_captions = 0
        self.training, self.element_spec = batches.training, batches.element_spec
        self.num_samples = len(batches.source)
        self.steps_per_epoch = self.num_samples // batches.batch_size

    def for_evaluation(self) -> "ImageTextDataset":
        """Returns the same samples for evaluation, in order, with all captions."""
        batches, size = self._batches, len(self._batches.source)
        images = dataclasses.replace(
            batches.images, training=False, crop_scale=None, image_transform=None
        )
        batches = dataclasses.replace(
            batches,
            order=range(size),
            images=images,
            captions=Captions(None, False, None, True),
            process=(0, 1),
        )
        return ImageTextDataset(
            batches, max_skipped=self._max_skipped, num_workers=self._num_workers
        )

    batch_size = property(operator.attrgetter("_batches.batch_size"))
    tokenizer = property(operator.attrgetter("_batches.captions.tokenizer"))
    process = property(operator.attrgetter("_batches.process"))

    @property
    def class_names(self) -> list[str]:
        labels = self._batches.fields.labels
        return list((labels and labels.numbers) or ())

    @property
    def description(self) -> dict[str, Any]:
        batches, images = self._batches, self._batches.images
        captions, order = batches.captions, batches.order
        sources = [batches.source]
        if isinstance(batches.source, Concatenation):
            sources = batches.source.sources
        return {
            "sources": [describe(each, batches.fields) for each in sources],
            "weights": self.training and order.weights,
            "batch_size": batches.batch_size,
            "seed": batches.seed,
            "block_size": self.training and order.block_size,
            "image_size": list(images.image_size),
            "data_format": images.data_format,
            "resize": images.resize,
            "crop_scale": images.crop_scale and [*map(float, images.crop_scale)],
            "max_image_pixels": images.max_pixels,
            "image_transform": _name_of(images.image_transform),
            "tokenizer": [_name_of(self.tokenizer), length_of(self.tokenizer)],
            "text_masking": captions.text_masking and repr(captions.text_masking),
        }

    @property
    def versions(self) -> str:
        return versions_of(self._batches.source, self._batches.fields)

    def __len__(self) -> int:
        """Returns the number of batches: in training of an epoch, else from `start`."""
        if self.training:
            return self.steps_per_epoch
        return max(-(-self.num_samples // self.batch_size) - self.start, 0)

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, broken ones included.

        `None` in training.
        """
        if self.training:
            return None
        batches = range(self.start, self.start + len(self))
        return sum(len(self._batches.positions(batch)) for batch in batches)

    def as_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of the batches, in training an endless one.

        Each iteration over it starts at the current `start`. Captions are dropped,
        because a `tf.data.Dataset` cannot hold tuples of different lengths. A
        `ContrastiveModel` reads the dataset itself, and checks its tokenizer.
        """
        from keras_cluster_mask.distribution.tensorflow_data import dataset_of

        return dataset_of(self.__iter__, self.element_spec, self.training)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Reads the batch `start + index` in this thread."""
        if index < 0 or not (self.training or index < len(self)):
            raise IndexError(index)
        alone = types.SimpleNamespace(count=1, map=map)
        batch = self._batches.read(alone, self.start + index)
        return self._finished(batch, self.skipped)

    def __iter__(self) -> Generator[dict[str, np.ndarray], None, None]:
        process, workers = os.getpid(), self._num_workers
        self.skipped = skipped = self._skipped()
        self.unused_captions = 0
        rows = self.batch_size // self.process[1]
        size = rows * math.prod(self.element_spec["images"].shape[1:])
        ahead = max(min(MAX_AHEAD // size, AHEAD), 1)
        count = max(min(num_processors() // max(workers, 1), MAX_THREADS), 1)
        read = functools.partial(self._batches.in_threads, count, ahead)
        if workers:
            read = functools.partial(in_processes, read, workers, size)
        stop = 2**62 if self.training else self.start + len(self)
        stack = contextlib.ExitStack()
        # Also at exit, before the modules that the readers need are unloaded.
        close = weakref.finalize(stack, _close, process, stack)
        try:
            batches = read(range(self.start, stop), stack)
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - began
                if batch is None:
                    break
                batch = self._finished(batch, skipped)
                # All samples of the batch may be broken.
                if len(batch["images"]):
                    yield batch
                if os.getpid() != process:
                    raise RuntimeError(
                        "An iterator over an `image_text_dataset` must be read in the "
                        "process that created it, not in a fork of that process: call "
                        "`iter(dataset)` in the fork. Received: process "
                        f"{os.getpid()}, an iterator of process {process}"
                    )
        finally:
            close()

    def _finished(self, batch, skipped):
        """Counts the broken samples of a batch, and adds what workers cannot make."""
        *report, unused = batch.pop(REPORT)
        self.unused_captions += unused
        skipped.report(*report)
        # A Keras layer cannot run in worker processes.
        if TEXTS in batch:
            captions = self._batches.captions
            batch["token_ids"] = captions.tokenize(*batch[TEXTS], self.tokenizer)
        return {name: batch[name] for name in self.element_spec}

    def __repr__(self):
        entries = (f"{name} {x.shape}" for name, x in self.element_spec.items())
        return (
            f"<ImageTextDataset {self.num_samples} samples, {len(self)} batches of "
            f"{', '.join(entries)}>"
        )


def num_processors():
    """Returns the number of processors that this process may use."""
    # Only Linux reports the processors that are assigned to a process.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _close(process, stack):
    # A fork of the process must not end its readers.
    if os.getpid() == process:
        stack.close()


def _name_of(function):
    """Returns the name of a function, or of the class of an object, or `None`."""
    if function is None:
        return None
    return getattr(function, "__qualname__", type(function).__qualname__)
