"""The account of samples that a pipeline had to leave out."""

import threading
import warnings

MAX_EXAMPLES = 100
# A share of fewer samples says little.
ENOUGH = 1000


class SkippedSamples:
    """Which samples were left out in the current, or last, pass over a dataset.

    A pass starts when something begins to iterate over the dataset, as every epoch of
    `fit` does, and sets all counts back to zero; after the pass they say what the whole
    of it left out. A pipeline reads ahead, so during a pass the counts are ahead of the
    batches. What a pass that was given up is still reading does not count. With
    `dataset.repeat()` each repetition is a pass. The first sample of a pass that is
    skipped is named in a warning, and a pass ends with a summary.

    Args:
        raise_errors: bool. Whether to raise an error at the first.
        max_share: float. The share of samples that may be skipped: of more, once 1,000
            have been looked at, an error is raised.

    Attributes:
        count: int. How many were left out. A damaged shard counts as one, since nobody
            can tell what its rest held.
        by_reason: dict from the reason (str) to a count.
        samples: list of the first 100 as tuples of shard, key and reason.
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
        """int. The number of samples left out."""
        return sum(self.by_reason.values())

    def start_pass(self):
        """Sets the counts to zero; returns the `Account` of the pass that starts."""
        account = Account(self)
        with self._lock:
            self._current = account
            self._passes += 1
            self._read = 0
            self.by_reason = {}
            self.samples = []
        return account

    def ignore(self, shard, key, reason, details=None):
        """Counts nothing, of what is read once more."""

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
    """What a pass reports to `SkippedSamples`, which may have gone on to the next."""

    def __init__(self, skipped):
        self._skipped = skipped

    def report(self, shard, key, reason, details=None):
        """Counts a sample; if it is left out, raises if that was asked for.

        Args:
            shard: str.
            key: str; None if it is not known.
            reason: str, one of few: what `by_reason` counts by; None for a sample that
                is given.
            details: str. What to tell the user, if more than this is known.
        """
        if reason is None:
            self._count_read(1)
        else:
            self._skipped._report(self, shard, key, reason, details)

    def report_unreadable(self, shard, key, reason):
        """Counts a sample that was counted as read."""
        self._count_read(-1)
        self.report(shard, key, reason)

    def _count_read(self, count):
        # Threads that decode take off what those that read add.
        with self._skipped._lock:
            if self._skipped._current is self:
                self._skipped._read += count

    def end(self):
        """Sums up what a pass skipped, in a warning."""
        self._skipped._end(self)
