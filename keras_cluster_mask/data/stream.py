"""`ImageTextDataset`: a stream of batches, read ahead in the background."""

import atexit
import contextlib
import functools
import math
import os
import time
from collections.abc import Generator
from typing import Any

import numpy as np

from keras_cluster_mask.data.samples import REPORT, TEXTS, Samples
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.workers import in_processes, in_threads, num_processors
from keras_cluster_mask.stream import Stream

# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# More threads in one process would wait for each other.
MAX_THREADS = 16


class ImageTextDataset(Stream):
    """A dataset of batches of image-text pairs; see `image_text_dataset`.

    It is an iterable with a length: an endless stream in training, while evaluation
    reads each sample once. `ContrastiveModel.fit` reads it as it is. Give other Keras
    models `fit(iter(dataset), steps_per_epoch=len(dataset))`. `dataset[n]` is the batch
    `n` of an iteration, so a `torch.utils.data.DataLoader(dataset, batch_size=None)`
    reads it, too.

    Args:
        samples: `Samples`.

    Attributes:
        start: Integer. The batch at which an iteration starts. `ContrastiveModel.fit`
            sets it to the batch after the last one that it trained on.
        skipped: `SkippedSamples`. The broken samples of the last pass.
        unused_captions: Integer. The captions left out in the last pass, of images
            with several.
        batch_size: Integer. The global batch size.
        num_samples: Integer. The number of intact samples, from which `Sampling` may
            choose those of an epoch.
        element_spec: Dictionary from the name of each entry of a batch to its `Spec`.
        description: Dictionary. The settings that determine the samples of each batch.
            A run can only be resumed on a dataset with an equal `description`.
        tokenizer: The tokenizer, or `None`.
        process: Pair of integers. The index of this process, and the number of
            processes.
        class_names: List of strings, the names that labels are indices into, if known.
        waited: Float. The seconds for which the program has waited for batches.
    """

    steps_per_epoch: int
    """The number of full batches in a training epoch of mean length."""

    def __init__(self, samples: Samples):
        reading = samples.reading
        self.start = 0
        self.skipped = reading.skipped
        self.unused_captions = 0
        self.batch_size = reading.batch_size
        self.num_samples = reading.num_samples
        self.training = reading.training
        self.element_spec = samples.element_spec
        self.description = samples.description
        self.tokenizer = samples.captions.tokenizer
        self.process = reading.process
        labels = reading.fields.labels
        self.class_names = list((labels and labels.numbers) or ())
        self.waited = 0.0
        self._samples, self._reading = samples, reading
        if self.training:
            length = int(reading.order.mean_length)
            self.steps_per_epoch = max(length // self.batch_size, 1)

    def __len__(self) -> int:
        """Returns the number of batches.

        In training, these are the full batches of the epoch at `start`.
        """
        if not self.training:
            return -(-self.num_samples // self.batch_size)
        epoch, _ = self._reading.order.place(self.start * self.batch_size)
        return self._reading.order.length(epoch) // self.batch_size

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, broken ones included.

        `None` in training.
        """
        if self.training:
            return None
        return sum(len(self._reading.positions(batch)) for batch in range(len(self)))

    def as_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of the batches.

        Each iteration over it starts at the current `start`. Tuples of captions are
        left out, since a `tf.data.Dataset` cannot hold them.
        """
        from keras_cluster_mask.distribution.tensorflow_data import dataset_of

        return dataset_of(self.__iter__, self.element_spec)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Reads the batch `start + index` in this thread."""
        if not self.training and not 0 <= index < len(self) - self.start:
            raise IndexError(index)
        batch = self._samples.read(_Alone(), self.start + index)
        return self._finished(batch, self.skipped)

    def __iter__(self) -> Generator[dict[str, np.ndarray], None, None]:
        reading, process = self._reading, os.getpid()
        self.skipped = skipped = SkippedSamples(reading.indexes, reading.max_skipped)
        self.unused_captions = 0
        stack = contextlib.ExitStack()
        close = functools.partial(_close, process, stack)
        # At exit, before the modules that the readers need are unloaded.
        atexit.register(close)
        try:
            batches = self._begin(stack)
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
            atexit.unregister(close)

    def _begin(self, stack):
        """Begins to read batches from `start` on, until the stack is closed."""
        workers, rows = self._reading.num_workers, self._reading.rows
        size = rows * math.prod(self.element_spec["images"].shape[1:])
        ahead = max(min(MAX_AHEAD // size, AHEAD), 1)
        count = max(min(num_processors() // max(workers, 1), MAX_THREADS), 1)
        read = functools.partial(in_threads, self._samples, count, ahead)
        if workers:
            read = functools.partial(in_processes, read, workers, size)
        stop = 2**62 if self.training else len(self)
        return read(range(self.start, stop), stack)

    def _finished(self, batch, skipped):
        """Counts the broken samples of a batch, and adds what workers cannot make."""
        faults, unused = batch.pop(REPORT)
        self.unused_captions += unused
        # In training, broken samples have been replaced.
        rows = len(batch["images"]) + (0 if self.training else len(faults))
        total = self.num_samples // self.process[1]
        skipped.report(faults, rows, total)
        # A Keras layer cannot run in worker processes.
        if TEXTS in batch:
            batch["token_ids"] = self._samples.captions.tokenize(*batch[TEXTS])
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


class _Alone:
    """Stands for `Threads` in a thread that reads alone."""

    count, map = 1, staticmethod(map)
