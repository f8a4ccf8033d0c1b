"""From pairs to batches of arrays, decoded in threads while a model trains."""

import collections
import math
import os
from concurrent import futures

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.data.pictures import NUM_DRAWS, UnreadablePicture
from keras_cluster_mask.data.sources.webdataset import MAX_BYTES

# So many pictures are a task for a thread.
GROUP = 8
ALIGNMENT = 64


class Decoder:
    """Decodes batches, several ahead of the one that is asked for.

    Args:
        cutter: `Cutter`.
        channels_first: bool.
        fill_gaps: bool. Whether a picture that does not decode is replaced by its
            neighbour, or left out.
        report: function that is told of the shard, the key and the reason of what does
            not decode.
        num_threads: int.
    """

    def __init__(self, cutter, channels_first, fill_gaps, report, num_threads=None):
        self._cutter = cutter
        self._channels_first = channels_first
        self._fill_gaps = fill_gaps
        self._report = report
        self._num_threads = num_threads or num_processors()

    def decoded(self, batches):
        """Decodes batches in their order.

        Args:
            batches: iterable of lists of `Pair` and arrays `(pairs, NUM_DRAWS)`.

        Yields:
            tuple: the pairs whose pictures are there, their draws, and the pictures.
        """
        ahead = collections.deque()
        with futures.ThreadPoolExecutor(self._num_threads, "decode") as threads:
            try:
                for pairs, draws in batches:
                    ahead.append(self._start(threads, pairs, draws))
                    # Twice as many tasks as threads, so that none waits for work.
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
        pictures = _aligned((len(pairs), *shape))
        tasks = [
            threads.submit(self._fill, pictures, pairs, draws, first)
            for first in range(0, len(pairs), GROUP)
        ]
        return pairs, draws, pictures, tasks

    def _fill(self, pictures, pairs, draws, first):
        """Decodes a group; returns the places of those that cannot be."""
        lost = []
        for place in range(first, min(first + GROUP, len(pairs))):
            try:
                picture = self._cutter(read_image(pairs[place].image), draws[place])
            except UnreadablePicture as error:
                self._report(pairs[place].shard, pairs[place].key, str(error))
                lost.append(place)
                continue
            if self._channels_first:
                picture = picture.transpose(2, 0, 1)
            pictures[place] = picture
        return lost

    def _finish(self, pairs, draws, pictures, tasks):
        lost = [place for task in tasks for place in task.result()]
        if not lost:
            return pairs, draws, pictures
        kept = np.setdiff1d(np.arange(len(pairs)), lost)
        if self._fill_gaps:
            if not len(kept):
                raise ValueError(
                    "None of the pictures of a batch decodes. Received: the samples "
                    f"{[pair.key for pair in pairs[:10]]} of {pairs[0].shard}"
                )
            before = np.searchsorted(kept, np.arange(len(pairs)), side="right") - 1
            kept = kept[np.maximum(before, 0)]
        return [pairs[place] for place in kept], draws[kept], pictures[kept]


def _aligned(shape):
    """An array that TensorFlow takes as it is: others it copies."""
    size = math.prod(shape)
    memory = np.empty(size + ALIGNMENT, "uint8")
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].reshape(shape)


def num_processors():
    """How many processors this process may use."""
    # Linux alone can say which are set aside for it.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_image(image):
    """The bytes of a `Pair`'s image, which may be the name of a file.

    Raises:
        UnreadablePicture: if the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        with files.open_file(image) as file:
            content = file.read(MAX_BYTES + 1)
    # A ValueError says that no file can have such a name.
    except (OSError, ValueError) as error:
        raise UnreadablePicture("the image file cannot be read") from error
    if len(content) > MAX_BYTES:
        raise UnreadablePicture("file too large")
    return content


def draws_of(seed, epoch, step, batch_size):
    """The numbers that the crops and backgrounds of a batch depend on.

    Args:
        seed: int.
        epoch: int.
        step: int.
        batch_size: int, of all processes together.

    Returns:
        float64 array `(batch_size, NUM_DRAWS + 2)` from 0 to 1; the last two are for
        captions.
    """
    key = np.array([seed, epoch << 32 | step], dtype="uint64")
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.random((batch_size, NUM_DRAWS + 2))
