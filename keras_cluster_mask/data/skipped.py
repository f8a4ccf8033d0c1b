"""Counts the samples that a dataset skips."""

import collections
import warnings

MAX_EXAMPLES = 100
# The share of skipped samples is checked after this many samples.
ENOUGH = 1000


class SkippedSamples:
    """The broken samples of a dataset.

    What the index left out is known from the start and is the same in all processes.
    Samples that turn out to be broken when they are read are added with the batch that
    they were to be part of; each is counted again in each epoch. A new iteration over
    the dataset starts with the counts of the index.

    Args:
        faults: list of `Faults` of indexes.
        max_share: float. The share of samples that may be broken.

    Attributes:
        max_share: float. The share of samples that may be broken.
        by_reason: dict from the reason (str) to a count.
        by_shard: dict from the name of a shard to a dict from reasons to counts.
        samples: list of the first 100 samples that turned out to be broken, as `Fault`
            tuples of shard, key, reason and details.
        details: list of str, about damaged shards.
    """

    def __init__(self, faults, max_share=1.0):
        self._faults = faults
        self.max_share = max_share
        self.details = [line for each in faults for line in each.details]
        self._pass = 0
        self._reset()

    def _reset(self):
        self.samples = []
        self._counts = collections.defaultdict(collections.Counter)
        for faults in self._faults:
            for shard, counts in faults.by_shard.items():
                self._counts[shard].update(counts)

    @property
    def by_shard(self):
        return {shard: dict(counts) for shard, counts in self._counts.items()}

    @property
    def by_reason(self):
        return dict(sorted(sum(self._counts.values(), collections.Counter()).items()))

    @property
    def count(self):
        """int. The number of broken samples."""
        return sum(counts.total() for counts in self._counts.values())

    def start(self):
        """Starts a new pass; returns its `Account`."""
        self._pass += 1
        self._reset()
        return Account(self, self._pass)

    def reasons(self):
        """str. The reasons with their counts."""
        return ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.items())

    def __repr__(self):
        reasons = f", {self.reasons()}" if self.count else ""
        return f"<SkippedSamples count={self.count}{reasons}>"


class Account:
    """What one pass skips; nothing, if a later pass has started.

    Args:
        skipped: `SkippedSamples`.
        number: int. The number of the pass.
    """

    def __init__(self, skipped, number):
        self._skipped, self._number = skipped, number
        self._read = self._broken = 0

    def report(self, faults, read):
        """Counts the samples of a batch.

        Args:
            faults: list of `Fault`.
            read: int. The number of samples, intact or broken.
        """
        skipped = self._skipped
        self._read += read
        if not faults or self._number != skipped._pass:
            return
        first = faults[0]
        message = f"The sample {first.key!r} of the shard {first.shard}: {first.reason}"
        if first.details:
            message += f" ({first.details})"
        if not skipped.max_share:
            raise ValueError(f"{message}. Received: max_skipped=0")
        if not self._broken:
            warnings.warn(
                f"{message}. It was skipped; others may follow without a warning, "
                "`dataset.skipped` counts them.",
                stacklevel=2,
            )
        self._broken += len(faults)
        for fault in faults:
            skipped._counts[fault.shard][fault.reason] += 1
        skipped.samples.extend(faults[: MAX_EXAMPLES - len(skipped.samples)])
        if self._read >= ENOUGH and self._broken > skipped.max_share * self._read:
            raise ValueError(
                f"More than {skipped.max_share:.0%} of the samples are broken "
                f"(`max_skipped`). Received: {self._broken} of the first {self._read}, "
                f"{skipped.reasons()}"
            )

    def end(self):
        """Warns with a summary of the skipped samples."""
        skipped = self._skipped
        if self._broken > 1 and self._number == skipped._pass:
            message = f"{self._broken} samples were skipped: {skipped.reasons()}."
            warnings.warn(message, stacklevel=2)
