"""Where a pipeline is, and from where it goes on."""

import collections
import threading

# More batches than any pipeline reads ahead.
REMEMBERED = 256


class Position:
    """The place in an endless sequence of epochs that a pipeline reads next.

    The epochs lie end to end, and batches are cut off the whole: what is left of an
    epoch, less than a batch, opens the next. So an epoch has now and then a step more
    than another, and a place is an epoch and the steps done of it. What lies there
    depends on the dataset's seed and on the place alone, not on what was read before.

    Args:
        seed: int. The seed of the dataset.
        batch_size: int. The samples in a batch, of all processes together.
        count_pairs: function without arguments that returns the number of pairs in the
            shards. Called when the start of a later epoch is asked for and no epoch
            has been read to its end.
        opens_next: bool. Whether what is left of an epoch opens the next, or ends its
            own.

    Attributes:
        seed: int. The seed of the dataset.
        batch_size: int. The samples in a batch, of all processes together.
        pairs: int. The number of pairs in an epoch, or `None` as long as it is unknown.
        epoch: int. The epoch that the next pass over the dataset is; each is in an
            order of its own.
        step: int. How many steps of it the next pass leaves out at its start.
        trained: `(epoch, step)`. The place that training has come to, whatever else has
            read the dataset; kept by `ContrastiveModel.fit`.
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

    # === For those who train ===

    def seek(self, epoch, step=0):
        """Makes the next pass over the dataset start at a place.

        Args:
            epoch: int.
            step: int, at most the number of steps of the epoch.
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
        """The number of steps of an epoch, or `None` as long as it is unknown."""
        if self.pairs is None:
            return None
        if not self._opens_next:
            return -(-self.pairs // self.batch_size)
        return self._first(epoch + 1) - self._first(epoch)

    def before(self, epoch, step):
        """How many steps there are in all before a place; see `after`."""
        if not epoch:
            return step
        return step + (
            self._first(epoch) if self._opens_next else epoch * self.steps(0)
        )

    def after(self, steps):
        """The place, `(epoch, step)`, after so many steps in all.

        Args:
            steps: int, counted from the start of the first epoch.
        """
        if self.pairs is None:
            return 0, steps
        if not self._opens_next:
            return divmod(steps, self.steps(0))
        epoch = -(-(steps + 1) * self.batch_size // self.pairs) - 1
        return epoch, steps - self._first(epoch)

    def keys(self, epoch, step):
        """The keys of the samples of a batch, if it was read lately, as a list of str.

        Args:
            epoch: int.
            step: int, the batch's number in the epoch, from 0.
        """
        with self._lock:
            keys = self._keys.get((epoch, step), ())
        return [key.decode("utf-8", "surrogateescape") for key in keys]

    def _first(self, epoch):
        """The number of the first batch of an epoch in the endless sequence."""
        return epoch * self.pairs // self.batch_size

    # === For the pipeline ===

    def start_pass(self):
        """Moves on to the next epoch; returns the epoch and step of this pass."""
        with self._lock:
            place = self.epoch, self.step
            self.epoch, self.step = self.epoch + 1, 0
        return place

    def opening(self, epoch):
        """How many pairs, left of the epoch before, an epoch starts with."""
        if not epoch or not self._opens_next:
            return 0
        if self.pairs is None:
            self.pairs = self._count_pairs()
        return epoch * self.pairs % self.batch_size

    def report_pairs(self, count):
        """Takes note of how many pairs an epoch that was read to its end held."""
        if self.pairs is None:
            self.pairs = count

    def report_batch(self, epoch, step, keys):
        """Remembers the keys of a batch."""
        with self._lock:
            self._keys[epoch, step] = keys
            while len(self._keys) > REMEMBERED:
                self._keys.popitem(last=False)
