"""The order in which training reads samples, the same in every process."""

import bisect
import hashlib
import threading

import grain
import numpy as np

# The rounds of grain's shuffle, a cipher on the numbers. grain also uses four.
ROUNDS = 4
# Only one thread at a time draws an epoch, because the numbers may be many.
_lock = threading.RLock()


class Order:
    """An endless sequence of samples, computed on demand: `order[position]`.

    A sample is a pair of integers: the number of its source, and its number there. Each
    epoch has its own permutation. Only the numbers that `sampling` draws are stored.

    Args:
        num_samples: Integer.
        seed: Integer.
        block_size: Integer. Runs of this many neighbors stay together, for storage on
            which small reads are slow. Runs are shuffled, and begin at different
            samples in each epoch. 1 shuffles single samples.
        sampling: Function of the epoch that returns an array of the sample numbers of
            the epoch, with the mean length of these arrays as the attribute
            `mean_length`; see `Sampling.of_index`. Defaults to `None`: each sample
            once.
        source: Integer. The number of the source. Several sources with the same seed
            are shuffled differently.
    """

    def __init__(self, num_samples, seed, block_size=1, sampling=None, source=0):
        self.num_samples = num_samples
        self.block_size = block_size
        self._seeds = seed, source
        self._sampling = sampling
        # The position of the first sample of each epoch, for the known epochs.
        self._starts = [0]
        # The results of `_epoch` for the last two epochs.
        self._known = {}

    def __len__(self):
        # grain treats this length as endless.
        return 2**62

    def __getitem__(self, position):
        epoch, place = self.place(position)
        chosen, length, seed, shift = self._epoch(epoch)
        run, offset = divmod(place, self.block_size)
        last = length // self.block_size - 1
        # Samples after the last full run stay at the end of the epoch.
        if run <= last:
            run = grain.experimental.index_shuffle(run, last, seed, ROUNDS)
            place = run * self.block_size + offset
        number = (place + shift) % length
        return self._seeds[1], int(number if chosen is None else chosen[number])

    def length(self, epoch):
        """Returns the number of samples in an epoch."""
        return self._epoch(epoch)[1]

    @property
    def mean_length(self):
        """The mean number of samples in an epoch."""
        return self._sampling.mean_length if self._sampling else self.num_samples

    def digest(self):
        """Returns a hash of the samples of the first epoch, or `None` for all."""
        if self._sampling is None:
            return None
        chosen = self._epoch(0)[0].astype("<i8")
        return hashlib.blake2b(chosen, digest_size=8).hexdigest()

    def place(self, position):
        """Returns the epoch of a position, and the position within the epoch."""
        if self._sampling is None:
            return divmod(position, self.num_samples)
        starts = self._starts
        with _lock:
            while starts[-1] <= position:
                starts.append(starts[-1] + self.length(len(starts) - 1))
        epoch = bisect.bisect_right(starts, position) - 1
        return epoch, position - starts[epoch]

    def _epoch(self, epoch):
        """Returns the chosen numbers or None, the length, and the seed and shift."""
        with _lock:
            if epoch in self._known:
                return self._known[epoch]
            chosen, length = None, self.num_samples
            if self._sampling is not None:
                chosen = self._sampling(epoch)
                length = len(chosen)
            sequence = np.random.SeedSequence([*self._seeds, epoch])
            seed, shift = map(int, sequence.generate_state(2))
            # By chance, an epoch may have no samples.
            shift = shift % max(length, 1) if self.block_size > 1 else 0
            self._known = dict([*self._known.items()][-1:])
            self._known[epoch] = chosen, length, seed, shift
            return self._known[epoch]


class Mix(Order):
    """Mixes several orders by weight.

    Each source is repeated endlessly, in its own order. An epoch has as many samples
    as all sources together.

    Args:
        orders: List of `Order`.
        weights: List of floats, in any unit.
    """

    def __init__(self, orders, weights):
        super().__init__(sum(order.num_samples for order in orders), seed=0)
        sources = [grain.MapDataset.source(order) for order in orders]
        self._mixed = grain.MapDataset.mix(sources, weights)

    def __getitem__(self, position):
        return self._mixed[position]
