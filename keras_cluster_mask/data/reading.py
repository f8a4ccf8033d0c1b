"""Which samples each batch holds, and where they are read."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_integer, check_range, is_positive
from keras_cluster_mask.data import files
from keras_cluster_mask.data.index import Indexes, open_index
from keras_cluster_mask.data.order import Mix, Order
from keras_cluster_mask.data.pairs import Pair, PairReader
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.skipped import SkippedSamples

# The largest default block size for object stores and Parquet, and the number of
# blocks that a batch must contain to be well mixed.
BLOCK, RUNS = 64, 16
# The number of samples that are read to check that they have the requested fields.
EXAMPLES = 8
# The number of other samples of the batch that may replace a broken sample.
SUBSTITUTES = 64
# The distance between them, as a fraction of the batch, to reach different shards.
DISTANCE = 0.618


@dataclasses.dataclass
class Reading:
    """Opens a source, and finds the samples of each batch. Picklable and thread-safe.

    Args:
        source: See `image_text_dataset`; also for the arguments below.
        fields: `PairReader`. The fields of a sample that are read.
        batch_size: int. The global batch size.
        training: bool. Whether positions are endless and shuffled.
        seed: int.
        sampling: `Sampling`, or function of the number of samples and the epoch.
        block_size: int. `None` in evaluation.
        process: Pair of ints. The index of this process, and the number of processes.
        num_workers: int.
        index_dir: str or path, or None.
        max_skipped: float.

    Attributes:
        index: `Index`, `ObjectIndex`, or `Indexes` of several sources.
        order: `Order` or `Mix` in training; a range of all samples in evaluation.
        skipped: `SkippedSamples` of the index.
    """

    source: dataclasses.InitVar[Any]
    fields: PairReader
    batch_size: int
    training: bool
    seed: int = 0
    sampling: dataclasses.InitVar[Sampling | Callable | None] = None
    block_size: int | None = None
    process: tuple[int, int] | None = None
    num_workers: int = 0
    index_dir: dataclasses.InitVar[Any] = None
    max_skipped: float = 0.01

    def __post_init__(self, source, sampling, index_dir):
        self.batch_size = check_integer("batch_size", self.batch_size, 1)
        self.seed = check_integer("seed", self.seed, 0)
        self.num_workers = check_integer("num_workers", self.num_workers, 0)
        check_range("max_skipped", self.max_skipped, 0, 1)
        for name, value in (("sampling", sampling), ("block_size", self.block_size)):
            if value is not None and not self.training:
                raise ValueError(
                    f"`{name}` is for training: evaluation reads each sample once, in "
                    f"order. Received: {name}={value!r}, training=False"
                )
        is_sampling = callable(sampling) or isinstance(sampling, Sampling)
        if not (sampling is None or is_sampling):
            raise ValueError(
                "`sampling` must be a `kcm.data.Sampling`, which takes a dict or keys, "
                "or a function of the number of samples and the epoch. "
                f"Received: sampling={sampling!r}"
            )
        self.process = self._checked_process()
        self.weights, sources = None, [source]
        if isinstance(source, Mapping):
            self._check_weights(source, sampling)
            self.weights, sources = [*map(float, source.values())], list(source)
        self.indexes = [
            open_index(each, self.fields, index_dir, process=self.process)
            for each in sources
        ]
        self.index = self.indexes[0] if len(sources) == 1 else Indexes(self.indexes)
        self.skipped = SkippedSamples(self.indexes, self.max_skipped)
        self._check_samples()
        self.skipped.report_index(len(self.index))
        self.order = range(len(self.index))
        if self.training:
            self.block_size = self._checked_block_size()
            self.order = self._shuffled(sampling)

    def _checked_process(self):
        """Returns the index of this process and the number of processes."""
        from keras_cluster_mask.distribution.processes import process_index_and_count

        process = self.process
        if process is None:
            process = process_index_and_count(self.training)
        index, count = process
        if not 0 <= index < count:
            raise ValueError(
                "`process` must be a pair (number, count) with 0 <= number < count. "
                f"Received: process={process}"
            )
        if self.batch_size % count:
            raise ValueError(
                "`batch_size` is global and must be divisible by the number of "
                f"processes. Received: batch_size={self.batch_size}, {count} processes"
            )
        return index, count

    def _check_weights(self, source, sampling):
        if not source or not all(map(is_positive, source.values())):
            raise ValueError(
                "`source` must be a dict from sources to positive weights. "
                f"Received: source={source!r}"
            )
        if not self.training or sampling is not None:
            raise ValueError(
                "`source` with weights is for training without `sampling`. Received: "
                f"training={self.training}, sampling={sampling!r}, source={source!r}"
            )

    def _check_samples(self):
        """Raises an error unless some samples have all requested fields."""
        # An index has no field values, such as labels, and no images at URLs, so read a
        # few samples.
        examples = []
        for index in self.indexes:
            numbers = {len(index) * place // EXAMPLES for place in range(EXAMPLES)}
            numbers = sorted(numbers) if len(index) else []
            examples.extend(index.read(numbers))
        if any(isinstance(sample, Pair) for sample in examples):
            return
        faults = collections.Counter(sample.reason for sample in examples)
        faults.update(self.skipped.by_reason)
        fields = {field for index in self.indexes for field in index.fields}
        fields = sorted(field for field in fields if not field.endswith("."))
        paths = [path for index in self.indexes for path in index.paths]
        wanted = f"`source` must hold samples with {self.fields.wanted}."
        details = [*self.skipped.details, *(each.details for each in examples)]
        raise ValueError(
            " ".join([wanted, *filter(None, details)][:2])
            + f" Received: {dict(faults) or 'no sample'} with the fields {fields} from "
            f"{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")
        )

    def _checked_block_size(self):
        """Checks `block_size`, or chooses a default."""
        block_size, batch_size = self.block_size, self.batch_size
        processes = self.process[1]
        if block_size is None:
            paths = [path for index in self.indexes for path in index.paths]
            # Neighbors are read much faster together than one by one.
            is_slow = any(x.endswith(".parquet") or files.is_address(x) for x in paths)
            block_size = math.gcd(batch_size, BLOCK) if is_slow else 1
            while block_size > 1 and batch_size < block_size * RUNS:
                block_size //= 2
        block_size = check_integer("block_size", block_size, 1)
        runs, rest = divmod(batch_size, block_size)
        if rest or runs % processes:
            fitting = [n for n in range(1, runs + 1) if not runs % n]
            raise ValueError(
                "`block_size` must divide `batch_size`, and the number of processes "
                "must divide the number of blocks in a batch"
                + (f": use one of {fitting} processes. " if not rest else ". ")
                + f"Received: block_size={block_size}, batch_size={batch_size}, "
                f"{processes} processes"
            )
        return block_size

    def _shuffled(self, sampling):
        """Returns the order of training."""
        if isinstance(sampling, Sampling):
            sampling = sampling.of_index(self.index)
        orders = [
            Order(len(index), self.seed, self.block_size, sampling, source)
            for source, index in enumerate(self.indexes)
        ]
        order = Mix(orders, self.weights) if self.weights else orders[0]
        if order.length(0) < self.batch_size:
            raise ValueError(
                "`batch_size` must not exceed the number of samples in an epoch, all "
                "of `source` or those that `sampling` chooses, because training uses "
                f"full batches only. Received: batch_size={self.batch_size}, "
                f"{order.length(0)} samples"
            )
        return order

    @property
    def description(self):
        """dict. The settings that a resumed run must share."""
        return {
            "data.shards": sum(len(index.paths) for index in self.indexes),
            "data.samples": len(self.index),
            "data.index": [index.fingerprint for index in self.indexes],
            "data.weights": self.weights,
            "data.batch_size": self.batch_size,
            "data.seed": self.seed,
            "data.block_size": self.block_size,
            "data.sampling": self.order.digest() if self.training else None,
        }

    @property
    def rows(self):
        """int. The number of rows per process in a full batch, rounded up."""
        return -(-self.batch_size // self.process[1])

    def positions(self, batch):
        """Returns the range of the positions of this process in a batch."""
        first, count = batch * self.batch_size, self.batch_size
        if not self.training:
            count = max(min(count, len(self.index) - first), 0)
        index, processes = self.process
        return range(
            first + count * index // processes,
            first + count * (index + 1) // processes,
        )

    def read(self, positions):
        """Yields the `Pair` or `Fault` of each position."""
        return self.index.read([self.order[position] for position in positions])

    def epoch(self, position):
        """Returns the number of the epoch of a position."""
        return self.order.place(position)[0] if self.training else 0

    def generator(self, position):
        """Returns the `np.random.Generator` of a position, the same in each process."""
        counter = [0, position, 0, 0]
        return np.random.Generator(np.random.Philox(key=self.seed, counter=counter))

    def substitutes(self, position):
        """Yields groups of positions whose samples may replace a broken one.

        They depend only on the batch, not on the number of processes. Failed reads are
        slow, so each group has twice as many positions as those before it.
        """
        size = self.batch_size
        start = position - position % size
        step = int(DISTANCE * size) + 1
        while math.gcd(step, size) > 1:
            step += 1
        count, limit = 1, min(SUBSTITUTES, size)
        while count < limit:
            several = range(count, min(2 * count, limit))
            yield [start + (position + n * step) % size for n in several]
            count = several.stop
