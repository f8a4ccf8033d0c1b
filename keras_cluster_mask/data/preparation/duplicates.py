"""Which of many samples are duplicates of which."""

import sys

import numpy as np

from keras_cluster_mask.data.preparation.likeness import near_pairs


class DuplicateTable:
    """What was found on all samples, by their numbers.

    Args:
        findings: iterable of dicts.
    """

    def __init__(self, findings):
        self._names, self._bytes, self._captions = [], [], []
        hashes, colours, self._hashed = [], [], []
        self.broken = 0
        for number, found in enumerate(findings):
            self._names.append((sys.intern(found["shard"]), found["key"]))
            whole = "reason" not in found
            self.broken += not whole
            self._bytes.append(bytes.fromhex(found["bytes"]) if whole else None)
            self._captions.append(bytes.fromhex(found["captions"]) if whole else None)
            if whole and found["hash"]:
                self._hashed.append(number)
                hashes.append(bytes.fromhex(found["hash"]))
                colours.append(bytes.fromhex(found["colours"]))
        self._hashed = np.array(self._hashed, "int64")
        self._hashes = np.frombuffer(b"".join(hashes), "uint8").reshape(-1, 8)
        self._colours = np.frombuffer(b"".join(colours), "uint8").reshape(-1, 48)

    def leaders(self, distance, captions):
        """For each sample the one that is kept for it; -1 if it is broken.

        Args:
            distance: int, or None for the same bytes alone.
            captions: bool. Whether they must be the same.

        Returns:
            int array.
        """
        first = {}
        leaders = np.full(len(self._names), -1)
        for number, content in enumerate(self._bytes):
            if content is not None:
                key = content, self._captions[number] if captions else None
                leaders[number] = first.setdefault(key, number)
        if distance is not None:
            self._join_near(leaders, distance, captions)
        return leaders

    def _join_near(self, leaders, distance, captions):
        rows = np.flatnonzero(leaders[self._hashed] == self._hashed)
        pairs = near_pairs(self._hashes[rows], self._colours[rows], distance)
        numbers = self._hashed[rows]
        nearest = {}
        # By the later of the two, then by the earlier.
        for early, late in pairs[np.lexsort(pairs.T)].tolist():
            early, late = numbers[early], numbers[late]
            if captions and self._captions[early] != self._captions[late]:
                continue
            if late not in nearest and early not in nearest:
                nearest[late] = early
        for late, early in nearest.items():
            leaders[late] = early
        whole = leaders >= 0
        # What has the bytes of one that is now left out goes where that went.
        leaders[whole] = leaders[leaders[whole]]

    def groups(self, leaders):
        """dict from each sample with duplicates to the list of these."""
        groups = {}
        for number, leader in enumerate(leaders.tolist()):
            if leader not in (-1, number):
                groups.setdefault(leader, []).append(number)
        return dict(sorted(groups.items()))

    def name(self, number):
        """A sample's shard and key."""
        shard, key = self._names[number]
        return {"shard": shard, "key": key}

    def bits(self, first, second):
        """By how many bits two samples differ; None if their bytes are the same."""
        if self._bytes[first] == self._bytes[second]:
            return None
        places = np.searchsorted(self._hashed, [first, second])
        return int(np.unpackbits(np.bitwise_xor(*self._hashes[places])).sum())
