"""A stream of batches, read ahead in the background, and the samples that it skips."""

import collections
import contextlib
import functools
import itertools
import math
import os
import time
import types
import warnings
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.data.batches import REPORT, TEXTS, Batches
from keras_cluster_mask.data.tokenizing import length_of
from keras_cluster_mask.data.workers import in_processes
from keras_cluster_mask.stream import Stream

# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# More threads in one process would wait for each other.
MAX_THREADS = 16
# The number of samples that are listed for each reason.
MAX_EXAMPLES = 20


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

    Attributes:
        start: Integer. The batch at which an iteration starts. `ContrastiveModel.fit`
            sets it to the batch after the last one that it trained on.
        skipped: `SkippedSamples`. The broken samples of the last pass.
        unused_captions: Integer. The number of captions left out in the last pass, for
            images with several.
        batch_size: Integer. The global batch size.
        num_samples: Integer. The number of intact samples, before any `Sampling`.
        element_spec: Dictionary from the name of each entry of a batch to its `Spec`.
        description: Dictionary. The settings that determine the samples of each batch.
            A run can only be resumed on a dataset with an equal `description`.
        versions: List of strings, one for each source, which change with the sizes and
            dates of its files. Each access reads these, and tables.
        tokenizer: The tokenizer, or `None`.
        process: Pair of integers. The index of this process, and the number of
            processes.
        class_names: List of strings, the names that labels index, if known.
        waited: Float. The seconds that the program has waited for batches. On JAX and
            TensorFlow, earlier steps may run meanwhile.
    """

    steps_per_epoch: int
    """The number of full batches in a training epoch of mean length."""

    def __init__(self, batches: Batches):
        self._batches = batches
        self.start, self.waited, self.unused_captions = 0, 0.0, 0
        self.process = batches.process
        self.skipped = self._new_skipped()
        self.skipped.report_index()
        self.batch_size = batches.batch_size
        self.num_samples = batches.num_samples
        self.training = batches.training
        self.element_spec = batches.element_spec
        self.tokenizer = batches.captions.tokenizer
        labels = batches.fields.labels
        self.class_names = list((labels and labels.numbers) or ())
        if self.training:
            length = batches.order.length(0)
            if length < self.batch_size:
                raise ValueError(
                    "`batch_size` must not exceed the number of samples in an epoch, "
                    "all of `source` or the choice of `sampling`, because training "
                    f"uses full batches only. Received: batch_size={self.batch_size}, "
                    f"{length} samples"
                )
            length = int(batches.order.mean_length)
            self.steps_per_epoch = max(length // self.batch_size, 1)

    @property
    def description(self) -> dict[str, Any]:
        batches, images = self._batches, self._batches.images
        captions = batches.captions
        masking, crop_scale = captions.text_masking, images.crop_scale
        return {
            "files": sum(len(index.paths) for index in batches.indexes),
            "samples": self.num_samples,
            "index": [index.fingerprint for index in batches.indexes],
            "weights": batches.weights,
            "batch_size": self.batch_size,
            "seed": batches.seed,
            "block_size": batches.block_size,
            "sampling": batches.order.digest() if self.training else None,
            "image_size": list(images.image_size),
            "data_format": images.data_format,
            "resize": images.resize,
            "crop_scale": crop_scale and [*map(float, crop_scale)],
            "max_image_pixels": images.max_pixels,
            "image_transform": _name_of(images.image_transform),
            "tokenizer": [_name_of(self.tokenizer), length_of(self.tokenizer)],
            "text_masking": masking and repr(masking),
            "include_captions": not self.training and captions.include_captions,
        }

    @property
    def versions(self) -> list[str]:
        return [index.versions for index in self._batches.indexes]

    def __len__(self) -> int:
        """Returns the number of batches, from `start` on.

        In training, these are the full batches of the epoch at `start`.
        """
        if not self.training:
            return max(-(-self.num_samples // self.batch_size) - self.start, 0)
        order = self._batches.order
        epoch, _ = order.place(self.start * self.batch_size)
        return order.length(epoch) // self.batch_size

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

        Each iteration over it starts at the current `start`. Tuples of captions are
        left out, since a `tf.data.Dataset` cannot hold them. A `ContrastiveModel` reads
        the dataset itself, and checks its tokenizer.
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
        process = os.getpid()
        self.skipped = skipped = self._new_skipped()
        self.unused_captions = 0
        workers = self._batches.num_workers
        size = self._batches.rows * math.prod(self.element_spec["images"].shape[1:])
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
                        "A pass over an `image_text_dataset` must be read in the "
                        "process that started it, and not in a fork of it: start it "
                        f"there. Received: process {os.getpid()}, started in {process}"
                    )
        finally:
            close()

    def _new_skipped(self):
        """Returns the counts of a pass that begins."""
        batches = self._batches
        lengths = [math.ceil(length / self.process[1]) for length in batches.lengths]
        return SkippedSamples(
            batches.indexes, batches.max_skipped, batches.names, lengths
        )

    def _finished(self, batch, skipped):
        """Counts the broken samples of a batch, and adds what workers cannot make."""
        found, unused = batch.pop(REPORT)
        self.unused_captions += unused
        skipped.report(found)
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


def _close(process, stack):
    # A fork of the process must not end its readers.
    if os.getpid() == process:
        stack.close()


class SkippedSamples:
    """The broken samples in the last pass over a dataset.

    Samples that the index left out are counted from the start, and are the same in all
    processes. Samples that turn out to be broken when they are read are added with
    their batch. Each iteration over a dataset creates a new `SkippedSamples`, which
    starts with the counts of the index.

    Args:
        indexes: List of `Index` and `ObjectIndex`, one for each source.
        max_share: Float. The fraction of the samples of each source that may be broken.
        names: List of strings, the names of the sources in messages.
        lengths: List of integers. The number of samples of each source in a pass.

    Attributes:
        max_share: Float. The fraction of the samples of each source that may be broken.
        by_reason: Dictionary from each reason, a string, to the number of samples.
        examples: Dictionary from each reason to a list of the first 20 samples, tuples
            of `file`, `key`, `reason` and `details`. The keys of samples that the
            index left out are read from the shards at each access.
    """

    def __init__(
        self,
        indexes: Sequence[Any] = (),
        max_share: float = 1.0,
        names: Sequence[str] = (),
        lengths: Sequence[int] = (),
    ):
        self.max_share = max_share
        self._indexes, self._names, self._lengths = indexes, names, lengths
        # Of each source: the faults, the samples that were read, the broken of a pass.
        self._counts = [collections.Counter(index.faults) for index in indexes]
        self._read, self._broken = collections.Counter(), {}
        # Of the samples that turned out to be broken.
        self._examples = collections.defaultdict(list)
        self._taken = self.count

    @property
    def by_reason(self) -> dict[str, int]:
        return dict(sorted(sum(self._counts, collections.Counter()).items()))

    @property
    def examples(self) -> dict[str, list[Any]]:
        left_out = [index.examples(MAX_EXAMPLES) for index in self._indexes]
        faults = [*itertools.chain(*left_out, *self._examples.values())]
        return {
            reason: [each for each in faults if each.reason == reason][:MAX_EXAMPLES]
            for reason in self.by_reason
        }

    @property
    def count(self) -> int:
        """Integer. The number of broken samples."""
        return sum(self.by_reason.values())

    def reasons(self) -> str:
        """Returns the reasons with their counts."""
        return _listed(self.by_reason)

    def add(self, fault: Any, source: int = 0) -> None:
        """Counts a broken sample.

        Args:
            fault: `Fault`.
            source: Integer. The number of its source.
        """
        self._counts[source][fault.reason] += 1
        examples = self._examples[fault.reason]
        if len(examples) < MAX_EXAMPLES:
            examples.append(fault)

    def report_index(self) -> None:
        """Warns about samples that the indexes left out, or raises an error."""
        # Imported here, since worker processes import this module without Keras.
        from keras_cluster_mask.distribution import is_main_process

        for source, index in enumerate(self._indexes):
            count = index.faults.total()
            if not count:
                continue
            total = count + len(index)
            message = (
                f"{count} of {total} samples of {self._names[source]} are broken "
                f"({_listed(index.faults)}), such as {next(index.examples(1))}"
            )
            self._check(source, message, count, total)
            if is_main_process():
                # Show the line that called `image_text_dataset`.
                warnings.warn(f"{message}. They are left out.", stacklevel=4)

    def report(self, found: Sequence[tuple[int, Any]]) -> None:
        """Counts the samples of a batch, and warns about the first broken one of all.

        Raises an error as soon as a pass over a source has too many.

        Args:
            found: List of pairs for the samples that were read: the number of the
                source, and the `Fault`, or `None` for an intact sample.
        """
        for source, fault in found:
            length = self._lengths[source]
            if self._read[source] % length == 0:
                self._broken[source] = set()
            self._read[source] += 1
            if fault is None:
                continue
            message, is_first = f"A sample is broken: {fault}", not self._examples
            self.add(fault, source)
            # A pass that begins within an epoch may read a sample twice.
            self._broken[source].add((fault.file, fault.key or object()))
            self._check(source, message, len(self._broken[source]), length)
            if is_first:
                warnings.warn(
                    f"{message}. It was skipped; others may follow without a warning, "
                    "`dataset.skipped` counts them.",
                    stacklevel=2,
                )

    def _check(self, source, message, broken, total):
        """Raises an error if too many samples of a source are broken."""
        if broken > self.max_share * total:
            raise ValueError(
                f"{message}. More than {100 * self.max_share:.3g} % of the samples of "
                f"{self._names[source]} are broken. Repair it, or pass a larger "
                f"`max_skipped`. Received: max_skipped={self.max_share}, {broken} "
                f"broken of {total} samples, {_listed(self._counts[source])}"
            )

    def take_new(self) -> int:
        """Returns the number of samples that were added since the last call."""
        count, self._taken = self.count - self._taken, self.count
        return count

    def __repr__(self):
        reasons = f", {self.reasons()}" if self.count else ""
        return f"<SkippedSamples count={self.count}{reasons}>"


def _listed(counts):
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items()))


def num_processors():
    """Returns the number of processors that this process may use."""
    # Only Linux reports the processors that are assigned to a process.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _name_of(function):
    """Returns the name of a function, or of the class of an object, or `None`."""
    if function is None:
        return None
    return getattr(function, "__qualname__", type(function).__qualname__)
