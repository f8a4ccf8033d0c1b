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
    """Training data, which a resumed run reads from the start of an epoch.

    A stream, of arrays or an `image_text_dataset`, starts with any batch. Each epoch of
    other data is a pass over it; with `steps_per_epoch`, a `tf.data.Dataset` skips what
    the epochs before have read.

    Args:
        data: What is passed to `fit`; arrays as `ArrayBatches`.
        steps_per_epoch: Integer, of data that continues over the ends of epochs, or
            `None`.
        first_epoch: Integer, the first epoch that is trained.

    Attributes:
        origin: A tuple of integers: an epoch; how many batches of the data lie before
            its first step, as a stream continues where the last `fit` on it ended; and,
            of arrays, the seed of their order.
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
        """What must be the same for a run to be resumed."""
        return {
            **({} if self.stream is None else self.stream.description),
            "data.steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def has_known_order(self) -> bool:
        """Whether the order of samples is the data's own, and not drawn by a loader."""
        return hasattr(self.data, "element_spec")

    def check_resumable(self):
        """Raises an error if the start of an epoch could not be found again."""
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
        """Makes the next pass over a stream start with an epoch."""
        if self.stream is not None:
            self.stream.start = self._batches_before(epoch)

    def from_epoch(self, epoch):
        """The data from the start of an epoch on."""
        if self.stream is not None:
            self.seek(epoch)
        elif self.steps_per_epoch is not None and epoch > self.first_epoch:
            self.check_resumable()
            return self.data.skip(self._batches_before(epoch))
        return self.data

    def _batches_before(self, epoch):
        first_epoch, before = self._origin
        return before + (epoch - first_epoch) * self.steps_per_epoch
