"""Decodes batches of pairs in threads while a model trains."""

import collections
import math
import os
from concurrent import futures

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.data.images import NUM_DRAWS, UnreadableImage
from keras_cluster_mask.data.sources.webdataset import MAX_BYTES

# The number of images in a task of a thread.
GROUP = 8
ALIGNMENT = 64


class Decoder:
    """Decodes batches in threads, several batches ahead.

    Args:
        cutter: `Cutter`.
        channels_first: bool.
        fill_gaps: bool. Whether an image that does not decode is replaced by its
            neighbour, or left out.
        report: Function of the shard, the key and the reason, called for each image
            that does not decode.
        num_threads: int.
    """

    def __init__(self, cutter, channels_first, fill_gaps, report, num_threads=None):
        self._cutter = cutter
        self._channels_first = channels_first
        self._fill_gaps = fill_gaps
        self._report = report
        self._num_threads = num_threads or num_processors()

    def decoded(self, batches):
        """Decodes batches and keeps their order.

        Args:
            batches: Iterable of lists of `Pair` and arrays `(pairs, NUM_DRAWS)`.

        Yields:
            tuple: The pairs whose images decode, their draws, and the images.
        """
        ahead = collections.deque()
        with futures.ThreadPoolExecutor(self._num_threads, "decode") as threads:
            try:
                for pairs, draws in batches:
                    ahead.append(self._start(threads, pairs, draws))
                    # Twice as many tasks as threads keep all threads busy.
                    tasks = sum(len(each[-1]) for each in ahead)
                    if len(ahead) > 1 and tasks > 2 * self._num_threads:
                        yield self._finish(*ahead.popleft())
                while ahead:
                    yield self._finish(*ahead.popleft())
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, threads, pairs, draws):
        height, width = self._cutter.image_size
        shape = (3, height, width) if self._channels_first else (height, width, 3)
        images = _aligned((len(pairs), *shape))
        tasks = [
            threads.submit(self._fill, images, pairs, draws, first)
            for first in range(0, len(pairs), GROUP)
        ]
        return pairs, draws, images, tasks

    def _fill(self, images, pairs, draws, first):
        """Decodes a group; returns the places of the images that do not decode."""
        lost = []
        for place in range(first, min(first + GROUP, len(pairs))):
            try:
                image = self._cutter(read_image(pairs[place].image), draws[place])
            except UnreadableImage as error:
                self._report(pairs[place].shard, pairs[place].key, str(error))
                lost.append(place)
                continue
            if self._channels_first:
                image = image.transpose(2, 0, 1)
            images[place] = image
        return lost

    def _finish(self, pairs, draws, images, tasks):
        lost = [place for task in tasks for place in task.result()]
        if not lost:
            return pairs, draws, images
        kept = np.setdiff1d(np.arange(len(pairs)), lost)
        if self._fill_gaps:
            if not len(kept):
                raise ValueError(
                    "No image of a batch decodes. Received: the samples "
                    f"{[pair.key for pair in pairs[:10]]} of {pairs[0].shard}"
                )
            before = np.searchsorted(kept, np.arange(len(pairs)), side="right") - 1
            kept = kept[np.maximum(before, 0)]
        return [pairs[place] for place in kept], draws[kept], images[kept]


def _aligned(shape):
    """An aligned array, which TensorFlow uses without a copy."""
    size = math.prod(shape)
    memory = np.empty(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].reshape(shape)


def num_processors():
    """The number of processors that this process may use."""
    # Only Linux knows the processors that are assigned to a process.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_image(image):
    """The bytes of a `Pair`'s image, which may be the name of a file.

    Raises:
        UnreadableImage: If the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        with files.open_file(image) as file:
            content = file.read(MAX_BYTES + 1)
    # A ValueError means that no file can have such a name.
    except (OSError, ValueError) as error:
        raise UnreadableImage("the image file cannot be read") from error
    if len(content) > MAX_BYTES:
        raise UnreadableImage("file too large")
    return content


def draws_of(seed, epoch, step, batch_size):
    """The random numbers of the crops, backgrounds and captions of a batch.

    Args:
        seed: int.
        epoch: int.
        step: int.
        batch_size: int. The global batch size.

    Returns:
        float64 array `(batch_size, NUM_DRAWS + 2)` from 0 to 1. The last two columns
        are for captions.
    """
    key = np.array([seed, epoch << 32 | step], dtype="uint64")
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.random((batch_size, NUM_DRAWS + 2))
