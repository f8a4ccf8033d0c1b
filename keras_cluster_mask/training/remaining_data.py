"""The part of the training data that is left at some step, and its samples."""

import collections
import hashlib
import itertools
import json

import numpy as np
from keras import tree

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.distribution.processes import all_gather_object

# An entry of batches that names their samples.
SAMPLE_ID = "sample_id"
# More batches than any pipeline reads ahead.
REMEMBERED = 256


def check_same_everywhere(description):
    """Raises an error unless all processes read the same data in the same order."""
    content = json.dumps(description, sort_keys=True).encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big")
    if len({*all_gather_object(number >> 1)}) > 1:
        raise ValueError(
            "`x` must be the same data, in the same order, in all processes: check "
            "that all see the same shards, and pass the same `seed`. Received here: "
            f"{description}"
        )


class RemainingData:
    """Training data, of which a resumed run reads the part it has not trained on.

    Three kinds can be read from a step on. An `image_text_dataset` starts with any
    batch. A `tf.data.Dataset` skips steps. Arrays are sliced, if they are not shuffled.
    Other data can only be read from the start of an epoch.

    Args:
        data: What is passed to `fit`.
        batch_size: Integer, of arrays.
        shuffle: Boolean. Whether Keras shuffles arrays.
        steps_per_epoch: Integer, of data that continues over the ends of epochs, or
            `None`.
        epoch: Integer, the first epoch that is trained.
        remembers_ids: Boolean. Whether `samples` will be asked for.

    Attributes:
        origin: A tuple of integers: an epoch, and how many batches of the data lie
            before its first step. A stream continues where the last `fit` on it ended.
    """

    def __init__(
        self, data, batch_size, shuffle, steps_per_epoch, epoch=0, remembers_ids=False
    ):
        self.data = data
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.steps_per_epoch = steps_per_epoch
        self.stream = stream_of(data)
        self._ids = collections.OrderedDict()
        self._start = 0, 0
        self._remembers_ids = remembers_ids
        self.origin = epoch, 0
        if self.stream is not None:
            self.origin = epoch, self.stream.start

    def describe(self):
        """What must be the same for a step to be found again, as a dictionary."""
        return {
            **({} if self.stream is None else self.stream.description),
            "data.steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def has_known_order(self):
        """Whether the order of samples is the data's own, and not drawn by a loader."""
        is_arrays = isinstance(self.data, (dict, tuple, list))
        return not self.shuffle if is_arrays else hasattr(self.data, "element_spec")

    def check_resumable(self, within_epochs):
        """Raises if a step within an epoch, or any, could not be found again."""
        if self.stream is not None or hasattr(self.data, "skip"):
            return
        if self.steps_per_epoch is not None:
            raise ValueError(
                "`steps_per_epoch` needs data that can be read from the end of an "
                "epoch on: an `image_text_dataset` or another `tf.data.Dataset`. "
                f"Received: steps_per_epoch={self.steps_per_epoch}, data of type "
                f"{type(self.data).__name__}"
            )
        if not within_epochs:
            return
        if not isinstance(self.data, (dict, tuple, list)):
            raise ValueError(
                "`save_every` must be 'epoch' for data that cannot be read from the "
                "middle of an epoch: use an `image_text_dataset` or another "
                "`tf.data.Dataset` to save in between. "
                f"Received: data of type {type(self.data).__name__}"
            )
        if not self.has_known_order:
            raise ValueError(
                "`save_every` must be 'epoch' for arrays that Keras shuffles, in an "
                "order that is not known: pass `shuffle=False`, or a dataset. "
                "Received: arrays, shuffle=True"
            )

    def is_over(self, epoch, step):
        """Whether an epoch has no more batches after some steps."""
        if self.steps_per_epoch is not None:
            return step >= self.steps_per_epoch
        if isinstance(self.data, (dict, tuple, list)):
            pairs = self.data if isinstance(self.data, dict) else self.data[0]
            return step * self.batch_size >= len(pairs["token_ids"])
        rest = self._after(epoch, step)
        return not any(True for _ in itertools.islice(iter(rest), 1))

    def after(self, epoch, step):
        """The data of an epoch after `step` steps, and of those that follow."""
        self._start = epoch, step
        self._ids.clear()
        self.seek(epoch, step)
        return self._with_remembered_ids(self._after(epoch, step))

    def seek(self, epoch, step):
        """Makes the next pass over a stream start after `step` steps of an epoch."""
        if self.stream is not None:
            self.stream.start = self._batches_before(epoch, step)

    def samples(self, epoch, step):
        """The names of the samples of a batch, a list of str; empty if unknown."""
        if self.stream is not None:
            return self.stream.keys(self._batches_before(epoch, step))
        ids = self._ids.get(self._index(epoch, step), [])
        if isinstance(self.data, dict) and not self.shuffle:
            first = step * self.batch_size
            ids = self.data.get(SAMPLE_ID, [])[first : first + self.batch_size]
        ids = np.asarray(ids).tolist()
        return [x.decode() if isinstance(x, bytes) else str(x) for x in ids]

    def _batches_before(self, epoch, step):
        first_epoch, before = self.origin
        return before + (epoch - first_epoch) * self.steps_per_epoch + step

    def _after(self, epoch, step):
        if self.stream is not None:
            return self.data
        if self.steps_per_epoch is not None:
            step = self._batches_before(epoch, step)
            return self.data.repeat().skip(step) if step else self.data
        if not step:
            return self.data
        if hasattr(self.data, "skip"):
            return self.data.skip(step)
        self.check_resumable(within_epochs=True)
        first = step * self.batch_size
        if isinstance(self.data, dict):
            # Some of its entries may be lists, such as those of names.
            return {key: array[first:] for key, array in self.data.items()}
        return tree.map_structure(lambda array: array[first:], self.data)

    def _with_remembered_ids(self, data):
        """The same data, whose sample ids are remembered as batches are read."""
        spec = getattr(data, "element_spec", None)
        if not isinstance(spec, dict) or SAMPLE_ID not in spec:
            return data
        if not self._remembers_ids:
            return data
        import tensorflow as tf

        def note(index, ids):
            self._ids[int(index)] = ids.tolist()
            while len(self._ids) > REMEMBERED:
                self._ids.popitem(last=False)
            return np.False_

        def remember(index, batch):
            noted = tf.numpy_function(note, [index, batch[SAMPLE_ID]], "bool")
            with tf.control_dependencies([noted]):
                return {**batch, "images": tf.identity(batch["images"])}

        return data.enumerate().map(remember)

    def _index(self, epoch, step):
        """The index of a batch in the iterator that it came from."""
        first_epoch, first_step = self._start
        if self.steps_per_epoch is not None:
            # One iterator runs through all epochs.
            return (epoch - first_epoch) * self.steps_per_epoch + step - first_step
        return step - first_step if epoch == first_epoch else step
