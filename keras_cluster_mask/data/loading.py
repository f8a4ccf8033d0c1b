"""Turns samples into batches: which samples a batch holds, and their arrays."""

import bisect
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from keras_cluster_mask.data import files, tokenizing
from keras_cluster_mask.data.images import Images, UnreadableImage
from keras_cluster_mask.data.order import Order
from keras_cluster_mask.data.samples import (
    Fault,
    Fields,
    Sample,
    SampleError,
    read_named_files,
)
from keras_cluster_mask.data.sources import read_items
from keras_cluster_mask.data.text_masking import TextMasking, check_text_masking

# The smallest and the largest number of rows of a batch that one thread reads together.
TOGETHER = 8, 32
# The numbers of other samples that are read, one after the other, to replace a broken
# sample. Failed reads are slow, so each is twice the one before.
SUBSTITUTES = 1, 2, 4, 8, 16, 32
# The entry of a batch for the tokenizer, if that is a Keras layer.
TEXTS = "texts"
# The entry of a batch with its broken samples, the number of samples of each source,
# and the number of captions that are dropped.
REPORT = "report"


class Spec(NamedTuple):
    """The shape, with `None` for unknown sizes, and the dtype of an array."""

    shape: tuple
    dtype: str


@dataclasses.dataclass
class Captions:
    """Chooses a caption for each sample, and tokenizes it. See `image_text_dataset`.

    Args:
        tokenizer: The tokenizer, or `None`.
        training: Boolean. Whether to draw captions at random, instead of taking the
            first, and to mask captions.
        text_masking: `TextMasking` of captions that are too long, or `None`. The
            attribute is `None` in evaluation, which masks no caption.
        include_captions: Boolean. Whether batches contain all captions.
    """

    tokenizer: Any
    training: bool
    text_masking: TextMasking | None = None
    include_captions: bool = False

    def __post_init__(self):
        tokenizing.check_tokenizer(self.tokenizer)
        if self.text_masking is not None:
            check_text_masking(self.text_masking, self.tokenizer)
            self.text_masking = self.text_masking if self.training else None
        self.has_layer = tokenizing.is_layer(self.tokenizer)
        # Whether samples need a caption.
        self.are_read = self.tokenizer is not None or self.include_captions

    def __getstate__(self):
        # A Keras layer runs in the main process; worker processes do not import Keras.
        return {**vars(self), **({"tokenizer": None} if self.has_layer else {})}

    def batch(self, rows):
        """Returns the entries of a batch, with the arguments of `tokenize` for a layer.

        Args:
            rows: List of `Row`.
        """
        if not self.are_read:
            return {}
        batch, texts = {}, []
        for _, _, sample, _, generator, _ in rows:
            captions, number = sample.captions, 0
            if self.training and len(captions) > 1:
                number = int(generator.integers(len(captions)))
            texts.append(captions[number])
        if self.include_captions:
            # `np.array` would convert tuples of equal length to rows.
            captions = (row.sample.captions for row in rows)
            batch["captions"] = np.fromiter(captions, object)
        arguments = texts, [row.generator for row in rows], [row.epoch for row in rows]
        if self.has_layer:
            batch[TEXTS] = arguments
        elif self.tokenizer is not None:
            batch["token_ids"] = self.tokenize(*arguments, self.tokenizer)
        return batch

    def tokenize(self, texts, generators, epochs, tokenizer):
        """Converts the chosen captions of a batch to token ids."""
        if self.text_masking is None:
            return tokenizing.tokenize(tokenizer, texts)
        return self.text_masking.tokenize(tokenizer, texts, generators, epochs)


class Row(NamedTuple):
    """A row of a batch that is read.

    Attributes:
        source: Integer. The number of the source of the sample in a mix.
        number: Integer. The number of the sample.
        sample: `Sample` with its pixels; `None` if it is broken, in evaluation.
        fault: `Fault`, if the sample of this position is broken.
        generator: `np.random.Generator`.
        epoch: Integer, in training.
    """

    source: int
    number: int
    sample: Sample | None
    fault: Fault | None
    generator: np.random.Generator
    epoch: int


@dataclasses.dataclass
class Batches:
    """Reads batches of a source by their number. Picklable and thread-safe.

    The random numbers of a sample depend only on the seed and its position.

    Args:
        source: The source, a `Concatenation` if several are mixed.
        order: `Order` in training, `range` in evaluation.
        images: `Images`.
        captions: `Captions`.
        fields: `Fields`. The fields of a sample that are read.
        batch_size: Integer. The global batch size.
        seed: Integer.
        process: Pair of integers. The index of this process, and the number of
            processes.
        include_keys: Boolean.
    """

    source: Any
    order: Order | range
    images: Images
    captions: Captions
    fields: Fields
    batch_size: int
    seed: int
    process: tuple[int, int]
    include_keys: bool

    def __post_init__(self):
        self.training = isinstance(self.order, Order)
        # Of the sources that are mixed.
        self.lengths = self.order.lengths if self.training else [len(self.source)]

    @property
    def element_spec(self):
        """Dictionary from the name of each entry of a batch to its `Spec`."""
        captions = self.captions
        rows = self.batch_size // self.process[1] if self.training else None
        text_length = tokenizing.length_of(captions.tokenizer)
        specs = {
            "images": Spec((rows, *self.images.shape), "uint8"),
            "token_ids": captions.tokenizer and Spec((rows, text_length), "int32"),
            "captions": captions.include_captions and Spec((rows,), "object"),
            "keys": self.include_keys and Spec((rows,), "string"),
            "labels": self.fields.labels and Spec((rows,), "int32"),
        }
        return {name: spec for name, spec in specs.items() if spec}

    def positions(self, batch):
        """Returns the range of the positions of this process in a batch."""
        first, count = batch * self.batch_size, self.batch_size
        if not self.training:
            count = max(min(count, len(self.source) - first), 0)
        index, processes = self.process
        return range(
            first + count * index // processes, first + count * (index + 1) // processes
        )

    def in_threads(self, count, ahead, numbers, stack):
        """Reads batches in threads of this process.

        Args:
            count: Integer. The number of threads that share the rows of batches.
            ahead: Integer. The number of batches that are read ahead.
            numbers: Range. The numbers of the batches.
            stack: `contextlib.ExitStack`. Closing it ends the threads.

        Yields:
            The batches, in order.
        """
        rows, several = (stack.enter_context(files.Threads(n)) for n in (count, ahead))
        # A batch begins as soon as there are free threads, before the last one is done.
        return several.in_order(functools.partial(self.read, rows), numbers, ahead)

    def read(self, threads, batch):
        """Reads a batch.

        Args:
            threads: `Threads`, which share the rows.
            batch: Integer. The number of the batch.

        Returns:
            Dictionary of arrays, and under `REPORT` the arguments of
            `SkippedSamples.report` and the number of captions that are dropped. Broken
            samples are replaced in training, and skipped in evaluation.
        """
        positions = self.positions(batch)
        size = int(np.clip(-(-len(positions) // threads.count), *TOGETHER))
        # A block of neighbors is one request.
        size += -size % (self.order.block_size if self.training else 1)
        groups = [positions[i : i + size] for i in range(0, len(positions), size)]
        read = [row for group in threads.map(self._rows, groups) for row in group]
        rows = [row for row in read if row.sample]
        samples = [row.sample for row in rows]
        pixels = np.array([sample.pixels for sample in samples], "uint8")
        arrays = {
            "images": pixels.reshape(-1, *self.images.shape),
            **self.captions.batch(rows),
        }
        if self.include_keys:
            arrays["keys"] = np.fromiter((x.key for x in samples), object)
        if self.fields.labels:
            arrays["labels"] = np.array([sample.label for sample in samples], "int32")
        sources = [row.source for row in read]
        counts = np.bincount(sources, minlength=len(self.lengths)).tolist()
        faults = [(row.source, row.number, row.fault) for row in read if row.fault]
        unused = 0
        if not self.captions.include_captions:
            unused = sum(len(sample.captions[1:]) for sample in samples)
        return {**arrays, REPORT: (faults, counts, unused)}

    def _rows(self, positions):
        """Reads the `Row` of each position."""
        numbers = [self.order[position] for position in positions]
        generators = [
            np.random.Generator(np.random.Philox(key=self.seed, counter=[0, n, 0, 0]))
            for n in positions
        ]
        ends, rows = [*itertools.accumulate(self.lengths)], []
        samples = self._samples(numbers, generators)
        for position, number, generator, sample in zip(
            positions, numbers, generators, samples
        ):
            source, fault = bisect.bisect_right(ends, number), None
            if isinstance(sample, Fault):
                fault, sample = sample, None
                if self.training:
                    within = range(ends[source] - self.lengths[source], ends[source])
                    sample = self._substitute(within, generator, fault)
            epoch = position // ends[-1]
            rows.append(Row(source, number, sample, fault, generator, epoch))
        return rows

    def _samples(self, numbers, generators):
        """Yields each `Sample`, with its pixels, or its `Fault`."""
        items = read_items(self.source, numbers)
        samples = read_named_files([*map(self.fields.sample, items)])
        for sample, generator in zip(samples, generators):
            if isinstance(sample, Sample):
                try:
                    pixels = self.images(sample.image, generator)
                    sample = sample._replace(image=None, pixels=pixels)
                except UnreadableImage as error:
                    sample = Fault(sample.file, sample.key, str(error))
                # Such as an error in the user's transform, or too little memory.
                except Exception as error:
                    raise SampleError(sample.file, sample.key, repr(error)) from error
            yield sample

    def _substitute(self, within, generator, fault):
        """Returns a random sample of a range of numbers, to replace a broken one."""
        several = min(sum(SUBSTITUTES), len(within))
        chosen = generator.choice(len(within), several, replace=False).tolist()
        others = iter([within[place] for place in chosen])
        for count in SUBSTITUTES:
            some = [*itertools.islice(others, count)]
            for sample in self._samples(some, itertools.repeat(generator)):
                # A broken substitute is counted at its own position.
                if isinstance(sample, Sample):
                    return sample
        reason = fault.reason + (f" ({fault.details})" if fault.details else "")
        reason += f"; {several} other samples of the same source are broken, too"
        raise SampleError(fault.file, fault.key, reason)
