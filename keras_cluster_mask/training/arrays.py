"""Training on arrays: full batches, in an order that a resumed run repeats."""

import zlib

import keras
import numpy as np

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.distribution.replicas import process_index_and_count
from keras_cluster_mask.stream import COMPARED, Stream


class ArrayBatches(Stream):
    """Full batches from arrays, as an endless stream of epochs.

    Keras also trains on the last partial batch, although the loss depends on the batch
    size, and draws an order that a resumed run cannot repeat. Here the order of an
    epoch depends only on a seed. Pairs that fill no batch are carried over to the next
    epoch. Each process has all pairs, and takes its own rows of every batch.

    Args:
        arrays: Dictionary of arrays with one row per pair.
        batch_size: Integer, the number of pairs in a batch of all processes together.
            If there are fewer pairs, they form one batch.
        shuffle: Boolean.

    Attributes:
        start: Integer, the batch at which a pass starts.
        shuffle_seed: Integer, the random seed of the order of each epoch.
        element_spec: Dictionary with the shape and dtype of each entry of a batch.
        description: The settings that must be the same when a run is resumed.
        steps_per_epoch: Integer, the number of full batches in each epoch.
    """

    def __init__(self, arrays, batch_size, shuffle=True):
        self._arrays = {name: as_array(values) for name, values in arrays.items()}
        self._shuffle = shuffle
        # Batches of features have labels in place of ids.
        texts = self._arrays.get("token_ids", self._arrays.get("caption_labels"))
        self._pairs = pairs = len(texts)
        self._batch_size = min(batch_size, pairs)
        self.steps_per_epoch = pairs // self._batch_size
        self._process, self._processes = process_index_and_count(training=True)
        if self._batch_size % self._processes:
            raise ValueError(
                "`batch_size` must be a multiple of the number of processes, which "
                f"share each batch. Received: batch_size={batch_size}, {pairs} pairs, "
                f"{self._processes} processes"
            )
        rows = self._batch_size // self._processes
        self.element_spec = {
            name: keras.InputSpec(str(x.dtype), (rows, *x.shape[1:]))
            for name, x in self._arrays.items()
        }
        self.description = {
            "pairs": pairs,
            "arrays": {
                name: _checksum(array)
                for name, array in self._arrays.items()
                # Their data is described; they differ by rounding between machines.
                if name not in ("image_features", "text_features")
            },
            "batch_size": self._batch_size,
            "shuffle": shuffle,
        }
        # `keras.utils.set_random_seed` seeds NumPy's global generator. All processes
        # use the seed of the main process, which saves it.
        self.shuffle_seed = all_gather_object(int(np.random.randint(2**31)))[0]

    def __iter__(self):
        epoch, place = divmod(self.start * self._batch_size, self._pairs)
        ahead = self.draw(epoch)[:, place:]
        while True:
            if ahead.shape[1] < self._batch_size:
                epoch += 1
                ahead = np.hstack([ahead, self.draw(epoch)])
            batch, ahead = np.split(ahead, [self._batch_size], axis=1)
            # In the order of processes, as without any, so masks are the same.
            yield self.batch(*np.hsplit(batch, self._processes)[self._process])

    def draw(self, epoch):
        """Returns the arguments of `batch` for all pairs of an epoch, in their order.

        Args:
            epoch: Integer.
        """
        order = np.arange(self._pairs)
        if self._shuffle:
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            order = rng.permutation(self._pairs)
        return order[None]

    def batch(self, rows):
        """Returns the batch of some `(batch,)` rows of the arrays."""
        return {name: array[rows] for name, array in self._arrays.items()}


def _checksum(array):
    """Returns a hash of an array: of all texts and weights, and of some images."""
    step = max(len(array) // COMPARED, 1) if array.ndim > 2 else 1
    return zlib.crc32(array[::step].tobytes())
