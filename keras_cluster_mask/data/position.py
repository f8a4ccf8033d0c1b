"""The position of a pipeline, for resuming."""

import collections
import threading

# More batches than a pipeline reads ahead.
REMEMBERED = 256


class Position:
    """The position of a pipeline: the epoch and the step that it reads next.

    The last partial batch of an epoch is carried over to the next epoch, so the number
    of steps may differ by one between epochs. The batch at a position depends only on
    the seed of the dataset and on the position, not on what was read before.

    Args:
        seed: int. The seed of the dataset.
        batch_size: int. The global batch size.
        count_pairs: Function without arguments that returns the number of pairs in the
            shards. Called for the number of steps of an epoch, unless an epoch has been
            read to its end.
        opens_next: bool. Whether the last partial batch of an epoch is carried over to
            the next, or is the last batch of its own.

    Attributes:
        seed: int. The seed of the dataset.
        batch_size: int. The global batch size.
        pairs: int. The number of pairs in an epoch, or `None` while it is unknown.
        epoch: int. The epoch of the next pass over the dataset; each epoch has its own
            order.
        step: int. The number of steps that the next pass skips at its start.
        trained: `(epoch, step)`. The position of training, whatever else reads the
            dataset; updated by `ContrastiveModel.fit`.
    """

    def __init__(self, seed, batch_size, count_pairs, opens_next=True):
        self.seed = seed
        self.batch_size = batch_size
        self.pairs = None
        self.epoch = self.step = 0
        self.trained = 0, 0
        self._count_pairs = count_pairs
        self._opens_next = opens_next
        self._lock = threading.Lock()
        self._keys = collections.OrderedDict()

    # === For training ===

    def seek(self, epoch, step=0):
        """Makes the next pass over the dataset start at a position.

        Args:
            epoch: int.
            step: int. At most the number of steps of the epoch.
        """
        with self._lock:
            self.epoch, self.step = epoch, step

    def steps_per_epoch(self):
        """The full batches of an epoch, or all batches if each epoch is its own."""
        if self.pairs is None:
            self.pairs = self._count_pairs()
        if not self._opens_next:
            return self.steps(0)
        return self.pairs // self.batch_size

    def steps(self, epoch):
        """The number of steps of an epoch, or `None` while it is unknown."""
        if self.pairs is None:
            return None
        if not self._opens_next:
            return -(-self.pairs // self.batch_size)
        return self._first(epoch + 1) - self._first(epoch)

    def before(self, epoch, step):
        """The total number of steps before a position; see `after`."""
        if not epoch:
            return step
        return step + (
            self._first(epoch) if self._opens_next else epoch * self.steps(0)
        )

    def after(self, steps):
        """The position, `(epoch, step)`, after a total number of steps.

        Args:
            steps: int. Counted from the start of the first epoch.
        """
        if self.pairs is None:
            return 0, steps
        if not self._opens_next:
            return divmod(steps, self.steps(0))
        epoch = -(-(steps + 1) * self.batch_size // self.pairs) - 1
        return epoch, steps - self._first(epoch)

    def keys(self, epoch, step):
        """The keys of the samples of a recent batch, as a list of str.

        Args:
            epoch: int.
            step: int. The number of the batch in the epoch, from 0.
        """
        with self._lock:
            keys = self._keys.get((epoch, step), ())
        return [key.decode("utf-8", "surrogateescape") for key in keys]

    def _first(self, epoch):
        """The number of the first batch of an epoch, over all epochs."""
        return epoch * self.pairs // self.batch_size

    # === For the pipeline ===

    def start_pass(self):
        """Advances to the next epoch; returns the epoch and step of this pass."""
        with self._lock:
            place = self.epoch, self.step
            self.epoch, self.step = self.epoch + 1, 0
        return place

    def opening(self, epoch):
        """The number of pairs that an epoch takes over from the previous one."""
        if not epoch or not self._opens_next:
            return 0
        if self.pairs is None:
            self.pairs = self._count_pairs()
        return epoch * self.pairs % self.batch_size

    def report_pairs(self, count):
        """Stores the number of pairs of an epoch that was read to its end."""
        if self.pairs is None:
            self.pairs = count

    def report_batch(self, epoch, step, keys):
        """Stores the keys of a batch."""
        with self._lock:
            self._keys[epoch, step] = keys
            while len(self._keys) > REMEMBERED:
                self._keys.popitem(last=False)
