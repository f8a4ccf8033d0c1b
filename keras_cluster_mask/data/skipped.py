"""Counts the samples that a dataset skips."""

import collections
import warnings
from collections.abc import Sequence
from typing import Any

MAX_EXAMPLES = 100


class SkippedSamples:
    """The broken samples in the last pass over a dataset.

    Samples that the index left out are counted from the start, and are the same in all
    processes. Samples that turn out to be broken when they are read are added with
    their batch. Each iteration over a dataset creates a new `SkippedSamples`, which
    starts with the counts of the index.

    Args:
        indexes: list of `Index` and `ObjectIndex`.
        max_share: float. The fraction of samples that may be broken.

    Attributes:
        max_share: float. The fraction of samples that may be broken.
        by_reason: dict from the reason (str) to a count.
        by_shard: dict from the name of a shard to a dict from reasons to counts.
        samples: list of the first 100 samples that turned out to be broken, as `Fault`
            tuples of shard, key, reason and details.
        details: list of str. The descriptions of damaged shards, and the first missing
            image file of each table.
    """

    def __init__(self, indexes: Sequence[Any] = (), max_share: float = 1.0):
        self.max_share = max_share
        self.details = [line for index in indexes for line in index.damage]
        self.samples = []
        self._counts = collections.defaultdict(collections.Counter)
        for index in indexes:
            for shard, counts in index.faults.items():
                self._counts[shard].update(counts)
        self._read, self._broken = 0, set()
        self._taken = self.count

    @property
    def by_shard(self) -> dict[str, dict[str, int]]:
        by_shard = sorted(self._counts.items())
        return {shard: dict(sorted(counts.items())) for shard, counts in by_shard}

    @property
    def by_reason(self) -> dict[str, int]:
        return dict(sorted(sum(self._counts.values(), collections.Counter()).items()))

    @property
    def count(self) -> int:
        """int. The number of broken samples."""
        return sum(counts.total() for counts in self._counts.values())

    def reasons(self) -> str:
        """Returns the reasons with their counts."""
        return ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.items())

    def add(self, fault: Any) -> None:
        """Counts a broken sample.

        Args:
            fault: `Fault`.
        """
        self._counts[fault.shard][fault.reason] += 1
        if len(self.samples) < MAX_EXAMPLES:
            self.samples.append(fault)

    def report_index(self, num_samples: int) -> None:
        """Warns about samples left out of the index, or raises an error for too many.

        Args:
            num_samples: int. The number of intact samples.
        """
        count, total = self.count, self.count + num_samples
        if not count:
            return
        message = (
            f"{count} of {total} samples of `source` are broken ({self.reasons()}), in "
            f"{', '.join([*self.by_shard][:3])}"
        )
        message = ". ".join([message, *self.details[:1]])
        self._check(message, count, total)
        # Imported here, since worker processes import this module without Keras.
        from keras_cluster_mask.distribution import is_main_process

        if is_main_process():
            # Show the line that called `image_text_dataset`.
            warnings.warn(f"{message}. They are left out.", stacklevel=5)

    def report(self, faults: Sequence[Any], read: int, total: int) -> None:
        """Counts the samples of a batch, and warns about the first broken one.

        Raises an error as soon as a pass has too many.

        Args:
            faults: list of `Fault`.
            read: int. The number of samples, intact or broken.
            total: int. The number of samples in a pass.
        """
        if self._read >= total:
            self._read, self._broken = 0, set()
        self._read += read
        if not faults:
            return
        first = faults[0]
        message = f"The sample {first.key!r} of the shard {first.shard}: {first.reason}"
        if first.details:
            message += f" ({first.details})"
        is_first = not self.samples
        # Rounds of whole batches may read a sample twice.
        self._broken.update((x.shard, x.key or object()) for x in faults)
        for fault in faults:
            self.add(fault)
        # Samples that take the places of broken ones may be more than a pass has.
        self._check(message, len(self._broken), max(total, self._read))
        if is_first:
            warnings.warn(
                f"{message}. It was skipped; others may follow without a warning, "
                "`dataset.skipped` counts them.",
                stacklevel=2,
            )

    def _check(self, message, broken, total):
        """Raises an error if too many samples are broken."""
        if broken > self.max_share * total:
            raise ValueError(
                f"{message}. More than {100 * self.max_share:.3g} % of the samples are "
                "broken. Repair `source`, or pass a larger `max_skipped`. Received: "
                f"max_skipped={self.max_share}, {broken} broken of {total} samples, "
                f"{self.reasons()}"
            )

    def take_new(self) -> int:
        """Returns the number of samples that were added since the last call."""
        count, self._taken = self.count - self._taken, self.count
        return count

    def __repr__(self):
        reasons = f", {self.reasons()}" if self.count else ""
        return f"<SkippedSamples count={self.count}{reasons}>"
