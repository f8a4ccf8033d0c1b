"""The order of pairs: that of the shards, or shuffled."""

import collections
import itertools
import random
from concurrent import futures

# With this many open shards, neighbours in a shard rarely share a batch.
OPEN_SHARDS = 8
# The largest chunk that is read from a shard, in pairs and in bytes.
CHUNK_PAIRS = 64
CHUNK_BYTES = 2**23
EPOCH_STRIDE = 1_000_003


def in_order(reader, report):
    """All pairs in the order of the shards."""
    return _interleaved(reader, reader.shards, report, open_shards=1)


def mixed(reader, report, seed, epoch, shuffle_buffer):
    """All pairs in an order that depends only on the seed and the epoch.

    Args:
        reader: `PairReader`.
        report: As for `PairReader.read`.
        seed: int.
        epoch: int.
        shuffle_buffer: int. The number of pairs in the shuffle buffer.
    """
    generator = random.Random(seed + epoch * EPOCH_STRIDE)
    shards = list(reader.shards)
    generator.shuffle(shards)
    pairs = _interleaved(reader, shards, report, OPEN_SHARDS)
    return _shuffled(pairs, shuffle_buffer, generator)


def _interleaved(reader, shards, report, open_shards):
    """Takes chunks from several shards in turn, and reads ahead in threads."""
    waiting = iter(shards)
    with futures.ThreadPoolExecutor(open_shards, "read shards") as threads:

        def ahead(chunks):
            return chunks, threads.submit(next, chunks, ())

        opened = collections.deque(
            ahead(_chunks(reader.read(shard, report)))
            for shard in itertools.islice(waiting, open_shards)
        )
        while opened:
            chunks, chunk = opened.popleft()
            pairs = chunk.result()
            if pairs:
                opened.append(ahead(chunks))
            elif (shard := next(waiting, None)) is not None:
                opened.append(ahead(_chunks(reader.read(shard, report))))
            yield from pairs


def _chunks(pairs):
    chunk, size = [], 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair.image)
        if len(chunk) == CHUNK_PAIRS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _shuffled(pairs, size, generator):
    """Draws pairs from a buffer of `size` pairs with equal probability."""
    waiting = []
    for pair in pairs:
        if len(waiting) < size:
            waiting.append(pair)
            continue
        place = int(generator.random() * size)
        yield waiting[place]
        waiting[place] = pair
    generator.shuffle(waiting)
    yield from waiting
