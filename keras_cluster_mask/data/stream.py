"""A grain dataset of batches, which has a length and can start at any batch."""

import collections
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import weakref
from typing import Any, Self

import cloudpickle
import grain
import numpy as np

from keras_cluster_mask.data.files import Threads
from keras_cluster_mask.data.samples import REPORT, TEXTS, Samples
from keras_cluster_mask.data.skipped import SkippedSamples

# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# More threads in one process would wait for each other.
MAX_THREADS = 16


class ImageTextDataset(grain.IterDataset):
    """A dataset of batches of image-text pairs; see `image_text_dataset`.

    It is an endless stream in training, and reads each sample once in evaluation.

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
        super().__init__()
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

    @property
    def stream(self) -> Self:
        """The dataset itself. Its `tf.data.Dataset` has this attribute, too."""
        return self

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
        """Returns a `tf.data.Dataset` of the batches, which also starts at `start`."""
        from keras_cluster_mask.data.tensorflow import as_dataset

        return as_dataset(self)

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self)

    def __repr__(self):
        entries = (f"{name} {x.shape}" for name, x in self.element_spec.items())
        return (
            f"<ImageTextDataset {self.num_samples} samples, {len(self)} batches of "
            f"{', '.join(entries)}>"
        )


class _Iterator(grain.DatasetIterator):
    """Counts broken samples, skips empty batches, and ends the readers at the end."""

    def __init__(self, dataset):
        super().__init__()
        self._dataset = dataset
        reading = dataset._reading
        self._skipped = SkippedSamples(reading.indexes, reading.max_skipped)
        dataset.skipped = self._skipped
        dataset.unused_captions = 0
        self._total = dataset.num_samples // reading.process[1]
        self._start(dataset.start)

    def _start(self, batch):
        dataset, stack = self._dataset, contextlib.ExitStack()
        workers, rows = dataset._reading.num_workers, dataset._reading.rows
        size = rows * math.prod(dataset.element_spec["images"].shape[1:])
        ahead = max(min(MAX_AHEAD // size, AHEAD), 1)
        count = max(min(num_processors() // max(workers, 1), MAX_THREADS), 1)
        read = functools.partial(_in_threads, dataset._samples, count, ahead)
        if workers:
            read = functools.partial(_in_workers, read, workers, size)
        stop = 2**62 if dataset.training else len(dataset)
        self._batch, self._batches = batch, read(range(batch, stop), stack)
        self._pid = os.getpid()
        # Also runs at exit, before the modules that it needs are unloaded.
        self._close = weakref.finalize(self, _close, self._pid, stack)

    def __next__(self):
        if os.getpid() != self._pid:
            raise RuntimeError(
                "A pass over an `image_text_dataset` must be read in the process that "
                "started it, not in a fork of it, such as a worker of a torch "
                "`DataLoader`: pass `num_workers` to `image_text_dataset`. Received: "
                f"process {os.getpid()}, started in {self._pid}"
            )
        try:
            while self._close.alive:
                began = time.perf_counter()
                batch = next(self._batches)
                self._batch += 1
                self._dataset.waited += time.perf_counter() - began
                rows = len(batch["images"])
                faults, unused = batch.pop(REPORT)
                self._dataset.unused_captions += unused
                # In training, broken samples have been replaced.
                left_out = 0 if self._dataset.training else len(faults)
                self._skipped.report(faults, rows + left_out, self._total)
                if not rows:
                    continue
                # A Keras layer cannot run in worker processes.
                if TEXTS in batch:
                    tokenize = self._dataset._samples.captions.tokenize
                    batch["token_ids"] = tokenize(*batch[TEXTS])
                return {name: batch[name] for name in self._dataset.element_spec}
        except BaseException:
            # A notebook keeps the last error, and with it this object.
            self._close()
            raise
        raise StopIteration

    def close(self):
        self._close()
        super().close()

    def get_state(self):
        return {"batch": self._batch}

    def set_state(self, state):
        self._close()
        self._start(state["batch"])


def _close(pid, stack):
    # A fork of the process must not end its readers.
    if os.getpid() == pid:
        stack.close()


def _in_threads(samples, count, ahead, batches, stack):
    """Yields batches by their numbers, and begins the next ones in the background."""
    rows, several = (stack.enter_context(Threads(n)) for n in (count, ahead))
    begun = collections.deque()
    for batch in batches:
        begun.append(several.submit(samples.read, rows, batch))
        # A batch begins as soon as there are free threads, before the last one is done.
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _in_workers(read, count, size, batches, stack):
    """Yields batches, which worker processes read in turn.

    grain's own processes block Ctrl-C while the storage stalls. These can be killed at
    any time, because the memory that they share with this process has no name.

    Args:
        read: Function of batches and a stack, as `_in_threads`.
        count: Integer. The number of processes.
        size: Integer. The number of bytes of the images of a full batch.
        batches: Range. The numbers of the batches.
        stack: `contextlib.ExitStack`. Closing it ends the processes.
    """
    context, workers = multiprocessing.get_context("spawn"), []
    for number in range(count):
        memory = context.RawArray("B", size)
        connection, other = context.Pipe()
        arguments = other, memory, batches[number::count]
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        other.close()
        stack.callback(process.join)
        stack.callback(process.kill)
        workers.append((process, connection, np.frombuffer(memory, "uint8")))
    # Unlike pickle, cloudpickle supports lambdas.
    content = cloudpickle.dumps(read)
    for _, connection, _ in workers:
        # A worker that has ended is found below.
        with contextlib.suppress(OSError):
            connection.send_bytes(content)
    for _, (process, connection, images) in zip(batches, itertools.cycle(workers)):
        try:
            batch, shape = connection.recv()
        # With unread bytes, the connection is reset.
        except (EOFError, ConnectionResetError) as error:
            process.join()
            raise RuntimeError(
                "A worker process of `num_workers` ended, such as for lack of memory, "
                'or because the program has no `if __name__ == "__main__":`. '
                f"Received: exit code {process.exitcode}"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        batch["images"] = images[: math.prod(shape)].reshape(shape).copy()
        # The worker may overwrite the images.
        connection.send(None)
        yield batch


def _work(connection, memory, batches):
    """Reads batches in a worker process, and sends them until the program ends."""
    images = np.frombuffer(memory, "uint8")
    # After Ctrl-C, which all processes get, the program ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A program that is killed closes the connection.
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        try:
            read = connection.recv()
            for batch in read(batches, stack):
                found = batch.pop("images")
                images[: found.size] = found.ravel()
                connection.send((batch, found.shape))
                connection.recv()
        except Exception as error:
            # A pickle has no traceback.
            error.add_note(traceback.format_exc())
            try:
                pickle.loads(pickle.dumps(error))
            # Such as the error of a class that the program defines.
            except Exception:
                error = RuntimeError("".join(traceback.format_exception(error)))
            connection.send((error, ()))


def num_processors():
    """Returns the number of processors that this process may use."""
    # Only Linux reports the processors that are assigned to a process.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
