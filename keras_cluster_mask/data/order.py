"""The order in which training reads samples, computed on demand for any position."""

import functools
import math

import numpy as np

# The rounds of the cipher that shuffles, the least bits of its halves, and its two odd
# factors: each bit of a product depends on all lower bits of the other factor.
ROUNDS = 6
MIN_BITS = 4
FACTORS = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
BITS = 2**64 - 1


class Order:
    """An endless sequence of samples, computed on demand: `order[position]`.

    Samples are numbered over all sources. Each epoch of a source has its own
    permutation. Several sources are mixed by their weights, and each is repeated
    endlessly.

    Args:
        lengths: List of integers, the number of samples of each source.
        weights: List of floats, in any unit.
        seed: Integer.
        block_size: Integer. Runs of this many neighbors stay together, for storage on
            which small reads are slow. Runs are shuffled, and begin at different
            samples in each epoch. 1 shuffles single samples.
    """

    def __init__(self, lengths, weights, seed, block_size=1):
        self.lengths, self.weights = lengths, weights
        self.seed, self.block_size = seed, block_size
        # Of the samples that are not of an earlier source.
        self._shares = [
            weight / sum(weights[index:]) for index, weight in enumerate(weights)
        ]

    def __getitem__(self, position):
        # A source has `ceil(n * share)` of the first n samples, and the sources after
        # it have the others, so each share is exact up to one sample.
        first = 0
        for source, share in enumerate(self._shares):
            length, count = self.lengths[source], math.ceil(position * share)
            if math.ceil((position + 1) * share) > count:
                break
            position, first = position - count, first + length
        epoch, place = divmod(count, length)
        *keys, shift = _numbers(self.seed, source, epoch)
        run, offset = divmod(place, self.block_size)
        runs = length // self.block_size
        # Samples after the last full run stay at the end of the epoch.
        if run < runs:
            place = shuffled(run, runs, keys) * self.block_size + offset
        return first + (place + (shift if self.block_size > 1 else 0)) % length


@functools.lru_cache(64)
def _numbers(seed, source, epoch):
    """Draws the keys of the cipher and a shift for an epoch of a source."""
    sequence = np.random.SeedSequence([seed, source, epoch])
    return sequence.generate_state(ROUNDS + 1, "uint64").tolist()


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
