"""`Stream`: data in a known order, so that reading can start at any batch."""

from collections.abc import Generator
from typing import Any

# A description covers at least this many items, evenly spaced, of what takes long to
# read as a whole.
COMPARED = 32


class Stream:
    """Batches in an order that is known before any is read.

    A run on a stream is resumed at the next batch. There are three kinds: arrays,
    features of frozen encoders, and an `image_text_dataset`. A stream for training is
    endless, and goes from epoch to epoch. Worker processes use this module, so it does
    not import Keras.

    Attributes:
        training: Boolean. Whether the stream is endless.
        start: Integer. The batch at which a pass begins.
        steps_per_epoch: Integer. The number of batches in an epoch of training.
        element_spec: Dictionary from the name of each entry of a batch to an object
            with its `shape`, with `None` for unknown sizes, and its `dtype`.
        description: Dictionary. The settings that decide what each batch holds. A run
            can only be resumed on a stream with an equal description.
    """

    training = True
    start = 0
    steps_per_epoch: int
    element_spec: dict[str, Any]
    description: dict[str, Any]

    def __len__(self) -> int:
        """Returns the number of batches, in training per epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        """Reads batches from `start` on."""
        raise NotImplementedError
