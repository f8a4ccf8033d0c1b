"""Where a pipeline is, and from where it goes on."""

import collections
import threading

# More batches than any pipeline reads ahead.
REMEMBERED = 256

READ, READ_AGAIN, KEPT = range(3)


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
        # By the number of a pass: those that were given up may still be read ahead of.
        self._starts, self._read = {}, {}
        self._keys = collections.OrderedDict()
        self._left_over = (None, None)

    # === For those who train ===

    def seek(self, epoch, step=0):
        """Makes the next pass over the dataset start at a place.

        Args:
            epoch: int.
            step: int, at most the number of steps of the epoch.
        """
        with self._lock:
            self.epoch, self.step = epoch, step

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

    def start_pass(self, number):
        """What a pass reads, one part of an epoch after another.

        Args:
            number: int, the number of the pass.

        Yields:
            tuple: the epoch, how many of its samples to leave out, and the way to get
            the others: `READ` or `READ_AGAIN` from the shards, or `KEPT` in
            `left_over`.
        """
        with self._lock:
            epoch, step = self.epoch, self.step
            self.epoch, self.step = epoch + 1, 0
            self._starts[number] = epoch, step
            self._read[number] = 0
        open_samples = 0
        if epoch and self._opens_next:
            if self.pairs is None:
                self.pairs = self._count_pairs()
            open_samples = epoch * self.pairs % self.batch_size
        skip = step * self.batch_size - open_samples
        if skip < 0:
            kept = self._left_over[0] == epoch - 1
            yield epoch - 1, self.pairs + skip, KEPT if kept else READ_AGAIN
        yield epoch, max(skip, 0), READ

    def report_read(self, number, count):
        """Counts pairs that a pass has read, those it leaves out as well."""
        with self._lock:
            if number in self._read:
                self._read[number] += count

    def report_end(self, number):
        """Takes note that a pass has read all that there is."""
        with self._lock:
            if self.pairs is None and number in self._read:
                self.pairs = self._read[number]

    def keep(self, number, columns):
        """Keeps what is left of the epoch of a pass for the start of the next."""
        with self._lock:
            self._left_over = self._starts[number][0], columns

    def left_over(self):
        """The columns that were kept."""
        with self._lock:
            return self._left_over[1]

    def report_batch(self, number, batch, keys):
        """Remembers the keys of a batch of a pass."""
        with self._lock:
            epoch, step = self._starts[number]
            self._keys[epoch, step + batch] = keys
            while len(self._keys) > REMEMBERED:
                self._keys.popitem(last=False)
