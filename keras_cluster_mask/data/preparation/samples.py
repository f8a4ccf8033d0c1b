"""All samples of shards in order, each looked at in a thread."""

import collections
import dataclasses
from concurrent import futures

from keras_cluster_mask.data import files
from keras_cluster_mask.data.decoding import num_processors
from keras_cluster_mask.data.pairs import Pair, PairReader
from keras_cluster_mask.data.pictures import Picture, UnreadablePicture
from keras_cluster_mask.data.sources import find_shards, list_shards

# So many pictures per thread are read ahead.
AHEAD = 4
# A JPEG that is shrunk while it is decoded is read to its last byte all the same.
TINY = 8, 8


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a sample, or with a shard from one on.

    Attributes:
        shard: str.
        key: str; None if it is not known.
        reason: str, one of few.
        details: str, what else is known, or None.
    """

    shard: str
    key: str | None
    reason: str
    details: str | None = None


class Samples:
    """The samples of shards, in the order of the files.

    A sample is a `Pair`. Rows of a manifest that follow one another and name the same
    picture are one sample with several captions.

    Args:
        source: As for `list_shards`.
        image_keys: As for `image_text_dataset`.
        caption_key: As for `image_text_dataset`.
    """

    def __init__(self, source, image_keys=None, caption_key=None):
        self.paths = list_shards(source)
        self.reader = PairReader(find_shards(source), image_keys, caption_key)
        self.settings = {
            "sources": [[path, *files.fingerprint(path)] for path in self.paths],
            "image_keys": list(self.reader.image_keys),
            "caption_key": list(self.reader.caption_keys),
        }

    def __len__(self):
        return len(self.reader.shards)

    def read(self, position=(0, 0)):
        """The samples, and what is broken.

        Args:
            position: pair of ints, one of those that come with samples: where to start.

        Yields:
            tuple: a `Pair` or a `Fault`, and the position after it.
        """
        held, end = None, None
        for item, after in self._items(*position):
            if _same_picture(held, item):
                captions = held.captions + item.captions
                held = dataclasses.replace(held, captions=captions)
            else:
                if held is not None:
                    yield held, end
                held = item
            end = after
        if held is not None:
            yield held, end

    def _items(self, first, skip):
        shards = self.reader.shards
        for number in range(first, len(shards)):
            items = enumerate(self._items_of(shards[number]), 1)
            for count, item in items:
                if number > first or count > skip:
                    yield item, (number, count)

    def _items_of(self, shard):
        faults = []

        def report(shard, key, reason, details):
            if reason is not None:
                faults.append(Fault(shard, key, reason, details))

        for pair in self.reader.read(shard, report):
            yield from faults
            faults.clear()
            yield pair
        yield from faults


def look_at(items, look, num_threads=None):
    """Looks at each picture in a thread.

    Args:
        items: iterable of pairs of a `Pair` or `Fault`, and a position.
        look: function of a `Pair`; may raise `UnreadablePicture`.
        num_threads: int. Defaults to `None`: the number of processors.

    Yields:
        tuple, in the order of the items: the `Pair` or `Fault`; what `look` returned;
        and the position.
    """
    num_threads = num_threads or num_processors()
    waiting = collections.deque()
    with futures.ThreadPoolExecutor(num_threads, "look") as threads:

        def finished():
            item, position, task = waiting.popleft()
            try:
                return item, task and task.result(), position
            except UnreadablePicture as error:
                return Fault(item.shard, item.key, str(error)), None, position

        try:
            for item, position in items:
                task = isinstance(item, Pair) and threads.submit(look, item)
                waiting.append((item, position, task))
                if len(waiting) > AHEAD * num_threads:
                    yield finished()
            while waiting:
                yield finished()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def decode(content):
    """Decodes a picture to its end, and throws the pixels away.

    Args:
        content: bytes.

    Raises:
        UnreadablePicture: if it does not decode.
    """
    Picture(content).whole(TINY)


def _same_picture(held, item):
    return (
        isinstance(held, Pair)
        and isinstance(item, Pair)
        and isinstance(item.image, str)
        and held.image == item.image
    )
