"""Where a pipeline is, and from where it goes on."""

import collections
import threading

# More batches than any pipeline reads ahead.
REMEMBERED = 256


class Position:
    """The place in an endless sequence of epochs that a pipeline reads next.

    Args:
        seed: int. The seed of the dataset.

    Attributes:
        seed: int. The seed of the dataset.
        epoch: int. The epoch that the next pass over the dataset is; each is in an
            order of its own, which depends on the seed and this number alone.
        samples: int. How many samples of it the next pass leaves out at its start.
    """

    def __init__(self, seed):
        self.seed = seed
        self._lock = threading.Lock()
        self._pass = 0
        self._reached = collections.OrderedDict()
        self.epoch = self.samples = 0

    def seek(self, epoch, samples=0):
        """Makes the next pass over the dataset start at a place.

        Args:
            epoch: int.
            samples: int, as told by `reached`.
        """
        with self._lock:
            self.epoch, self.samples = epoch, samples

    def start_pass(self, number):
        """Takes the epoch and the samples to leave out of the pass that starts."""
        with self._lock:
            self._pass = number
            self._reached.clear()
            place = self.epoch, self.samples
            self.epoch, self.samples = self.epoch + 1, 0
            return place

    def report(self, number, batch, samples, keys):
        """Remembers how many samples of its epoch a pass had read after a batch."""
        with self._lock:
            if number == self._pass:
                self._reached[batch] = samples, keys
                while len(self._reached) > REMEMBERED:
                    self._reached.popitem(last=False)

    def reached(self, batch):
        """How many samples of the epoch were read when a batch of the pass was full.

        Args:
            batch: int, the batch's number in the current pass, from 0.
        """
        with self._lock:
            return self._reached[batch][0]

    def keys(self, batch):
        """The keys of the samples of a batch of the current pass, as a list of str."""
        with self._lock:
            _, keys = self._reached.get(batch, (0, ()))
        return [key.decode("utf-8", "surrogateescape") for key in keys]
