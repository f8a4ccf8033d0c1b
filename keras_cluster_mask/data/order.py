"""The order in which training reads samples, computed on demand for any position."""

import bisect
import hashlib
import math
import threading

import numpy as np

# The rounds of the cipher that shuffles, the least bits of its halves, and its two odd
# factors: each bit of a product depends on all lower bits of the other factor. After
# four rounds, places whose right halves are equal would still be correlated.
ROUNDS = 6
MIN_BITS = 4
FACTORS = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
BITS = 2**64 - 1
# Only one thread at a time draws an epoch, because the numbers may be many.
_drawing = threading.RLock()


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

    Attributes:
        mean_length: Number. The mean number of samples in an epoch.
    """

    def __init__(self, num_samples, seed, block_size=1, sampling=None, source=0):
        self.num_samples = num_samples
        self.block_size = block_size
        self._seeds = seed, source
        self._sampling = sampling
        self.mean_length = getattr(sampling, "mean_length", num_samples)
        # The position of the first sample of each epoch, for the known epochs.
        self._starts = [0]
        # The results of `_epoch` for the last two epochs.
        self._known = {}

    def __getitem__(self, position):
        epoch, place = self.place(position)
        chosen, length, keys, shift = self._epoch(epoch)
        run, offset = divmod(place, self.block_size)
        runs = length // self.block_size
        # Samples after the last full run stay at the end of the epoch.
        if run < runs:
            place = shuffled(run, runs, keys) * self.block_size + offset
        number = (place + shift) % length
        return self._seeds[1], int(chosen[number])

    def draw(self, epoch, count, generator):
        """Draws up to `count` different samples of an epoch, as a list."""
        chosen, length, *_ = self._epoch(epoch)
        numbers = generator.choice(length, min(count, length), replace=False)
        return [(self._seeds[1], int(chosen[number])) for number in numbers]

    def length(self, epoch):
        """Returns the number of samples in an epoch."""
        return self._epoch(epoch)[1]

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
        with _drawing:
            while starts[-1] <= position:
                starts.append(starts[-1] + self.length(len(starts) - 1))
        epoch = bisect.bisect_right(starts, position) - 1
        return epoch, position - starts[epoch]

    def _epoch(self, epoch):
        """Returns the chosen numbers, the length, and the keys and shift."""
        with _drawing:
            if epoch in self._known:
                return self._known[epoch]
            chosen = range(self.num_samples)
            if self._sampling is not None:
                chosen = self._sampling(epoch)
            length = len(chosen)
            sequence = np.random.SeedSequence([*self._seeds, epoch])
            *keys, shift = sequence.generate_state(ROUNDS + 1, "uint64").tolist()
            # By chance, an epoch may have no samples.
            shift = shift % max(length, 1) if self.block_size > 1 else 0
            self._known = dict([*self._known.items()][-1:])
            self._known[epoch] = chosen, length, keys, shift
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
        self._orders = orders
        # Of the samples that are not of an earlier source.
        self._shares = [
            weight / sum(weights[index:]) for index, weight in enumerate(weights)
        ]

    def __getitem__(self, position):
        # A source has `ceil(n * share)` of the first n samples, and the sources after
        # it have the others, so each share is exact up to one sample.
        for order, share in zip(self._orders, self._shares):
            count = math.ceil(position * share)
            if math.ceil((position + 1) * share) > count:
                return order[count]
            position -= count


def shuffled(place, size, keys):
    """Returns the place that a permutation of `range(size)` moves a place to.

    The permutation needs no memory. It is a Feistel cipher on the bits of the place,
    which is applied again until the result is below `size`.

    Args:
        place: Integer.
        size: Integer.
        keys: List of integers of 64 bits, one for each round.
    """
    # Ciphers of few bits are not random enough.
    half = max((size.bit_length() + 1) // 2, MIN_BITS)
    while True:
        left, right = place >> half, place & (2**half - 1)
        for key in keys:
            mixed = (right + key) * FACTORS[0] & BITS
            mixed = (mixed ^ mixed >> 32) * FACTORS[1] & BITS
            left, right = right, left ^ mixed >> 64 - half
        place = left << half | right
        if place < size:
            return place
