"""Checks of the source and of the process before the first batch."""

import collections
import contextlib

from keras_cluster_mask.data.index_parts import build_parts, num_pairs
from keras_cluster_mask.data.sources import ShardError
from keras_cluster_mask.data.sources.shard import FAULT, NoRandomAccess
from keras_cluster_mask.distribution.processes import process_index_and_count

SAMPLES_TO_CHECK = 1000


def check_for_pairs(reader, on_error, at_least=1):
    """Raises an error unless the shards hold enough pairs for a batch.

    Args:
        reader: `PairReader`.
        on_error: `"skip"`, or `"raise"` for the first damaged shard.
        at_least: int. The required number of pairs; no more are read.
    """
    seen = {}
    damage = None
    looked_at = pairs = 0
    for shard in reader.shards:
        keys = set()
        try:
            for sample in shard.read():
                looked_at += 1
                pairs += _is_pair(reader, shard, sample, keys)
                if pairs >= at_least:
                    return
                seen.update(sample)
                if not pairs and looked_at >= SAMPLES_TO_CHECK:
                    break
        except (ShardError, OSError) as error:
            if on_error == "raise":
                raise
            damage = damage or error
            # The last sample may be complete.
            if isinstance(error, ShardError):
                pairs += _is_pair(reader, shard, error.sample, keys)
                if pairs >= at_least:
                    return
        if not pairs and looked_at >= SAMPLES_TO_CHECK:
            break
    if pairs:
        raise ValueError(
            "`batch_size` must not exceed the number of pairs, because only full "
            f"batches are used. Received: batch_size={at_least}, {pairs} pairs in "
            "`source`"
        )
    if damage:
        raise ValueError(f"`source` holds no readable pair. {damage}") from damage
    fields = sorted(seen.keys() - {"__key__", FAULT})
    shards = reader.shards
    raise ValueError(
        f"`source` must hold samples with {reader.wanted}. Received: {looked_at} "
        f"samples with the fields {fields} from {shards[0]}"
        + (f" and {len(shards) - 1} more" if shards[1:] else "")
    )


def _is_pair(reader, shard, sample, keys):
    """Whether a sample is a pair with a new key."""
    pair, _ = reader.pair(shard, sample)
    key = sample.get("__key__")
    known = shard.unique_keys and key in keys
    keys.add(key)
    return pair is not None and not known


def count_pairs(reader):
    """The number of pairs in shards, whether or not their images decode.

    Only the headers of shards are read, and those only once, because the index of a
    shard is kept. A shard is read as a whole if it is compressed, or if only the
    content of JSON files or labels tells what is a pair.
    """
    shards = collections.defaultdict(list)
    for shard in reader.shards:
        shards[shard.path].append(shard)
    count = 0
    for path, parts in shards.items():
        found = None
        # The index can be written nowhere, for example.
        with contextlib.suppress(NoRandomAccess, OSError):
            (part,) = build_parts([path])
            found = num_pairs(part, reader)
        if found is None:
            found = sum(1 for part in parts for _ in reader.read(part, _ignore))
        count += found
    return count


def _ignore(*fault):
    pass


def check_process(process, batch_size, seed, training, drop_remainder):
    """Checks `process`; returns the number of this process and the count."""
    index, count = process_index_and_count(training) if process is None else process
    if not 0 <= index < count:
        raise ValueError(
            "`process` must be a pair (number, count) with 0 <= number < count. "
            f"Received: process={process}"
        )
    if batch_size % count:
        raise ValueError(
            "`batch_size` is global and must be divisible by the number of processes. "
            f"Received: batch_size={batch_size}, {count} processes"
        )
    if count > 1 and training and seed is None:
        raise ValueError(
            "`seed` must be set if several processes share the samples, so that all "
            f"use the same order. Received: seed=None, {count} processes"
        )
    if count > 1 and training and not drop_remainder:
        raise ValueError(
            "`drop_remainder` must be true in training if several processes share the "
            "samples, so that all take the same number of steps. Received: "
            f"drop_remainder={drop_remainder}, {count} processes"
        )
    return index, count
