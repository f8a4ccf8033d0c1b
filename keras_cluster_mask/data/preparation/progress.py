"""A line on stderr that says how far a long command is."""

import sys
import time

# A terminal's line is renewed so often, a log gets a new line so often, in seconds.
TERMINAL, LOG = 0.5, 30.0


class Progress:
    """Counts samples, and says so on stderr.

    Args:
        name: str. What is being done.
        num_shards: int. How many shards there are to read.
        verbose: bool. Whether to say anything.
    """

    def __init__(self, name, num_shards, verbose):
        self._name = name
        self._num_shards = num_shards
        self._verbose = verbose
        self._file = sys.stderr
        self._terminal = self._file.isatty()
        self._begun = self._said = time.monotonic()
        self._count = self._before = 0
        self._shard = 0

    def resume(self, count):
        """Counts samples of an earlier run, which say nothing of the speed of this."""
        self._count += count
        self._before += count

    def __call__(self, shard, count=1):
        """Counts samples.

        Args:
            shard: int. The number of the shard they lie in, from 0.
            count: int. Defaults to `1`.
        """
        self._count += count
        self._shard = shard
        if not self._verbose:
            return
        now = time.monotonic()
        if now - self._said >= (TERMINAL if self._terminal else LOG):
            self._said = now
            self._say()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._verbose:
            self._say()
            if self._terminal:
                self._file.write("\n")

    def _say(self):
        seconds = max(time.monotonic() - self._begun, 1e-3)
        line = (
            f"{self._name}: shard {self._shard + 1:,} of {self._num_shards:,}, "
            f"{self._count:,} samples, "
            f"{(self._count - self._before) / seconds:,.0f} per second"
        )
        self._file.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._file.flush()
