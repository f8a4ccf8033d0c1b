"""The part of the training data that is left at some step, and its samples."""

import collections
import hashlib
import itertools
import json

import numpy as np

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.distribution.processes import all_gather_object
from keras_cluster_mask.training.inputs import SAMPLE_ID, sample_names

# More batches than lie between one that is read and one whose loss is looked at: a
# `tf.data` pipeline reads up to 128 ahead, and losses are looked at every 100 steps.
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

    Two kinds can be read from a step on. A stream, of arrays or an
    `image_text_dataset`, starts with any batch. A `tf.data.Dataset` skips steps. Other
    data can only be read from the start of an epoch.

    Args:
        data: What is passed to `fit`; arrays as `ArrayBatches`.
        steps_per_epoch: Integer, of data that continues over the ends of epochs, or
            `None`.
        epoch: Integer, the first epoch that is trained.
        remembers_ids: Boolean. Whether `samples` will be asked for.

    Attributes:
        origin: A tuple of integers: an epoch; how many batches of the data lie before
            its first step, as a stream continues where the last `fit` on it ended; and,
            of arrays, the seed of their order.
    """

    def __init__(self, data, steps_per_epoch, epoch=0, remembers_ids=False):
        self.data = data
        self.steps_per_epoch = steps_per_epoch
        self.stream = stream_of(data)
        self._ids = collections.OrderedDict()
        self._start = 0, 0
        self._remembers_ids = remembers_ids
        self._origin = epoch, 0 if self.stream is None else self.stream.start

    @property
    def origin(self):
        seed = getattr(self.stream, "shuffle_seed", None)
        return self._origin if seed is None else (*self._origin, seed)

    @origin.setter
    def origin(self, origin):
        self._origin = tuple(origin[:2])
        if len(origin) > 2:
            self.stream.shuffle_seed = origin[2]

    def describe(self):
        """What must be the same for a step to be found again, as a dictionary."""
        return {
            **({} if self.stream is None else self.stream.description),
            "data.steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def has_known_order(self):
        """Whether the order of samples is the data's own, and not drawn by a loader."""
        return hasattr(self.data, "element_spec")

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
        if within_epochs:
            raise ValueError(
                "`save_every` must be 'epoch' for data that cannot be read from the "
                "middle of an epoch: use arrays, an `image_text_dataset` or another "
                "`tf.data.Dataset` to save in between. "
                f"Received: data of type {type(self.data).__name__}"
            )

    def is_over(self, epoch, step):
        """Whether an epoch has no more batches after some steps."""
        if self.steps_per_epoch is not None:
            return step >= self.steps_per_epoch
        rest = self._after(epoch, step)
        return not any(True for _ in itertools.islice(iter(rest), 1))

    def has_more(self, epoch, step):
        """Whether an epoch has batches after `step` steps, which can be read alone."""
        can_be_read = self.stream is not None or hasattr(self.data, "skip")
        return can_be_read and step > 0 and not self.is_over(epoch, step)

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
        return sample_names(self._ids.get(self._index(epoch, step), []))

    def _batches_before(self, epoch, step):
        first_epoch, before = self._origin
        return before + (epoch - first_epoch) * self.steps_per_epoch + step

    def _after(self, epoch, step):
        if self.stream is not None:
            return self.data
        if self.steps_per_epoch is not None:
            step = self._batches_before(epoch, step)
            return self.data.repeat().skip(step) if step else self.data
        if not step:
            return self.data
        self.check_resumable(within_epochs=True)
        return self.data.skip(step)

    def _with_remembered_ids(self, data):
        """The same data, whose sample ids are remembered as batches are read."""
        spec = getattr(data, "element_spec", None)
        if not isinstance(spec, dict) or SAMPLE_ID not in spec:
            return data
        if not self._remembers_ids or self.stream is not None:
            # A stream knows the samples of its batches.
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
