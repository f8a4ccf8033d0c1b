"""Counts the samples that a dataset skips."""

import collections
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

# The number of samples that are listed for each reason.
MAX_EXAMPLES = 20


class SkippedSamples:
    """The broken samples in the last pass over a dataset.

    Samples that the index left out are counted from the start, and are the same in all
    processes. Samples that turn out to be broken when they are read are added with
    their batch. Each iteration over a dataset creates a new `SkippedSamples`, which
    starts with the counts of the index.

    Args:
        indexes: List of `Index` and `ObjectIndex`.
        max_share: Float. The fraction of samples that may be broken.

    Attributes:
        max_share: Float. The fraction of samples that may be broken.
        by_reason: Dictionary from each reason, a string, to the number of samples.
        examples: Dictionary from each reason to a list of the first 20 samples, tuples
            of `shard`, `key`, `reason` and `details`. The keys of samples that the
            index left out are read from the shards at each access.
    """

    def __init__(self, indexes: Sequence[Any] = (), max_share: float = 1.0):
        self.max_share = max_share
        self._indexes = indexes
        self._counts = collections.Counter()
        for index in indexes:
            self._counts.update(index.faults)
        # Of the samples that turned out to be broken.
        self._examples = collections.defaultdict(list)
        self._read, self._broken = 0, set()
        self._taken = self._counts.total()

    @property
    def by_reason(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    @property
    def examples(self) -> dict[str, list[Any]]:
        left_out = [index.examples(MAX_EXAMPLES) for index in self._indexes]
        faults = [*itertools.chain(*left_out, *self._examples.values())]
        return {
            reason: [each for each in faults if each.reason == reason][:MAX_EXAMPLES]
            for reason in self.by_reason
        }

    @property
    def count(self) -> int:
        """Integer. The number of broken samples."""
        return self._counts.total()

    def reasons(self) -> str:
        """Returns the reasons with their counts."""
        return ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.items())

    def add(self, fault: Any) -> None:
        """Counts a broken sample.

        Args:
            fault: `Fault`.
        """
        self._counts[fault.reason] += 1
        examples = self._examples[fault.reason]
        if len(examples) < MAX_EXAMPLES:
            examples.append(fault)

    def report_index(self, num_samples: int) -> None:
        """Warns about samples left out of the index, or raises an error for too many.

        Args:
            num_samples: Integer. The number of intact samples.
        """
        count, total = self.count, self.count + num_samples
        if not count:
            return
        examples = itertools.chain(*(index.examples(1) for index in self._indexes))
        message = (
            f"{count} of {total} samples of `source` are broken ({self.reasons()}), "
            f"such as {next(examples)}"
        )
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
            faults: List of `Fault`.
            read: Integer. The number of samples, intact or broken.
            total: Integer. The number of samples in a pass.
        """
        if self._read >= total:
            self._read, self._broken = 0, set()
        self._read += read
        if not faults:
            return
        message = f"A sample is broken: {faults[0]}"
        is_first = not self._examples
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
