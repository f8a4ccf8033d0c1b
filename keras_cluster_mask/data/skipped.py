"""The account of samples that a pipeline had to leave out."""

import threading
import warnings

MAX_EXAMPLES = 100


class SkippedSamples:
    """Which samples were left out in the current, or last, pass over a dataset.

    A pass starts when something begins to iterate over the dataset, as every epoch of
    `fit` does, and sets all counts back to zero; after the pass they say what the whole
    of it left out. A pipeline reads ahead, so during a pass the counts are ahead of the
    batches. What a pass that was given up is still reading does not count. With
    `dataset.repeat()` each repetition is a pass.

    Attributes:
        count: int. How many were left out. A damaged shard counts as one, since nobody
            can tell what its rest held.
        by_reason: dict from the reason (str) to a count.
        samples: list of the first 100 as tuples of shard, key and reason.
    """

    def __init__(self, raise_errors=False):
        self._raise_errors = raise_errors
        self._lock = threading.Lock()
        self._pass = 0
        self.by_reason = {}
        self.samples = []

    @property
    def count(self):
        """int. The number of samples left out."""
        return sum(self.by_reason.values())

    def start_pass(self):
        """Sets the counts to zero; returns the number to report this pass's with."""
        with self._lock:
            self._pass += 1
            self.by_reason = {}
            self.samples = []
            return self._pass

    def report(self, number, shard, key, reason, details=None):
        """Counts a sample of pass `number`, or raises if that was asked for.

        Args:
            number: int, from `start_pass`.
            shard: str or bytes.
            key: str or bytes; None if it is not known.
            reason: str, one of few: what `by_reason` counts by.
            details: str. What to tell the user, if more than this is known.
        """
        shard, key = (x.decode() if isinstance(x, bytes) else x for x in (shard, key))
        details = details or f"The sample {key!r} of the shard {shard}: {reason}"
        if self._raise_errors:
            raise ValueError(details)
        with self._lock:
            if number != self._pass:
                return
            first = not self.by_reason
            self.by_reason[reason] = self.by_reason.get(reason, 0) + 1
            if len(self.samples) < MAX_EXAMPLES:
                self.samples.append((shard, key, reason))
        if first:
            warnings.warn(
                f"{details}. It was skipped; others may follow without a warning, "
                "`dataset.skipped` counts them.",
                stacklevel=2,
            )

    def __repr__(self):
        reasons = "".join(
            f", {reason}: {count}"
            for reason, count in sorted(dict(self.by_reason).items())
        )
        return f"<SkippedSamples count={self.count}{reasons}>"
