"""A stream of full batches from arrays in memory."""

import warnings

import keras
import numpy as np

from keras_cluster_mask.batches import as_array
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.training.input_rules import LONELY
from keras_cluster_mask.training.inputs import holds_strings


class ArrayBatches:
    """Full batches from arrays, as an endless stream of epochs.

    Keras also trains on the last partial batch, although the loss depends on the batch
    size, and draws an order that a resumed run cannot repeat. Here the order of an
    epoch depends only on a seed. The last partial batch is dropped after the shuffle,
    so each epoch leaves out different pairs.

    Args:
        arrays: Dictionary of arrays with one row per pair.
        batch_size: Integer. If there are fewer pairs, they form one batch.
        shuffle: Boolean.

    Attributes:
        start: Integer, the batch at which a pass starts.
        shuffle_seed: Integer, the random seed of the order of each epoch.
    """

    training = True

    def __init__(self, arrays, batch_size, shuffle=True):
        if not isinstance(shuffle, bool):
            raise ValueError(
                f"`shuffle` must be True or False. Received: shuffle={shuffle!r}"
            )
        names = {name: holds_strings(values) for name, values in arrays.items()}
        self._arrays = {
            name: as_array(values) for name, values in arrays.items() if not names[name]
        }
        self._shuffle = shuffle
        self.pairs = len(self._arrays["token_ids"])
        self.batch_size = min(batch_size, self.pairs)
        if self.batch_size < 2:
            raise ValueError(
                f"{LONELY} Received: batch_size={batch_size}, arrays of {self.pairs} "
                "pairs"
            )
        rest = self.pairs % self.batch_size
        if rest:
            which = "others in each epoch" if shuffle else "the same in each epoch"
            warnings.warn(
                f"{rest} of {self.pairs} pairs fill no batch of {batch_size} and are "
                f"left out, {which}.",
                stacklevel=2,
            )
        # `keras.utils.set_random_seed` seeds NumPy's global generator. All processes
        # use the seed of the main process, which saves it.
        self.shuffle_seed = all_gather_object(int(np.random.randint(2**31)))[0]
        self.start = 0
        # The key of the current epoch, and the order of its pairs.
        self._order = None, None

    @property
    def stream(self):
        """This stream. A `tf.data.Dataset` made from it has the same attribute."""
        return self

    @property
    def element_spec(self):
        """The shape and dtype of each entry of a batch, by name."""
        return {
            name: keras.InputSpec(
                dtype=str(array.dtype), shape=(self.batch_size, *array.shape[1:])
            )
            for name, array in self._arrays.items()
        }

    @property
    def description(self):
        """The settings that must be the same when a run is resumed."""
        return {
            "data.pairs": self.pairs,
            "data.batch_size": self.batch_size,
            "data.shuffle": self._shuffle,
        }

    def __len__(self):
        return self.pairs // self.batch_size

    @property
    def steps_per_epoch(self):
        """The number of full batches in each epoch."""
        return len(self)

    def __iter__(self):
        batch = self.start
        while True:
            rows = self._rows(batch)
            yield {name: array[rows] for name, array in self._arrays.items()}
            batch += 1

    def as_dataset(self):
        """Returns the batches as a `tf.data.Dataset`, which also starts at `start`."""
        from keras_cluster_mask.data.tensorflow import as_dataset

        return as_dataset(self)

    def _rows(self, batch):
        epoch, step = divmod(batch, len(self))
        first = step * self.batch_size
        if not self._shuffle:
            return np.arange(first, first + self.batch_size)
        if self._order[0] != (self.shuffle_seed, epoch):
            rng = np.random.default_rng([self.shuffle_seed, epoch])
            self._order = (self.shuffle_seed, epoch), rng.permutation(self.pairs)
        return self._order[1][first : first + self.batch_size]
