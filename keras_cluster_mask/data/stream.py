"""A grain dataset of batches, which has a length and can start at any batch."""

import collections
import copy
import functools
import math
import multiprocessing.connection
import os
import shutil
import threading
import time
import weakref
from concurrent import futures
from multiprocessing.shared_memory import ShareableList
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from keras_cluster_mask.data.captions import TEXTS
from keras_cluster_mask.data.samples import FAULTS, Samples
from keras_cluster_mask.data.threads import Threads

# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# More threads in one process would wait for each other, and the GIL keeps more
# processors than these from being busy.
MAX_THREADS, BUSY = 16, 3
# The seconds between two checks whether a worker must end, and those after which it is
# killed if it has not.
POLL, END_AFTER = 0.5, 1.5
SHARED_MEMORY = "/dev/shm"


class ImageTextDataset(grain.IterDataset):
    """A dataset of batches of image-text pairs; see `image_text_dataset`.

    It is an endless stream in training, and reads each sample once in evaluation.

    Args:
        samples: `Samples`.

    Attributes:
        start: int. The batch at which an iteration starts. `ContrastiveModel.fit` sets
            it to the batch after the last one that it trained on.
        skipped: `SkippedSamples`. The broken samples of the last pass.
        batch_size: int. The global batch size.
        num_samples: int. The number of intact samples, from which a sampler may choose
            those of an epoch.
        element_spec: dict from the name of each entry of a batch to its `Spec`.
        description: dict. The settings that determine the samples of each batch. A run
            can only be resumed on a dataset with an equal `description`.
        tokenizer: The tokenizer, or None.
        process: Pair of ints. The index of this process, and the number of processes.
        class_names: list of str, the names that labels are indices into, if known.
        waits: deque of the times at which the program began and ended to wait for each
            of the last batches, in seconds.
    """

    def __init__(self, samples: Samples):
        super().__init__()
        reading = samples.reading
        self.start = 0
        self.skipped = reading.skipped
        self.batch_size = reading.batch_size
        self.num_samples = len(reading.index)
        self.training = reading.training
        self.element_spec = samples.element_spec
        self.description = samples.description
        self.tokenizer = samples.captions.tokenizer
        self.process = reading.process
        labels = reading.fields.labels
        self.class_names = labels.class_names if labels else []
        self.waits = collections.deque(maxlen=1024)
        self._samples, self._reading = samples, reading

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
    def steps_per_epoch(self) -> int:
        """The number of full batches in a training epoch of mean length."""
        return max(int(self._reading.order.mean_length) // self.batch_size, 1)

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, broken ones included.

        `None` in training.
        """
        if self.training:
            return None
        return sum(len(self._reading.positions(batch)) for batch in range(len(self)))

    def faster(self, share: float) -> int | None:
        """Returns the `num_workers` that would shorten the wait for data, or `None`.

        Args:
            share: float. The share of time that steps wait for data.
        """
        workers = max(self._reading.num_workers, 1)
        wanted = math.ceil(workers / (1 - min(share, 0.9)))
        useful = min(wanted, -(-num_processors() // BUSY))
        return useful if useful > workers else None

    def as_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of the batches, which also starts at `start`."""
        from keras_cluster_mask.data.tensorflow import as_dataset

        return as_dataset(self)

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self, *self.batches(self.start))

    def batches(self, start: int) -> tuple[grain.IterDataset, "_Reader"]:
        """Returns a grain dataset of the batches from `start` on, and their `_Reader`.

        See `finished`.
        """
        rows, workers = self._reading.rows, self._reading.num_workers
        bytes_per_batch = rows * math.prod(self.element_spec["images"].shape[1:])
        ahead = max(min(MAX_AHEAD // bytes_per_batch, AHEAD), 1)
        stop = 2**62 if self.training else max(len(self), start)
        count = max(min(num_processors() // max(workers, 1), MAX_THREADS), 1)
        read = _Reader(self._samples, count, ahead, workers, stop)
        dataset = grain.MapDataset.range(start, stop).map(read)
        # The reader has threads, and a program does not wait for them when it ends.
        dataset = dataset.to_iter_dataset(grain.ReadOptions(0, 0))
        if not workers:
            return dataset, read
        # Queued batches on both sides, one in progress, and one in use.
        _check_shared_memory(bytes_per_batch * ((2 * ahead + 1) * workers + 1))
        # grain reads its own absl flags, which few programs parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
        read.workers = ShareableList([0] * workers + [False])
        begin = functools.partial(_begin_worker, read.workers)
        return dataset.mp_prefetch(options, worker_init_fn=begin), read

    def finished(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Adds the token ids of a Keras layer, which cannot run in worker processes."""
        if TEXTS in batch:
            batch["token_ids"] = self._samples.captions.tokenize(*batch[TEXTS])
        # Restore the order: grain sorts the entries of batches from worker processes.
        return {name: batch[name] for name in self.element_spec}

    def __repr__(self):
        entries = (f"{name} {x.shape}" for name, x in self.element_spec.items())
        return (
            f"<ImageTextDataset {self.num_samples} samples, {len(self)} batches of "
            f"{', '.join(entries)}>"
        )


class _Reader:
    """Reads batches by their number, and begins the next ones in the background.

    Args:
        samples: `Samples`.
        count: int. The number of threads that read and decode rows.
        ahead: int. The number of batches that are read ahead.
        num_workers: int. The number of processes that take turns.
        stop: int. The number of the batch after the last.

    Attributes:
        workers: list of the id of each worker process, 0 before it starts, and of
            whether the workers must end. All processes share it. Empty without workers.
        starting: list of the processes that the first batch has started.
    """

    def __init__(self, samples, count, ahead, num_workers, stop):
        self._samples, self._stop, self._step = samples, stop, max(num_workers, 1)
        self._rows, self._batches = Threads(count), Threads(ahead)
        self._begun, self.workers, self.starting = {}, [], []

    def __call__(self, batch):
        # A batch begins as soon as there are free threads, before the last one is done.
        last = batch + self._batches.count * self._step
        for each in range(batch, min(last + 1, self._stop), self._step):
            if each not in self._begun:
                read = self._samples.read
                self._begun[each] = self._batches.submit(read, self._rows, each)
        future = self._begun.pop(batch)
        while not futures.wait([future], POLL).done:
            if self.workers and self.workers[-1]:
                raise futures.CancelledError
        return future.result()

    def close(self, pid, iterators, closer):
        """Closes threads and workers, and waits a short time for those that stall.

        Args:
            pid: int. The process that started them. A fork of it must not close them.
            iterators: list of the iterator over the batches, which must not outlive it.
            closer: `Threads`, in which it is closed, since grain waits without a limit.
        """
        if os.getpid() != pid:
            return
        # The batches in progress are not finished.
        self._batches.close()
        self._rows.close()
        if self.workers:
            self.workers[-1] = True
        closing = closer.submit(iterators.pop().close)
        # grain ends one worker after the other.
        limit = END_AFTER + len(self.workers) / 4
        if not futures.wait([closing], limit).done:
            # The workers that have been stopped by a signal or a debugger.
            noted = [*self.workers][:-1]
            for process in multiprocessing.active_children():
                # A worker that stops while it starts has not noted its id.
                if process.pid in noted or (0 in noted and process in self.starting):
                    process.kill()
            futures.wait([closing], 4 * limit)
        closer.close()
        if self.workers:
            self.workers.shm.close()
            self.workers.shm.unlink()


class _Iterator(grain.DatasetIterator):
    """Counts broken samples, skips empty batches, and closes the workers at the end."""

    def __init__(self, dataset, batches, reader):
        super().__init__()
        self._dataset = dataset
        self._skipped = dataset.skipped = copy.deepcopy(dataset._reading.skipped)
        self._total = dataset.num_samples // dataset._reading.process[1]
        self._pid = os.getpid()
        dataset.waits.clear()
        self._start(dataset.start, batches, reader)

    def _start(self, batch, batches, reader):
        self._batch, self._batches, self._reader = batch, [iter(batches)], reader
        closer = Threads(1)
        # At exit, no thread can start.
        closer.submit(int)
        # Also runs at exit, before the modules that it needs are unloaded.
        self._close = weakref.finalize(
            self, reader.close, self._pid, self._batches, closer
        )

    def __next__(self):
        if os.getpid() != self._pid:
            raise RuntimeError(
                "A pass over an `image_text_dataset` must be read in the process that "
                "started it, and not in a fork of it, such as the workers of a torch "
                f"`DataLoader`: pass `num_workers` to `image_text_dataset`. Received: "
                f"process {os.getpid()}, started in {self._pid}"
            )
        while True:
            if not self._close.alive:
                raise StopIteration
            began = time.perf_counter()
            try:
                batch = self._next()
            except BaseException:
                self._close()
                raise
            self._batch += 1
            self._dataset.waits.append((began, time.perf_counter()))
            rows = len(batch["images"])
            faults = batch.pop(FAULTS)
            # In training, broken samples have been replaced.
            left_out = 0 if self._dataset.training else len(faults)
            self._skipped.report(faults, rows + left_out, self._total)
            if rows:
                return self._dataset.finished(batch)

    def _next(self):
        reader = self._reader
        if reader.starting or not reader.workers:
            return next(self._batches[0])
        others = {*multiprocessing.active_children()}
        try:
            return next(self._batches[0])
        finally:
            children = {*multiprocessing.active_children()} - others
            reader.starting = [each for each in children if "grain" in each.name]

    def close(self):
        self._close()
        super().close()

    def get_state(self):
        return {"batch": self._batch}

    def set_state(self, state):
        self._close()
        self._start(state["batch"], *self._dataset.batches(state["batch"]))


def _begin_worker(workers, index, count):
    """Notes the id of a worker process, and ends it when its parent process ends."""
    workers[index] = os.getpid()

    def wait():
        parent = multiprocessing.parent_process()
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="wait for parent").start()


def _check_shared_memory(needed):
    """Raises an error if batches do not fit into shared memory."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            "`num_workers` processes pass batches through shared memory, of which "
            f"{SHARED_MEMORY} has too little: use fewer workers, a smaller "
            "`batch_size`, or make it larger (`docker run --shm-size`). Received: "
            f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free"
        )


def num_processors():
    """Returns the number of processors that this process may use."""
    # Only Linux reports the processors that are assigned to a process.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
