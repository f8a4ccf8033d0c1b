"""Turns samples into batches: which samples a batch holds, and their arrays."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_cluster_mask.checks import (
    check_choice,
    check_integer,
    check_range,
    is_positive,
)
from keras_cluster_mask.data import files, tokenizing
from keras_cluster_mask.data.images import Images, UnreadableImage
from keras_cluster_mask.data.index import no_intact_sample, open_index
from keras_cluster_mask.data.order import Mix, Order
from keras_cluster_mask.data.samples import Fault, Fields, Sample, SampleError
from keras_cluster_mask.data.sampling import Sampling
from keras_cluster_mask.data.text_masking import TextMasking, check_text_masking

# The largest default block size for object stores and Parquet, and the number of
# blocks that a batch must contain to be well mixed.
BLOCK, RUNS = 64, 16
# The maximum number of samples that are read to check that they have the requested
# fields.
EXAMPLES = 8
# The smallest and the largest number of rows of a batch that one thread reads together.
TOGETHER = 8, 32
# The numbers of other samples that are read together, one group after the other, to
# replace a broken sample. Failed reads are slow, so each is twice the one before.
SUBSTITUTES = 1, 2, 4, 8, 16, 32
# The entry of a batch for the tokenizer, if that is a Keras layer.
TEXTS = "texts"
# The entry of a batch with what was read, and the number of captions left out.
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
        include_captions: Boolean, or `"all"`. Whether batches contain the captions.
    """

    tokenizer: Any
    training: bool
    text_masking: TextMasking | None = None
    include_captions: bool | str = False

    def __post_init__(self):
        check_choice("include_captions", self.include_captions, (False, True, "all"))
        tokenizing.check_tokenizer(self.tokenizer)
        if self.text_masking is not None:
            check_text_masking(self.text_masking, self.tokenizer)
            self.text_masking = self.text_masking if self.training else None
        self.has_layer = tokenizing.is_layer(self.tokenizer)
        # Whether samples need a caption.
        self.are_read = self.tokenizer is not None or bool(self.include_captions)

    def __getstate__(self):
        # A Keras layer runs in the main process; worker processes do not import Keras.
        return {**vars(self), **({"tokenizer": None} if self.has_layer else {})}

    def batch(self, samples, generators, epochs):
        """Returns the entries of a batch, with the arguments of `tokenize` for a layer.

        Args:
            samples: List of `Sample`.
            generators: List of `np.random.Generator`, one for each sample.
            epochs: List of integers. The epoch of each sample in training.
        """
        if not self.are_read:
            return {}
        batch, chosen = {}, []
        for sample, generator in zip(samples, generators):
            number = 0
            if self.training and len(sample.captions) > 1:
                number = int(generator.integers(len(sample.captions)))
            chosen.append(sample.captions[number].encode("utf-8", "surrogatepass"))
        if self.include_captions:
            captions = chosen
            if self.include_captions == "all":
                captions = (
                    tuple(x.encode("utf-8", "surrogatepass") for x in sample.captions)
                    for sample in samples
                )
            # `np.array` would convert tuples of equal length to rows.
            batch["captions"] = np.fromiter(captions, object)
        if self.has_layer:
            batch[TEXTS] = chosen, generators, epochs
        elif self.tokenizer is not None:
            batch["token_ids"] = self.tokenize(
                chosen, generators, epochs, self.tokenizer
            )
        return batch

    def tokenize(self, texts, generators, epochs, tokenizer):
        """Converts the chosen captions of a batch to token ids."""
        if self.text_masking is None:
            return tokenizing.tokenize(tokenizer, texts)
        return self.text_masking.tokenize(tokenizer, texts, generators, epochs)


@dataclasses.dataclass
class Batches:
    """Reads batches of a source by their number. Picklable and thread-safe.

    The random numbers of a sample depend only on the seed and its position.

    Args:
        source: See `image_text_dataset`; also for the arguments without description.
        images: `Images`.
        captions: `Captions`.
        fields: `Fields`. The fields of a sample that are read.
        batch_size: Integer. The global batch size.
        training: Boolean. Whether positions are endless and shuffled.
        seed: Integer.
        sampling: `Sampling`, or `None`.
        block_size: Integer, or `None`, as in evaluation.
        process: Pair of integers. The index of this process, and the number of
            processes.
        num_workers: Integer.
        index_dir: String or path, or `None`.
        max_skipped: Float.
        include_keys: Boolean.

    Attributes:
        indexes: List of `Index` and `ObjectIndex`, one for each source.
        names: List of strings, the names of the sources in messages.
        lengths: List of numbers. The mean number of samples of each source in a pass
            of all processes, without repetitions.
        weights: List of floats, the weights of several sources, or `None`.
        num_samples: Integer. The number of intact samples.
        orders: List of `Order`, one for each source, in training.
        order: `Order` or `Mix` of them, in training.
        rows: Integer. The number of rows per process in a full batch.
    """

    source: dataclasses.InitVar[Any]
    images: Images
    captions: Captions
    fields: Fields
    batch_size: int
    training: bool
    seed: int
    sampling: dataclasses.InitVar[Sampling | None]
    block_size: int | None
    process: tuple[int, int] | None
    num_workers: int
    index_dir: dataclasses.InitVar[Any]
    max_skipped: float
    include_keys: bool

    def __post_init__(self, source, sampling, index_dir):
        self.batch_size = check_integer("batch_size", self.batch_size, 1)
        self.seed = check_integer("seed", self.seed, 0)
        self.num_workers = check_integer("num_workers", self.num_workers, 0)
        check_range("max_skipped", self.max_skipped, 0, 1)
        if self.process is None:
            # Imported here, because worker processes do not import Keras.
            from keras_cluster_mask.distribution.replicas import process_index_and_count

            self.process = process_index_and_count(self.training)
        index, count = self.process
        if not 0 <= index < count:
            raise ValueError(
                "`process` must be a pair (number, count) with 0 <= number < count. "
                f"Received: process={self.process}"
            )
        if self.batch_size % count:
            raise ValueError(
                "`batch_size` is global and must be divisible by the number of "
                f"processes. Received: batch_size={self.batch_size}, {count} processes"
            )
        self.process, self.rows = (index, count), self.batch_size // count
        if not self.training and (sampling, self.block_size) != (None, None):
            raise ValueError(
                "`sampling` and `block_size` are for training, and evaluation reads "
                "all of `source` in order: give it a separate source. Received: "
                f"sampling={sampling!r}, block_size={self.block_size}, training=False"
            )
        self._open(source, sampling, index_dir)
        if self.training:
            self._shuffle(sampling)

    def _open(self, source, sampling, index_dir):
        """Opens the indexes, and checks that samples have all requested fields."""
        self.weights, sources, self.names = None, [source], ["`source`"]
        if isinstance(source, Mapping):
            self.weights, sources = [*source.values()], [*source]
            is_valid = sources and all(map(is_positive, self.weights))
            if not (is_valid and self.training and sampling is None):
                raise ValueError(
                    "`source` as a dict from sources to positive weights is for "
                    f"training without `sampling`. Received: source={source!r}, "
                    f"training={self.training}, sampling={sampling!r}"
                )
            self.weights = [*map(float, self.weights)]
            self.names = [f"`source[{each!r}]`" for each in sources]
        self.indexes = [
            open_index(each, self.fields, index_dir, process=self.process)
            for each in sources
        ]
        self.lengths = [*map(len, self.indexes)]
        self.num_samples = sum(self.lengths)
        for index in self.indexes:
            # An index has no field values, such as labels, and no images at URLs, so
            # read a few samples.
            step = len(index) // EXAMPLES + 1
            examples = [*index.read(range(0, len(index), step))]
            if not any(isinstance(example, Sample) for example in examples):
                raise no_intact_sample(index, examples)

    def _shuffle(self, sampling):
        """Sets the order of training, and the default of `block_size`."""
        block_size, batch_size = self.block_size, self.batch_size
        processes = self.process[1]
        if block_size is None:
            paths = [path for index in self.indexes for path in index.paths]
            # Neighbors are read much faster together than one by one.
            is_slow = any(x.endswith(".parquet") or files.is_address(x) for x in paths)
            block_size = math.gcd(batch_size, BLOCK) if is_slow else 1
            while block_size > 1 and batch_size < block_size * RUNS:
                block_size //= 2
        self.block_size = check_integer("block_size", block_size, 1)
        if batch_size % block_size or batch_size // block_size % processes:
            raise ValueError(
                "`block_size` must divide `batch_size`, and the number of processes "
                "must divide the number of blocks in a batch. Received: "
                f"block_size={block_size}, batch_size={batch_size}, "
                f"{processes} processes"
            )
        if not isinstance(sampling, Sampling | None):
            raise ValueError(
                "`sampling` must be a `kcm.data.Sampling` of a dictionary or of keys, "
                f"or None. Received: sampling={sampling!r}"
            )
        draw = sampling and sampling.of_index(self.indexes[0])
        self.orders = orders = [
            Order(len(index), self.seed, self.block_size, draw, source)
            for source, index in enumerate(self.indexes)
        ]
        self.order = Mix(orders, self.weights) if self.weights else orders[0]
        if sampling:
            self.lengths = [min(self.order.mean_length, self.num_samples)]

    @property
    def element_spec(self):
        """Dictionary from the name of each entry of a batch to its `Spec`."""
        captions, rows = self.captions, self.rows if self.training else None
        included, text = captions.include_captions, Spec((rows,), "string")
        of_captions = Spec((rows,), "object") if included == "all" else text
        token_ids = Spec((rows, tokenizing.length_of(captions.tokenizer)), "int32")
        specs = {
            "images": Spec((rows, *self.images.shape), "uint8"),
            "token_ids": captions.tokenizer is not None and token_ids,
            "captions": included and of_captions,
            "keys": self.include_keys and text,
            "labels": self.fields.labels and Spec((rows,), "int32"),
        }
        return {name: spec for name, spec in specs.items() if spec}

    def positions(self, batch):
        """Returns the range of the positions of this process in a batch."""
        first, count = batch * self.batch_size, self.batch_size
        if not self.training:
            count = max(min(count, self.num_samples - first), 0)
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
        read = functools.partial(self.read, rows)
        return several.in_order(read, numbers, ahead)

    @files.one_step()
    def read(self, threads, batch):
        """Reads a batch.

        Args:
            threads: `Threads`, which share the rows.
            batch: Integer. The number of the batch.

        Returns:
            Dictionary of arrays, and under `REPORT` the list of what was read, see
            `SkippedSamples.report`, and the number of captions left out. Broken samples
            are replaced in training, and left out in evaluation.
        """
        positions = self.positions(batch)
        size = int(np.clip(-(-len(positions) // threads.count), *TOGETHER))
        # A block of neighbors is one request.
        size += -size % (self.block_size or 1)
        groups = [positions[i : i + size] for i in range(0, len(positions), size)]
        results = [*threads.map(self._rows, groups)]
        rows = [row for found, _ in results for row in found]
        samples, generators, epochs = zip(*rows) if rows else ((), (), ())
        pixels = np.array([sample.pixels for sample in samples], "uint8")
        arrays = {
            "images": pixels.reshape(-1, *self.images.shape),
            **self.captions.batch(samples, generators, epochs),
        }
        if self.include_keys:
            arrays["keys"] = np.fromiter((x.key for x in samples), object)
        if self.fields.labels:
            arrays["labels"] = np.array([sample.label for sample in samples], "int32")
        found = [each for _, found in results for each in found]
        unused = 0
        if self.captions.include_captions != "all":
            unused = sum(len(sample.captions[1:]) for sample in samples)
        return {**arrays, REPORT: (found, unused)}

    def _rows(self, positions):
        """Reads a group of rows.

        Returns:
            Tuple: A list of the `Sample`, the generator and the epoch of each row, and
            a list of the source of each position and its `Fault` or `None`.
        """
        rows, found = [], []
        places = [self.order[n] if self.training else (0, n) for n in positions]
        generators = [
            np.random.Generator(
                np.random.Philox(key=self.seed, counter=[0, position, 0, 0])
            )
            for position in positions
        ]
        for position, (source, _), generator, sample in zip(
            positions, places, generators, self._samples(places, generators)
        ):
            fault = sample if isinstance(sample, Fault) else None
            found.append((source, fault))
            epoch = self.order.place(position)[0] if self.training else 0
            if fault:
                if not self.training:
                    continue
                sample = self._substitute(source, epoch, generator, fault)
            rows.append((sample, generator, epoch))
        return rows, found

    def _samples(self, places, generators):
        """Yields the `Sample` of each place, with its pixels, or its `Fault`.

        Args:
            places: List of the number of the source and the number there.
            generators: Iterable of `np.random.Generator`.
        """
        readers = {
            source: self.indexes[source].read([n for s, n in places if s == source])
            for source in {source for source, _ in places}
        }
        for (source, _), generator in zip(places, generators):
            sample = next(readers[source])
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

    def _substitute(self, source, epoch, generator, fault):
        """Returns another sample of the source, decoded, to replace a broken one.

        It may be any of the epoch, since another row of the batch would be there twice.
        """
        others = self.orders[source].draw(epoch, sum(SUBSTITUTES), generator)
        for count in SUBSTITUTES:
            # There are `count - 1` before.
            several = others[count - 1 : 2 * count - 1]
            for sample in self._samples(several, itertools.repeat(generator)):
                # A broken substitute is counted at its own position.
                if isinstance(sample, Sample):
                    return sample
        reason = fault.reason + (f" ({fault.details})" if fault.details else "")
        reason += f"; {len(others)} drawn in its place are broken, too"
        raise SampleError(fault.file, fault.key, reason)
