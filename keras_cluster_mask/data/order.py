"""The order in which training reads samples, the same in every process."""

import bisect
import functools
import hashlib
import itertools
import threading

import grain
import numpy as np

# Of grain's shuffle, a cipher on the numbers; grain itself takes as many.
ROUNDS = 4
# One thread at a time asks a sampler: what it returns may be large.
_lock = threading.RLock()


class Order:
    """An endless sequence of sample numbers: `order[position]`, computed when asked.

    Each epoch is a permutation of its own. Nothing is stored but the numbers that a
    sampler chooses.

    Args:
        num_samples: int.
        seed: int.
        block_size: int. Runs of so many neighbors stay together, for storage in which
            many small reads are slow; the runs are shuffled and start elsewhere in each
            epoch. 1 shuffles single samples.
        sampling: Function of the number of samples and the epoch that returns an array
            of the numbers of the samples of the epoch, some of which may be left out or
            repeated; it must return the same in all processes. Defaults to `None`: each
            sample once.
        source: int. Orders of several sources with one seed need different numbers, or
            the samples of equal numbers would meet.
    """

    def __init__(self, num_samples, seed, block_size=1, sampling=None, source=0):
        self.num_samples = num_samples
        self.block_size = block_size
        self._seeds = seed, source
        self._sampling = sampling
        # The position of the first sample of each epoch, as far as it is known.
        self._starts = [0]
        # What `_epoch` found for the last two epochs.
        self._known = {}

    def __len__(self):
        # grain takes it as endless.
        return 2**62

    def __getitem__(self, position):
        epoch, place = self.place(position)
        chosen, length, seed, shift = self._epoch(epoch)
        run, offset = divmod(place, self.block_size)
        last = length // self.block_size - 1
        # Samples after the last whole run come last.
        if run <= last:
            run = grain.experimental.index_shuffle(run, last, seed, ROUNDS)
            place = run * self.block_size + offset
        number = (place + shift) % length
        return int(number if chosen is None else chosen[number])

    def length(self, epoch):
        """The number of samples in an epoch."""
        return self._epoch(epoch)[1]

    @property
    def mean_length(self):
        """The mean number of samples in an epoch; of the first, if it is not known."""
        mean = getattr(self._sampling, "mean_length", None)
        return self.length(0) if mean is None else mean

    def digest(self):
        """A str that differs between samplers, from the numbers of the first epoch."""
        chosen = np.ascontiguousarray(self._epoch(0)[0], "<i8")
        return hashlib.blake2b(chosen, digest_size=8).hexdigest()

    def place(self, position):
        """The epoch of a position, and the place in the epoch."""
        if self._sampling is None:
            return divmod(position, self.num_samples)
        starts = self._starts
        with _lock:
            while starts[-1] <= position:
                starts.append(starts[-1] + self.length(len(starts) - 1))
        epoch = bisect.bisect_right(starts, position) - 1
        return epoch, position - starts[epoch]

    def _epoch(self, epoch):
        """The chosen numbers or None, how many, and the seed and shift of the runs."""
        with _lock:
            if epoch not in self._known:
                self._known = dict([*self._known.items()][-1:])
                self._known[epoch] = self._find(epoch)
            return self._known[epoch]

    def _find(self, epoch):
        """What `_epoch` returns, computed."""
        chosen, length = None, self.num_samples
        if self._sampling is not None:
            chosen = np.asarray(self._sampling(self.num_samples, epoch))
            length = chosen.size
            is_valid = chosen.ndim == 1 and length and chosen.dtype.kind in "iu"
            if not is_valid or chosen.min() < 0 or chosen.max() >= self.num_samples:
                raise ValueError(
                    "`sampling` must return an array of the numbers of samples, ints "
                    f"from 0 to {self.num_samples - 1}. Received: {chosen!r} in epoch "
                    f"{epoch}"
                )
        seed, shift = np.random.SeedSequence([*self._seeds, epoch]).generate_state(2)
        shift = int(shift) % length if self.block_size > 1 else 0
        return chosen, length, int(seed), shift


class Mix:
    """Several orders, mixed by weight: `mix[position]` as for `Order`.

    Each source is read in its own order, again and again. An epoch has as many samples
    as all sources together.

    Args:
        orders: list of `Order`.
        weights: list of float, in any unit.
    """

    def __init__(self, orders, weights):
        firsts = itertools.accumulate((o.num_samples for o in orders[:-1]), initial=0)
        self.num_samples = sum(order.num_samples for order in orders)
        self.block_size = max(order.block_size for order in orders)
        self._mixed = grain.MapDataset.mix(
            [
                grain.MapDataset.source(order).map(functools.partial(_shifted, first))
                for order, first in zip(orders, firsts)
            ],
            weights,
        )

    def __getitem__(self, position):
        return self._mixed[position]

    def place(self, position):
        """The epoch of a position, and the place in the epoch."""
        return divmod(position, self.num_samples)

    def length(self, epoch):
        """The number of samples in an epoch."""
        return self.num_samples

    @property
    def mean_length(self):
        """The mean number of samples in an epoch."""
        return self.num_samples


def _shifted(first, number):
    return first + number
