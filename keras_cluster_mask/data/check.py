"""`check`: reads every sample and decodes every image."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Sequence
from concurrent import futures

from tqdm import tqdm

from keras_cluster_mask.data.decoding import num_processors, read_image
from keras_cluster_mask.data.images import EncodedImage, UnreadableImage
from keras_cluster_mask.data.pairs import Pair, PairReader
from keras_cluster_mask.data.sources import find_shards

# The number of images per thread that are read ahead.
AHEAD = 4
# A JPEG that is reduced while it is decoded is still read to its last byte.
TINY = 8, 8
MAX_EXAMPLES = 100


def check(
    source: str | os.PathLike | Sequence,
    *,
    image_keys: str | Sequence[str] | None = None,
    caption_key: str | Sequence[str] | None = None,
    num_threads: int | None = None,
    verbose: bool = False,
) -> dict:
    """Reads every sample and decodes every image.

    A sample is broken if `image_text_dataset` skips it: its image is missing or does
    not decode, its caption is missing or empty, or its key is a duplicate within the
    shard. A damaged shard counts as one broken sample, because the number of samples
    after the damage is unknown. Consecutive rows of a table that name the same image
    are one sample.

    Example:

    ```python
    result = kcm.data.check("shards/train-*.tar")
    print(result["samples"], result["broken"], result["by_reason"])
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        image_keys: str or sequence of str; see `image_text_dataset`.
        caption_key: str or sequence of str; see `image_text_dataset`.
        num_threads: int. The number of images that are decoded at the same time.
            Defaults to `None`: the number of processors.
        verbose: bool. Whether to show a progress bar. Defaults to `False`.

    Returns:
        dict: `"samples"`, the number of intact samples; `"broken"`, the number of
        broken ones; `"by_reason"`, a dict from each reason to a count; and
        `"first_broken"`, the first 100 broken samples as dicts of `"shard"`, `"key"`,
        `"reason"` and `"details"`.

    Raises:
        FileNotFoundError: If a shard is missing.
    """
    samples = IntactSamples(source, image_keys, caption_key, num_threads)
    count = sum(1 for _ in samples.map(_decode, "check" if verbose else None))
    return {"samples": count, **samples.broken()}


def _decode(pair):
    decode_all(EncodedImage(read_image(pair.image)))


def decode_all(image):
    """Decodes an image to its last byte and discards the pixels.

    Args:
        image: `EncodedImage`.

    Raises:
        UnreadableImage: If it does not decode.
    """
    image.whole(TINY)


@dataclasses.dataclass(frozen=True)
class BrokenSample:
    """A broken sample, or a shard that is damaged from one sample on.

    Attributes:
        shard: str.
        key: str, or None if it is unknown.
        reason: str. One of a few, for counting.
        details: str, or None if nothing more is known.
    """

    shard: str
    key: str | None
    reason: str
    details: str | None = None


class IntactSamples:
    """The intact samples of shards in order, and the account of the broken ones.

    Args:
        source: As for `list_shards`.
        image_keys: As for `image_text_dataset`.
        caption_key: As for `image_text_dataset`.
        num_threads: int, or None for the number of processors.
    """

    def __init__(self, source, image_keys=None, caption_key=None, num_threads=None):
        self._reader = PairReader(find_shards(source), image_keys, caption_key)
        self._num_threads = num_threads or num_processors()
        self._by_reason = collections.Counter()
        self._first_broken = []

    def broken(self):
        """The entries about broken samples in what the commands return."""
        return {
            "broken": self._by_reason.total(),
            "by_reason": dict(sorted(self._by_reason.items())),
            "first_broken": [dataclasses.asdict(each) for each in self._first_broken],
        }

    def map(self, function, progress=None):
        """Applies a function to each sample in threads.

        Args:
            function: Function of a `Pair`. May raise `UnreadableImage`.
            progress: str. The title of a progress bar, or None for no bar.

        Yields:
            tuple: The `Pair` and what the function returned, in the order of the files.
        """

        def apply(sample):
            if isinstance(sample, BrokenSample):
                return sample, None
            try:
                return sample, function(sample)
            except UnreadableImage as error:
                return BrokenSample(sample.shard, sample.key, str(error)), None

        bar = tqdm(unit=" samples", disable=progress is None)
        waiting = collections.deque()
        # Rows of a table that name the same image follow one another.
        groups = itertools.groupby(self._samples(bar, progress), _image_file)
        with bar, futures.ThreadPoolExecutor(self._num_threads, "decode") as threads:
            try:
                for _, group in groups:
                    waiting.append(threads.submit(apply, _merged(*group)))
                    if len(waiting) > AHEAD * self._num_threads:
                        yield from self._intact(*waiting.popleft().result())
                while waiting:
                    yield from self._intact(*waiting.popleft().result())
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _samples(self, bar, progress):
        shards = self._reader.shards
        broken = []

        def report(shard, key, reason, details):
            if reason is not None:
                broken.append(BrokenSample(shard, key, reason, details))

        for number, shard in enumerate(shards, 1):
            bar.set_description_str(f"{progress}: shard {number} of {len(shards)}")
            for pair in self._reader.read(shard, report):
                yield from broken
                broken.clear()
                yield pair
                bar.update()
            yield from broken
            broken.clear()

    def _intact(self, sample, result):
        if isinstance(sample, Pair):
            yield sample, result
            return
        self._by_reason[sample.reason] += 1
        if len(self._first_broken) < MAX_EXAMPLES:
            self._first_broken.append(sample)


def _image_file(sample):
    """The name of a sample's image file; for any other sample, an object of its own."""
    is_file = isinstance(sample, Pair) and isinstance(sample.image, str)
    return sample.image if is_file else object()


def _merged(first, *others):
    if not others:
        return first
    captions = sum((other.captions for other in others), first.captions)
    return dataclasses.replace(first, captions=captions)
