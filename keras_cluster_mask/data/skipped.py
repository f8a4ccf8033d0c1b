"""Counts the samples that a pipeline skips."""

import threading
import warnings

MAX_EXAMPLES = 100
# The share of skipped samples is checked after this many samples.
ENOUGH = 1000


class SkippedSamples:
    """The samples that the current, or last, pass over a dataset skipped.

    A pass starts when an iteration over the dataset starts, as in every epoch of `fit`,
    and resets all counts. The pipeline reads ahead, so during a pass the counts are
    ahead of the batches. Samples that an abandoned pass still reads are not counted.
    With `dataset.repeat()`, each repetition is a pass. A warning names the first
    skipped sample of a pass, and another one summarizes the pass at its end.

    Args:
        raise_errors: bool. Whether to raise an error at the first skipped sample.
        max_share: float. The share of samples that may be skipped. It is checked after
            1,000 samples, and a larger share raises an error.

    Attributes:
        count: int. The number of skipped samples. A damaged shard counts as one,
            because the number of samples after the damage is unknown.
        by_reason: dict from the reason (str) to a count.
        samples: list of the first 100 skipped samples as tuples of shard, key and
            reason.
    """

    def __init__(self, raise_errors=False, max_share=1.0):
        if not 0 <= max_share <= 1:
            raise ValueError(
                f"`max_skipped` must be from 0 to 1. Received: {max_share}"
            )
        self._raise_errors = raise_errors
        self._max_share = max_share
        self._lock = threading.Lock()
        self._current = None
        self._passes = self._read = 0
        self.by_reason = {}
        self.samples = []

    @property
    def count(self):
        """int. The number of skipped samples."""
        return sum(self.by_reason.values())

    def start_pass(self):
        """Resets the counts; returns the `Account` of the new pass."""
        account = Account(self)
        with self._lock:
            self._current = account
            self._passes += 1
            self._read = 0
            self.by_reason = {}
            self.samples = []
        return account

    def ignore(self, shard, key, reason, details=None):
        """Counts nothing, for samples that are read a second time."""

    def _report(self, account, shard, key, reason, details):
        details = details or f"The sample {key!r} of the shard {shard}: {reason}"
        if self._raise_errors:
            raise ValueError(details)
        with self._lock:
            if account is not self._current:
                return
            first = not self.by_reason
            self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
            if len(self.samples) < MAX_EXAMPLES:
                self.samples.append((shard, key, reason))
            self._check_share()
        if first:
            warnings.warn(
                f"{details}. It was skipped; others may follow without a warning, "
                "`dataset.skipped` counts them.",
                stacklevel=2,
            )

    def _check_share(self):
        looked_at = self.count + self._read
        if looked_at >= ENOUGH and self.count > self._max_share * looked_at:
            raise ValueError(
                f"More than {self._max_share:.0%} of the samples are broken "
                f"(`max_skipped`). Received: {self.count} of the first {looked_at}, "
                f"{self._reasons()}"
            )

    def _end(self, account):
        with self._lock:
            if account is not self._current or self.count < 2:
                return
            message = (
                f"Pass {self._passes} over the data skipped {self.count} of "
                f"{self.count + self._read} samples: {self._reasons()}."
            )
        warnings.warn(message, stacklevel=2)

    def _reasons(self):
        by_reason = sorted(dict(self.by_reason).items())
        return ", ".join(f"{reason}: {count}" for reason, count in by_reason)

    def __repr__(self):
        reasons = f", {self._reasons()}" if self.by_reason else ""
        return f"<SkippedSamples count={self.count}{reasons}>"


class Account:
    """Reports one pass to `SkippedSamples`, unless a later pass has started."""

    def __init__(self, skipped):
        self._skipped = skipped

    def report(self, shard, key, reason, details=None):
        """Counts a sample. Raises an error for a skipped one with `raise_errors`.

        Args:
            shard: str.
            key: str, or None if it is unknown.
            reason: str. The key of `by_reason`; None for a sample that is not skipped.
            details: str. A message for the user, if more is known.
        """
        if reason is None:
            self._count_read(1)
        else:
            self._skipped._report(self, shard, key, reason, details)

    def report_unreadable(self, shard, key, reason):
        """Counts a sample as skipped that was counted as read."""
        self._count_read(-1)
        self.report(shard, key, reason)

    def _count_read(self, count):
        # Reading threads add to the count and decoding threads subtract from it.
        with self._skipped._lock:
            if self._skipped._current is self:
                self._skipped._read += count

    def end(self):
        """Warns with a summary of the skipped samples."""
        self._skipped._end(self)
