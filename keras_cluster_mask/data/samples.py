"""Turns samples into the arrays of a batch."""

import dataclasses
import typing

import numpy as np

from keras_cluster_mask.data import files
from keras_cluster_mask.data.captions import Captions, strings
from keras_cluster_mask.data.images import Images, UnreadableImage
from keras_cluster_mask.data.pairs import Fault, SampleError
from keras_cluster_mask.data.reading import Reading
from keras_cluster_mask.data.tokenizing import length_of

# The smallest and the largest number of rows of a batch that one thread reads together.
TOGETHER = 8, 32
# The name of the entry of a batch that lists its broken samples.
FAULTS = "faults"
# The name of the entry that counts the captions that are not in a batch.
UNUSED = "unused captions"


class Spec(typing.NamedTuple):
    """The shape, with `None` for unknown sizes, and the dtype of an array."""

    shape: tuple
    dtype: str


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
        token_ids = Spec((rows, length_of(captions.tokenizer)), "int32")
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
        parts = self.reading, self.images, self.captions
        return {k: v for part in parts for k, v in part.description.items()}

    @files.one_step()
    def read(self, threads, batch):
        """Reads a batch.

        Args:
            threads: `Threads`, which share the rows.
            batch: Integer. The number of the batch.

        Returns:
            Dictionary of arrays, a list of `Fault` under `FAULTS`, and an integer under
            `UNUSED`. Broken samples are replaced in training, and left out in
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
        arrays = {
            "images": self.images.batch([pair.image for pair in pairs]),
            **self.captions.batch(pairs, generators, epochs),
        }
        if self.include_keys:
            # Always UTF-8; `os.fsencode` depends on the locale.
            keys = (pair.key.encode("utf-8", "surrogateescape") for pair in pairs)
            arrays["keys"] = strings(keys)
        if self.reading.fields.labels:
            arrays["labels"] = np.array([pair.label for pair in pairs], "int32")
        faults = [fault for _, found in results for fault in found]
        unused = 0
        if self.captions.include_captions != "all":
            unused = sum(len(pair.captions[1:]) for pair in pairs)
        return {**arrays, FAULTS: faults, UNUSED: unused}

    def _read(self, positions):
        """Reads a group of rows.

        Returns:
            Tuple: A list of the decoded `Pair`, the generator and the epoch of each
            row, and a list of `Fault`.
        """
        rows, faults = [], []
        for position, sample in zip(positions, self.reading.read(positions)):
            generator = self.reading.generator(position)
            sample = self._decoded(sample, generator)
            if isinstance(sample, Fault):
                faults.append(sample)
                if not self.reading.training:
                    continue
                sample = self._substitute(position, generator, sample)
            rows.append((sample, generator, self.reading.epoch(position)))
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
        """Returns another sample of the batch, decoded, to replace a broken one."""
        tried = 0
        for group in self.reading.substitutes(position):
            tried += len(group)
            for sample in self.reading.read(group):
                # A broken substitute is counted at its own position.
                sample = self._decoded(sample, generator)
                if not isinstance(sample, Fault):
                    return sample
        reason = fault.reason + (f" ({fault.details})" if fault.details else "")
        reason += f"; {tried} others of its batch are broken, too"
        raise SampleError(fault.shard, fault.key, reason)
