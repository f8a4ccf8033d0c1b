"""Turns samples into the arrays of a batch."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.data import files, tokenizing
from keras_cluster_mask.data.images import Images, UnreadableImage, name_of
from keras_cluster_mask.data.pairs import Fault, SampleError
from keras_cluster_mask.data.reading import Reading
from keras_cluster_mask.data.text_masking import TextMasking, check_text_masking

# The smallest and the largest number of rows of a batch that one thread reads together.
TOGETHER = 8, 32
# The numbers of other samples of the batch that are read, one after the other, to
# replace a broken sample. Failed reads are slow, so each is twice the one before.
SUBSTITUTES = 1, 2, 4, 8, 16, 32
# The distance between them, as a fraction of the batch, to reach different shards.
DISTANCE = 0.618
# The entry of a batch for the tokenizer, if that is a Keras layer.
TEXTS = "texts"
# The entry of a batch with its broken samples, and the number of captions left out.
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

    @property
    def description(self):
        """dict. The settings that a resumed run must share."""
        tokenizer, masking = self.tokenizer, self.text_masking
        size = tokenizing.vocabulary_size_of(tokenizer)
        length = tokenizing.length_of(tokenizer)
        return {
            "tokenizer": [name_of(tokenizer), size, length],
            "text_masking": None if masking is None else repr(masking),
            "include_captions": not self.training and self.include_captions,
        }

    def batch(self, pairs, generators, epochs):
        """Returns the entries of a batch, with the arguments of `tokenize` for a layer.

        Args:
            pairs: List of `Pair`.
            generators: List of `np.random.Generator`, one for each pair.
            epochs: List of integers. The epoch of each pair in training.
        """
        if not self.are_read:
            return {}
        batch, chosen = {}, []
        for pair, generator in zip(pairs, generators):
            number = 0
            if self.training and len(pair.captions) > 1:
                number = int(generator.integers(len(pair.captions)))
            chosen.append(pair.captions[number].encode("utf-8", "surrogatepass"))
        if self.include_captions:
            captions = chosen
            if self.include_captions == "all":
                captions = (
                    tuple(x.encode("utf-8", "surrogatepass") for x in pair.captions)
                    for pair in pairs
                )
            # `np.array` would convert tuples of equal length to rows.
            batch["captions"] = np.fromiter(captions, object)
        if self.has_layer:
            batch[TEXTS] = chosen, generators, epochs
        elif self.tokenizer is not None:
            batch["token_ids"] = self.tokenize(chosen, generators, epochs)
        return batch

    def tokenize(self, texts, generators, epochs):
        """Converts the chosen captions of a batch to token ids."""
        if self.text_masking is None:
            return tokenizing.tokenize(self.tokenizer, texts)
        return self.text_masking.tokenize(self.tokenizer, texts, generators, epochs)


@dataclasses.dataclass
class Samples:
    """Reads batches by their number. Picklable and thread-safe.

    The random numbers of a sample depend only on the seed and its position.

    Args:
        images: `Images`.
        captions: `Captions`.
        reading: `Reading`.
        include_keys: Boolean.
    """

    images: Images
    captions: Captions
    reading: Reading
    include_keys: bool = False

    @property
    def element_spec(self):
        """Dictionary from the name of each entry of a batch to its `Spec`."""
        reading, captions = self.reading, self.captions
        rows = reading.rows if reading.training else None
        included, text = captions.include_captions, Spec((rows,), "string")
        of_captions = Spec((rows,), "object") if included == "all" else text
        token_ids = Spec((rows, tokenizing.length_of(captions.tokenizer)), "int32")
        specs = {
            "images": Spec((rows, *self.images.shape), "uint8"),
            "token_ids": captions.tokenizer is not None and token_ids,
            "captions": included and of_captions,
            "keys": self.include_keys and text,
            "labels": reading.fields.labels and Spec((rows,), "int32"),
        }
        return {name: spec for name, spec in specs.items() if spec}

    @property
    def description(self):
        """Dictionary. The settings that a resumed run must share."""
        settings = self.reading.description | self.images.description
        return settings | self.captions.description

    @files.one_step()
    def read(self, threads, batch):
        """Reads a batch.

        Args:
            threads: `Threads`, which share the rows.
            batch: Integer. The number of the batch.

        Returns:
            Dictionary of arrays, and under `REPORT` a list of `Fault` and the number of
            captions left out. Broken samples are replaced in training, and left out in
            evaluation.
        """
        positions = self.reading.positions(batch)
        size = int(np.clip(-(-len(positions) // threads.count), *TOGETHER))
        # A block of neighbors is one request.
        size += -size % (self.reading.block_size or 1)
        groups = [positions[i : i + size] for i in range(0, len(positions), size)]
        results = [*threads.map(self._read, groups)]
        rows = [row for found, _ in results for row in found]
        pairs, generators, epochs = zip(*rows) if rows else ((), (), ())
        images = np.array([pair.image for pair in pairs], "uint8")
        arrays = {
            "images": images.reshape(-1, *self.images.shape),
            **self.captions.batch(pairs, generators, epochs),
        }
        if self.include_keys:
            # Always UTF-8; `os.fsencode` depends on the locale.
            keys = (pair.key.encode("utf-8", "surrogateescape") for pair in pairs)
            arrays["keys"] = np.fromiter(keys, object)
        if self.reading.fields.labels:
            arrays["labels"] = np.array([pair.label for pair in pairs], "int32")
        faults = [fault for _, found in results for fault in found]
        unused = 0
        if self.captions.include_captions != "all":
            unused = sum(len(pair.captions[1:]) for pair in pairs)
        return {**arrays, REPORT: (faults, unused)}

    def _read(self, positions):
        """Reads a group of rows.

        Returns:
            Tuple: A list of the decoded `Pair`, the generator and the epoch of each
            row, and a list of `Fault`.
        """
        reading, rows, faults = self.reading, [], []
        for position, sample in zip(positions, reading.read(positions)):
            bits = np.random.Philox(key=reading.seed, counter=[0, position, 0, 0])
            generator = np.random.Generator(bits)
            sample = self._decoded(sample, generator)
            if isinstance(sample, Fault):
                faults.append(sample)
                if not reading.training:
                    continue
                sample = self._substitute(position, generator, sample)
            epoch = reading.order.place(position)[0] if reading.training else 0
            rows.append((sample, generator, epoch))
        return rows, faults

    def _decoded(self, sample, generator):
        """Returns a `Pair` with its cropped image, or a `Fault`."""
        if isinstance(sample, Fault):
            return sample
        try:
            return sample._replace(image=self.images(sample.image, generator))
        except UnreadableImage as error:
            return Fault(sample.shard, sample.key, str(error))
        # Such as an error in the user's transform, or too little memory.
        except Exception as error:
            raise SampleError(sample.shard, sample.key, repr(error)) from error

    def _substitute(self, position, generator, fault):
        """Returns another sample of the batch, decoded, to replace a broken one.

        Which samples are tried depends only on the batch, not on the number of
        processes.
        """
        size, tried = self.reading.batch_size, 0
        start = position - position % size
        step = int(DISTANCE * size) + 1
        while math.gcd(step, size) > 1:
            step += 1
        for count in SUBSTITUTES:
            several = range(count, min(2 * count, size))
            tried += len(several)
            others = [start + (position + n * step) % size for n in several]
            for sample in self.reading.read(others):
                # A broken substitute is counted at its own position.
                sample = self._decoded(sample, generator)
                if not isinstance(sample, Fault):
                    return sample
        reason = fault.reason + (f" ({fault.details})" if fault.details else "")
        reason += f"; {tried} others of its batch are broken, too"
        raise SampleError(fault.shard, fault.key, reason)
