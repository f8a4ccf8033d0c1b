"""Reads, decodes, crops and tokenizes samples."""

import dataclasses
import math

import numpy as np

from keras_cluster_mask.data.images import UnreadableImage
from keras_cluster_mask.data.pairs import Fault, SampleError
from keras_cluster_mask.data.tokenizing import tokenize

# The number of other samples of the batch that may replace a broken sample.
SUBSTITUTES = 64
# The distance between them, as a fraction of the batch, to reach different shards.
DISTANCE = 0.618
# The name of the entry of a chunk that lists its broken samples.
FAULTS = "faults"


@dataclasses.dataclass(frozen=True)
class Samples:
    """Turns positions into arrays. Picklable and thread-safe.

    The random numbers of a sample depend only on the seed and its position.

    Args:
        index: `Index`, `ObjectIndex`, or `Indexes`.
        order: `Order` or `Mix` in training; a range of all samples in evaluation.
        seed: int.
        batch_size: int. The global batch size.
        process: Pair of ints. The index of this process, and the number of processes.
        training: bool. Whether positions are endless, and broken samples are
            replaced.
        cutter: `Cutter`.
        choose: `CaptionChoice`.
        tokenizer: Function from a list of bytes to ints, or None.
        names: set of str. The entries of a batch.
        all_captions: bool. Whether `"captions"` are tuples of all captions.
        channels_first: bool.
        text_masking: `TextMasking` for the tokenizer's captions, or None.
    """

    index: object
    order: object
    seed: int
    batch_size: int
    process: tuple
    training: bool
    cutter: object
    choose: object
    tokenizer: object
    names: set
    all_captions: bool = False
    channels_first: bool = False
    text_masking: object = None

    @property
    def num_batches(self):
        """int. The number of batches in evaluation."""
        return -(-len(self.index) // self.batch_size)

    @property
    def rows(self):
        """int. The number of rows per process in a full batch, rounded up."""
        return -(-self.batch_size // self.process[1])

    def positions(self, batch):
        """Returns the range of the positions of this process in a batch."""
        first, count = batch * self.batch_size, self.batch_size
        if not self.training:
            count = max(min(count, len(self.index) - first), 0)
        index, processes = self.process
        return range(
            first + count * index // processes,
            first + count * (index + 1) // processes,
        )

    def pairs(self, positions):
        """Yields the `Pair` or `Fault` of each position."""
        return self.index.read([self.order[position] for position in positions])

    def read(self, positions):
        """Reads a chunk of a batch.

        Args:
            positions: Sequence of int.

        Returns:
            dict of arrays with one row for each position, and a list of `Fault` under
            `FAULTS`. Broken samples are replaced in training, and left out in
            evaluation.
        """
        faults, pairs, generators = [], [], []
        height, width = self.cutter.image_size
        images = np.empty((len(positions), height, width, 3), "uint8")
        for position, pair in zip(positions, self.pairs(positions)):
            generator = np.random.Generator(
                np.random.Philox(key=self.seed, counter=[0, position, 0, 0])
            )
            pair, image = self._image(pair, generator, faults)
            if image is None and self.training:
                pair, image = self._substitute(position, generator, pair)
            if image is not None:
                images[len(pairs)] = image
                # Free the encoded image, which may be large.
                pairs.append(pair._replace(image=None))
                generators.append(generator)
        images = images[: len(pairs)]
        if self.channels_first:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        batch = {"images": images, **self._texts(pairs, generators, positions)}
        return {name: batch[name] for name in self.names} | {FAULTS: faults}

    def _image(self, pair, generator, faults):
        """Returns a pair and its cropped image, or its fault and None."""
        if not isinstance(pair, Fault):
            try:
                return pair, self.cutter(pair.image, generator)
            except UnreadableImage as error:
                pair = Fault(pair.shard, pair.key, str(error))
            # Such as an error in the user's transform, or too little memory.
            except Exception as error:
                raise SampleError(pair.shard, pair.key, repr(error)) from error
        faults.append(pair)
        return pair, None

    def _substitute(self, position, generator, fault):
        """Returns another sample of the batch, to replace a broken one.

        It depends only on the batch, not on the number of processes.
        """
        start, size = position - position % self.batch_size, self.batch_size
        step = int(DISTANCE * size) + 1
        while math.gcd(step, size) > 1:
            step += 1
        count = 1
        while count < min(SUBSTITUTES, size):
            # Failed reads are slow, so read twice as many samples in each round.
            several = range(count, min(2 * count, SUBSTITUTES, size))
            count = several.stop
            near = [start + (position + n * step) % size for n in several]
            for pair in self.pairs(near):
                # A broken substitute is counted at its own position.
                pair, image = self._image(pair, generator, [])
                if image is not None:
                    return pair, image
        reason = f"{fault.reason}; {count - 1} others of its batch are broken, too"
        raise SampleError(fault.shard, fault.key, reason)

    def _texts(self, pairs, generators, positions):
        batch = {
            "keys": _strings([_encoded(pair.key) for pair in pairs]),
            "paths": _strings([_encoded(pair.path) for pair in pairs]),
        }
        if "labels" in self.names:
            batch["labels"] = np.array([pair.label for pair in pairs], "int32")
        if {"token_ids", "captions"} & {*self.names}:
            captions = [self.choose(p, g) for p, g in zip(pairs, generators)]
            if "token_ids" in self.names:
                batch["token_ids"] = self._token_ids(captions, generators, positions)
            if self.all_captions:
                captions = [self.choose.all_of(pair) for pair in pairs]
            batch["captions"] = _strings(captions)
        return batch

    def _token_ids(self, captions, generators, positions):
        if self.text_masking is None:
            return tokenize(self.tokenizer, captions)
        # In training no sample is left out, so each position has its caption.
        epochs = [self.order.place(position)[0] for position in positions]
        return self.text_masking.tokenize(self.tokenizer, captions, generators, epochs)


class Indexes:
    """A concatenation of several indexes.

    Args:
        indexes: list of `Index` and `ObjectIndex`.
    """

    def __init__(self, indexes):
        self.indexes = indexes
        self._starts = np.cumsum([0, *map(len, indexes)])

    def __len__(self):
        return int(self._starts[-1])

    def read(self, numbers):
        """Yields samples; see `Index.read`."""
        numbers = np.asarray(numbers)
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        readers = {
            i: self.indexes[i].read((numbers[which == i] - self._starts[i]).tolist())
            for i in np.unique(which)
        }
        for index in which:
            yield next(readers[index])


def _encoded(text):
    # Always UTF-8; `os.fsencode` depends on the locale.
    return text.encode("utf-8", "surrogateescape")


def _strings(values):
    """Returns an object array of bytes, or of tuples of bytes, one per sample."""
    array = np.empty(len(values), object)
    # One by one, because NumPy would convert tuples of equal length to rows.
    for index, value in enumerate(values):
        array[index] = value
    return array
