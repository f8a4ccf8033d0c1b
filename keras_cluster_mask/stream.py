"""`Stream`: data in a known order, so that reading can start at any batch."""

import types
from collections.abc import Generator, Mapping
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

    `fit` reads and sets only these attributes. Their defaults are those of data that is
    no stream.

    Attributes:
        training: Boolean. Whether the stream is endless.
        start: Integer. The batch at which a pass begins.
        shuffle_seed: Integer. The seed of the order, if the settings do not include it.
        steps_per_epoch: Integer. The number of batches in an epoch of training.
        element_spec: Dictionary from the name of each entry of a batch to an object
            with its `shape`, with `None` for unknown sizes, and its `dtype`.
        description: Dictionary. The settings that decide what each batch holds. A run
            can only be resumed on a stream with an equal description.
        skipped: `SkippedSamples`. The broken samples of the last pass.
        tokenizer: The tokenizer of the texts, if known.
        num_images: Integer. The number of images, if the stream ends.
    """

    training: bool = True
    start: int = 0
    shuffle_seed: int | None = None
    steps_per_epoch: int | None = None
    element_spec: dict[str, Any] | None = None
    description: Mapping[str, Any] = types.MappingProxyType({})
    skipped: Any = None
    tokenizer: Any = None
    num_images: int | None = None

    def __len__(self) -> int:
        """Returns the number of batches, in training per epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Generator[dict[str, Any], None, None]:
        """Reads batches from `start` on."""
        raise NotImplementedError
