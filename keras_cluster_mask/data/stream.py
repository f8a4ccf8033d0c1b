"""A grain dataset of batches, which has a length and can start at any batch."""

import copy
import functools
import math
import multiprocessing.connection
import os
import shutil
import threading
import typing
import weakref
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from keras_cluster_mask.data.samples import FAULTS, Samples
from keras_cluster_mask.data.skipped import SkippedSamples
from keras_cluster_mask.data.tokenizing import is_layer, tokenize

# The limits of prefetching per process, in bytes and in batches.
MAX_AHEAD, AHEAD = 2**29, 2
# The size of a chunk, which one thread reads, in rows of a batch and in bytes.
CHUNK, MAX_CHUNK = 32, 2**24
# More threads in one process would wait for each other.
MAX_THREADS = 16
SHARED_MEMORY = "/dev/shm"


class Spec(typing.NamedTuple):
    """The shape, with `None` for unknown sizes, and the dtype of an array."""

    shape: tuple
    dtype: str


class ImageTextDataset(grain.IterDataset):
    """A dataset of batches of image-text pairs; see `image_text_dataset`.

    It is an endless stream in training, and reads each sample once in evaluation.

    Args:
        samples: `Samples`.
        tokenizer: The tokenizer, or None.
        num_workers: int. The number of worker processes; 0 for threads.
        skipped: `SkippedSamples` of the index.
        element_spec: dict from the name of each entry of a batch to its `Spec`.
        description: dict. The settings that determine the samples of each batch.

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
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer: Any,
        num_workers: int,
        skipped: SkippedSamples,
        element_spec: dict[str, Spec],
        description: dict[str, Any],
    ):
        super().__init__()
        self.start = 0
        self.skipped = self._left_out = skipped
        self.batch_size = samples.batch_size
        self.num_samples = len(samples.index)
        self.training = samples.training
        self.element_spec = element_spec
        self.description = description
        self.tokenizer = tokenizer
        self._samples = samples
        self._num_workers = num_workers

    @property
    def stream(self) -> Self:
        """The dataset itself. Its `tf.data.Dataset` has this attribute, too."""
        return self

    def __len__(self) -> int:
        """Returns the number of batches.

        In training, these are the full batches of the epoch at `start`.
        """
        samples = self._samples
        if not self.training:
            return samples.num_batches
        epoch, _ = samples.order.place(self.start * samples.batch_size)
        return samples.order.length(epoch) // samples.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches in a training epoch of mean length."""
        samples = self._samples
        return max(int(samples.order.mean_length) // samples.batch_size, 1)

    @property
    def num_images(self) -> int | None:
        """The number of images of this process, broken ones included.

        `None` in training.
        """
        if self.training:
            return None
        return sum(len(self._samples.positions(batch)) for batch in range(len(self)))

    def keys(self, batch: int) -> list[str]:
        """Returns the keys of the samples of this process in a batch."""
        pairs = self._samples.pairs(self._samples.positions(batch))
        return [str(pair.key) for pair in pairs]

    def as_dataset(self) -> Any:
        """Returns a `tf.data.Dataset` of the batches, which also starts at `start`."""
        from keras_cluster_mask.data.tensorflow import as_dataset

        return as_dataset(self)

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(self, self.batches(self.start))

    def batches(self, start: int) -> grain.IterDataset:
        """Returns a grain dataset of the batches from `start` on; see `finished`."""
        bytes_per_row = math.prod(self.element_spec["images"].shape[1:])
        bytes_per_batch = self._samples.rows * bytes_per_row
        ahead = max(min(MAX_AHEAD // bytes_per_batch, AHEAD), 1)
        workers = max(self._num_workers, 1)
        if self._num_workers:
            # Queued batches on both sides, one in progress, and one in use.
            _check_shared_memory(bytes_per_batch * ((2 * ahead + 1) * workers + 1))
        # Read a run of neighbors in one chunk.
        rows = max(CHUNK, getattr(self._samples.order, "block_size", 1))
        rows = min(rows, max(MAX_CHUNK // bytes_per_row, 1))
        per_batch = -(-self._samples.rows // rows)
        # All workers make the same number of evaluation batches; the last may be empty.
        turns = max(-(-(self._samples.num_batches - start) // workers), 0)
        chunks = 2**62 if self.training else turns * workers * per_batch
        read = functools.partial(_read_chunk, self._samples, start, workers, rows)
        threads = max(min(num_processors() // workers, MAX_THREADS), 1)
        options = grain.ReadOptions(
            num_threads=threads,
            prefetch_buffer_size=max(ahead * per_batch, 2 * threads),
        )
        dataset = grain.MapDataset.range(chunks).map(read).to_iter_dataset(options)
        dataset = dataset.batch(per_batch, batch_fn=_together)
        if self._num_workers:
            # grain reads its own absl flags, which few programs parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                workers, per_worker_buffer_size=ahead
            )
            dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
        return dataset

    def finished(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Adds the token ids of a Keras layer, which cannot run in worker processes."""
        if is_layer(self.tokenizer):
            captions = [c[0] if isinstance(c, tuple) else c for c in batch["captions"]]
            batch["token_ids"] = tokenize(self.tokenizer, captions)
        # Restore the order: grain sorts the entries of batches from worker processes.
        return {name: batch[name] for name in self.element_spec}

    def __str__(self):
        return f"ImageTextDataset({self.num_samples} samples, {len(self)} batches)"


class _Iterator(grain.DatasetIterator):
    """Counts broken samples, skips empty batches, and closes the workers at the end."""

    def __init__(self, dataset, batches):
        super().__init__()
        self._dataset = dataset
        self._skipped = dataset.skipped = copy.deepcopy(dataset._left_out)
        self._pid = os.getpid()
        self._start(dataset.start, batches)

    def _start(self, batch, batches):
        self._batch, self._batches = batch, [iter(batches)]
        # Also runs at exit, before the modules that it needs are unloaded.
        self._close = weakref.finalize(self, _close, self._batches)

    def __next__(self):
        if os.getpid() != self._pid:
            raise RuntimeError(
                "A pass over an `image_text_dataset` must be read in the process that "
                "started it, and not in a fork of it, such as the workers of a torch "
                f"`DataLoader`: pass `num_workers` to `image_text_dataset`. Received: "
                f"process {os.getpid()}, started in {self._pid}"
            )
        while True:
            if not self._batches:
                raise StopIteration
            try:
                batch = next(self._batches[0])
            except BaseException:
                self._close()
                raise
            self._batch += 1
            rows = len(batch["images"])
            faults = batch.pop(FAULTS)
            # In training, broken samples have been replaced.
            left_out = 0 if self._dataset.training else len(faults)
            self._skipped.report(faults, rows + left_out)
            if rows:
                return self._dataset.finished(batch)

    def close(self):
        self._close()
        super().close()

    def get_state(self):
        return {"batch": self._batch}

    def set_state(self, state):
        self._close()
        self._start(state["batch"], self._dataset.batches(state["batch"]))


def _close(iterators):
    iterators.pop().close()


def _end_with_parent(index, count):
    """Ends a worker process when its parent process ends."""

    def wait():
        parent = multiprocessing.parent_process()
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="wait for parent").start()


def _read_chunk(samples, start, workers, size, number):
    """Reads a chunk of a batch.

    grain distributes the numbers to worker processes in turn. Chunks are numbered so
    that one worker reads all chunks of a batch, for any number of workers.

    Args:
        samples: `Samples`.
        start: int. The first batch.
        workers: int. The number of worker processes.
        size: int. The number of rows of a chunk.
        number: int. The number of the chunk.
    """
    turn, worker = divmod(number, workers)
    turn, chunk = divmod(turn, -(-samples.rows // size))
    positions = samples.positions(start + turn * workers + worker)
    return samples.read(positions[chunk * size : (chunk + 1) * size])


def _together(chunks):
    """Concatenates the chunks of a batch."""
    faults = [fault for chunk in chunks for fault in chunk.pop(FAULTS)]
    # Empty chunks do not know the row length of the tokenizer.
    chunks = [chunk for chunk in chunks if len(chunk["images"])] or chunks[:1]
    arrays = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    return {**arrays, FAULTS: faults}


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
