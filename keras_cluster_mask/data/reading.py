"""Which samples each batch holds, in which order, and where they are read."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from keras_cluster_mask.checks import check_integer, check_range, is_positive
from keras_cluster_mask.data import files
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.order import Mix, Order
from keras_cluster_mask.data.pairs import Pair, PairReader
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.skipped import SkippedSamples

# The largest default block size for object stores and Parquet, and the number of
# blocks that a batch must contain to be well mixed.
BLOCK, RUNS = 64, 16
# The maximum number of samples that are read to check that they have the requested
# fields.
EXAMPLES = 8


@dataclasses.dataclass
class Reading:
    """Opens a source, and finds the samples of each batch. Picklable and thread-safe.

    Args:
        source: See `image_text_dataset`; also for the arguments below.
        fields: `PairReader`. The fields of a sample that are read.
        batch_size: Integer. The global batch size.
        training: Boolean. Whether positions are endless and shuffled.
        seed: Integer.
        sampling: `Sampling`, or `None`.
        block_size: Integer, or `None`, as in evaluation.
        process: Pair of integers. The index of this process, and the number of
            processes.
        num_workers: Integer.
        index_dir: String or path, or `None`.
        max_skipped: Float.

    Attributes:
        indexes: List of `Index` and `ObjectIndex`, one for each source.
        num_samples: Integer. The number of intact samples.
        order: `Order` or `Mix`, in training.
        rows: Integer. The number of rows per process in a full batch, rounded up.
        skipped: `SkippedSamples` of the indexes.
    """

    source: dataclasses.InitVar[Any]
    fields: PairReader
    batch_size: int
    training: bool
    seed: int = 0
    sampling: dataclasses.InitVar[Sampling | None] = None
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
        self.process = self._checked_process()
        self.rows = -(-self.batch_size // self.process[1])
        if not self.training and (sampling, self.block_size) != (None, None):
            raise ValueError(
                "`sampling` and `block_size` are for training, and evaluation reads "
                "all of `source` in order: give it a source of its own. Received: "
                f"sampling={sampling!r}, block_size={self.block_size}, training=False"
            )
        self.weights, sources = None, [source]
        if isinstance(source, Mapping):
            self.weights, sources = [*source.values()], [*source]
            is_valid = sources and all(map(is_positive, self.weights))
            if not (is_valid and self.training and sampling is None):
                raise ValueError(
                    "`source` as a dict from sources to positive weights is for "
                    f"training without `sampling`. Received: source={source!r}, "
                    f"training={self.training}, sampling={sampling!r}"
                )
            self.weights = [*map(float, self.weights)]
        self.indexes = [
            open_index(each, self.fields, index_dir, process=self.process)
            for each in sources
        ]
        self.num_samples = sum(map(len, self.indexes))
        self.skipped = SkippedSamples(self.indexes, self.max_skipped)
        for index in self.indexes:
            self._check_samples(index)
        self.skipped.report_index(self.num_samples)
        if self.training:
            self._shuffle(sampling)

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

    def _check_samples(self, index):
        """Raises an error unless some samples have all requested fields."""
        # An index has no field values, such as labels, and no images at URLs, so read a
        # few samples.
        step = len(index) // EXAMPLES + 1
        examples = [*index.read(range(0, len(index), step))]
        if any(isinstance(sample, Pair) for sample in examples):
            return
        faults = collections.Counter(sample.reason for sample in examples)
        faults.update(index.faults)
        known = itertools.chain(examples, index.examples(1), index.paths)
        fields = sorted(field for field in index.fields if not field.endswith("."))
        raise ValueError(
            f"`source` has no intact sample: {next(known)}. Each sample needs one of "
            f"these fields: {self.fields.wanted}, or of those that `image_keys`, "
            "`caption_key` and `label_key` name. Received: "
            f"{dict(faults) or 'no sample'} with the fields {fields} from "
            f"{len(index.paths)} shards"
        )

    def _shuffle(self, sampling):
        """Sets the order of training, and the default of `block_size`."""
        block_size, batch_size = self.block_size, self.batch_size
        processes = self.process[1]
        if block_size is None:
            paths = [path for index in self.indexes for path in index.paths]
            # Neighbors are read much faster together than one by one.
            is_slow = any(x.endswith(".parquet") or files.is_address(x) for x in paths)
            block_size = math.gcd(batch_size, BLOCK) if is_slow else 1
            while block_size > 1 and batch_size < block_size * RUNS:
                block_size //= 2
        self.block_size = check_integer("block_size", block_size, 1)
        if batch_size % block_size or batch_size // block_size % processes:
            raise ValueError(
                "`block_size` must divide `batch_size`, and the number of processes "
                "must divide the number of blocks in a batch. Received: "
                f"block_size={block_size}, batch_size={batch_size}, "
                f"{processes} processes"
            )
        if not isinstance(sampling, Sampling | None):
            raise ValueError(
                "`sampling` must be a `kcm.data.Sampling` of a dictionary or of keys, "
                f"or None. Received: sampling={sampling!r}"
            )
        draw = sampling and sampling.of_index(self.indexes[0])
        orders = [
            Order(len(index), self.seed, self.block_size, draw, source)
            for source, index in enumerate(self.indexes)
        ]
        self.order = Mix(orders, self.weights) if self.weights else orders[0]
        if self.order.length(0) < batch_size:
            raise ValueError(
                "`batch_size` must not exceed the number of samples in an epoch, all "
                "of `source` or those that `sampling` chooses, because training uses "
                f"full batches only. Received: batch_size={batch_size}, "
                f"{self.order.length(0)} samples"
            )

    @property
    def description(self):
        """Dictionary. The settings that a resumed run must share."""
        return {
            "shards": sum(len(index.paths) for index in self.indexes),
            "samples": self.num_samples,
            "index": [index.fingerprint for index in self.indexes],
            "weights": self.weights,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "block_size": self.block_size,
            "sampling": self.order.digest() if self.training else None,
        }

    def positions(self, batch):
        """Returns the range of the positions of this process in a batch."""
        first, count = batch * self.batch_size, self.batch_size
        if not self.training:
            count = max(min(count, self.num_samples - first), 0)
        index, processes = self.process
        return range(
            first + count * index // processes, first + count * (index + 1) // processes
        )

    def read(self, positions):
        """Yields the `Pair` or `Fault` of each position."""
        places = [self.order[n] if self.training else (0, n) for n in positions]
        readers = {
            source: self.indexes[source].read([n for s, n in places if s == source])
            for source in {source for source, _ in places}
        }
        for source, _ in places:
            yield next(readers[source])
