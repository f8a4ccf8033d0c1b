"""The broken samples of a pass over a dataset, counted by reason."""

import collections
import warnings
from collections.abc import Sequence
from typing import Any

# The number of samples that are listed for each reason.
MAX_EXAMPLES = 20


class SkippedSamples:
    """The broken samples in the last pass over a dataset.

    They are replaced in training, and skipped in evaluation. Each iteration over a
    dataset creates a new `SkippedSamples`.

    Args:
        sources: Sequence of pairs: the name of each source, and the number of its
            samples that this process reads in a pass. Defaults to one without a name.
        max_share: Float. The fraction of the samples of each source that may be broken.

    Attributes:
        by_reason: Dictionary from each reason, a string, to the number of samples.
        examples: Dictionary from each reason to a list of the first 20 samples, tuples
            of `file`, `key`, `reason` and `details`.
        count: Integer. The number of broken samples.
    """

    def __init__(
        self, sources: Sequence[tuple[str, int]] = (("", 0),), max_share: float = 1.0
    ):
        self.max_share, self._sources = max_share, [*sources]
        self.examples: dict[str, list[Any]] = {}
        self._counts, self._taken = collections.Counter(), 0
        # Of a pass over each source.
        self._read = [0] * len(self._sources)
        self._broken: list[set] = [set() for _ in self._sources]

    @property
    def by_reason(self) -> dict[str, int]:
        return dict(sorted(self._counts.items()))

    @property
    def count(self) -> int:
        return self._counts.total()

    def add(self, fault: Any) -> None:
        """Counts a broken sample, a `Fault`."""
        self._counts[fault.reason] += 1
        examples = self.examples.setdefault(fault.reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(fault)

    def report(
        self, faults: Sequence[tuple[int, int, Any]], read: Sequence[int]
    ) -> None:
        """Counts the broken samples of a batch, and warns about the first one.

        Args:
            faults: List of the number of a source, the number of a sample, which its
                key may not tell from others, and a `Fault`.
            read: The number of samples of each source, intact or broken.

        Raises:
            ValueError: As soon as too many samples of a source are broken.
        """
        is_first = not self._counts
        for number, (_, total) in enumerate(self._sources):
            if self._read[number] >= total:
                self._read[number], self._broken[number] = 0, set()
            self._read[number] += read[number]
        for number, sample, fault in faults:
            self.add(fault)
            # Rounds of whole batches may read a sample twice.
            self._broken[number].add(sample)
            (name, total), broken = self._sources[number], len(self._broken[number])
            # A source that is small in a mix is read several times.
            total = max(total, self._read[number])
            if broken > self.max_share * total:
                of_source = f" of {name}" if name else ""
                raise ValueError(
                    f"A sample is broken: {fault}. More than "
                    f"{100 * self.max_share:.3g} % of the samples{of_source} are "
                    "broken. Repair `source`, or pass a larger `max_skipped`. "
                    f"Received: max_skipped={self.max_share}, {broken} broken of "
                    f"{total} samples, {self._reasons()}"
                )
        if is_first and faults:
            warnings.warn(
                f"A sample is broken: {faults[0][2]}. The sample was skipped. Further "
                "broken samples are skipped without a warning, and counted in "
                "`dataset.skipped`.",
                stacklevel=3,
            )

    def take_new(self) -> int:
        """Returns the number of samples that were added since the last call."""
        count, self._taken = self.count - self._taken, self.count
        return count

    def _reasons(self):
        return ", ".join(f"{reason}: {n}" for reason, n in self.by_reason.items())

    def __repr__(self):
        reasons = f", {self._reasons()}" if self.count else ""
        return f"<SkippedSamples count={self.count}{reasons}>"
