"""Training data that can be read from the start of any epoch."""

import hashlib
import json

from keras_cluster_mask.batches import stream_of
from keras_cluster_mask.distribution.processes import all_gather_object


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


class TrainingData:
    """Training data that a resumed run reads from the start of an epoch.

    A stream, from arrays or `image_text_dataset`, can start with any batch. For other
    data, each epoch is a pass over it; with `steps_per_epoch`, a `tf.data.Dataset`
    skips the batches of earlier epochs.

    Args:
        data: The data passed to `fit`, with arrays as `ArrayBatches`.
        steps_per_epoch: Integer, for data that continues across epochs, or `None`.
        first_epoch: Integer, the first epoch to train.

    Attributes:
        origin: A tuple of integers: an epoch; the number of batches before its first
            step, since a stream continues where the last `fit` on it ended; and, for
            arrays, the seed of their order.
    """

    def __init__(self, data, steps_per_epoch, first_epoch=0):
        self.data = data
        self.steps_per_epoch = steps_per_epoch
        self.stream = stream_of(data)
        self._origin = first_epoch, 0 if self.stream is None else self.stream.start

    @property
    def first_epoch(self) -> int:
        return self._origin[0]

    @property
    def origin(self) -> tuple[int, ...]:
        seed = getattr(self.stream, "shuffle_seed", None)
        return self._origin if seed is None else (*self._origin, seed)

    @origin.setter
    def origin(self, origin):
        self._origin = tuple(origin[:2])
        if len(origin) > 2:
            self.stream.shuffle_seed = origin[2]

    @property
    def description(self) -> dict:
        """The settings that must be the same when a run is resumed."""
        return {
            **({} if self.stream is None else self.stream.description),
            "data.steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def has_known_order(self) -> bool:
        """True if the data defines the order of samples, not a loader that draws it."""
        return hasattr(self.data, "element_spec")

    def check_resumable(self):
        """Raises an error if the data cannot be read from the start of an epoch."""
        if self.stream is not None or hasattr(self.data, "skip"):
            return
        if self.steps_per_epoch is not None:
            raise ValueError(
                "`steps_per_epoch` needs data that can be read from the end of an "
                "epoch on: an `image_text_dataset` or another `tf.data.Dataset`. "
                f"Received: steps_per_epoch={self.steps_per_epoch}, data of type "
                f"{type(self.data).__name__}"
            )

    def seek(self, epoch):
        """Makes the next pass over a stream start at an epoch."""
        if self.stream is not None:
            self.stream.start = self._batches_before(epoch)

    def from_epoch(self, epoch):
        """Returns the data from the start of an epoch."""
        if self.stream is not None:
            self.seek(epoch)
        elif self.steps_per_epoch is not None and epoch > self.first_epoch:
            self.check_resumable()
            return self.data.skip(self._batches_before(epoch))
        return self.data

    def _batches_before(self, epoch):
        first_epoch, before = self._origin
        return before + (epoch - first_epoch) * self.steps_per_epoch
