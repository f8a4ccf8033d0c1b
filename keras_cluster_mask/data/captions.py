"""The captions of a source, and the caption and token ids of each sample of a batch."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_choice
from keras_cluster_mask.data import tokenizing
from keras_cluster_mask.data.images import name_of
from keras_cluster_mask.data.index import open_index, readable
from keras_cluster_mask.data.pairs import Fault, PairReader
from keras_cluster_mask.data.text_masking import TextMasking, check_text_masking

# The entry of a batch for the tokenizer, if that is a Keras layer.
TEXTS = "texts"


def read_captions(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    caption_key: str | Sequence[str] | None = None,
) -> list[str]:
    """Reads all captions of a source, for training a tokenizer.

    Example:

    ```python
    captions = kcm.data.read_captions(kcm.data.example_images() / "train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: String or path, or a list of them; see `list_shards`.
        caption_key: String or sequence of strings. The field that holds captions; see
            `image_text_dataset`. Defaults to `None`: common names.

    Returns:
        List of strings, in the order of the samples. Images are neither needed nor
        read.
    """
    index = open_index(source, PairReader((), caption_key))
    for fault in index.damage:
        message = f"{fault.details}. The captions after it are missing."
        warnings.warn(message, stacklevel=2)
    captions, fault = [], None
    for each in readable(index.read(range(len(index)), with_images=False)):
        if isinstance(each, Fault):
            fault = fault or each
        else:
            captions.extend(each.captions)
    if not captions:
        raise ValueError(
            "`caption_key` must name a field of `source` with captions. Received: "
            f"caption_key={caption_key}, with the fields {index.fields}, and first "
            f"{fault}"
        )
    return captions


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
            "data.tokenizer": [name_of(tokenizer), size, length],
            "data.text_masking": None if masking is None else repr(masking),
            "data.include_captions": not self.training and self.include_captions,
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
        batch, chosen = {}, [*map(self.choose, pairs, generators)]
        if self.include_captions:
            is_all = self.include_captions == "all"
            batch["captions"] = strings(map(_all_of, pairs) if is_all else chosen)
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

    def choose(self, pair, generator):
        """Returns the caption of a pair, as bytes.

        Args:
            pair: `Pair`.
            generator: `np.random.Generator`. Only used in training.
        """
        number = 0
        if self.training and len(pair.captions) > 1:
            number = int(generator.integers(len(pair.captions)))
        return _as_bytes(pair.captions[number])


def _all_of(pair):
    """Returns all captions of a pair, as a tuple of bytes."""
    return tuple(map(_as_bytes, pair.captions))


def _as_bytes(caption):
    return caption.encode("utf-8", "surrogatepass")


def strings(values):
    """Returns an object array of bytes, or of tuples of bytes, one per sample."""
    # `np.array` would convert tuples of equal length to rows.
    return np.fromiter(values, object)
