"""Which samples to train on, by the words of their captions."""

import array
import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from keras_cluster_mask.checks import check_fraction
from keras_cluster_mask.data import byte_pairs
from keras_cluster_mask.data.sampling import places_of, sorted_hashes
from keras_cluster_mask.data.text_masking import discard_probability

# The first words of a caption, which WFPP looks at.
WORDS = 30


class FrequencyPruning:
    """Trains on the pairs whose captions have the fewest frequent words (WFPP).

    The score of a caption is `(1 - product of p(w)) / n` over its first 30 words, `n`
    of them. `p(w) = 1 - sqrt(threshold / f(w))` grows with the share `f(w)` of the word
    among all words, and is 1 up to a share of `threshold`, so that misspelled words
    count for nothing. The pairs of the highest scores stay, the same in each epoch;
    among them are many short captions. Of several captions, the mean score counts.

    Without `fit`, each process reads all captions when it calls `image_text_dataset`.
    For tar shards, TFRecord and Parquet files, this reads the images too. For large
    datasets, call `fit` with the captions from their metadata.

    Example:

    ```python
    captions = {"0": "a dog in the snow", "1": "the cat on the mat", "2": "the dog"}
    sampling = kcm.data.FrequencyPruning(share=0.7).fit(captions)
    # dataset = kcm.data.image_text_dataset(..., training=True, sampling=sampling)
    ```

    Args:
        share: float, above 0 to 1. The share of the pairs that stay.
        threshold: float. A share of all words. Defaults to `1e-7`, as in the paper.

    Raises:
        ValueError: If an argument is invalid, or if no word is more frequent than
            `threshold`; in `image_text_dataset`, if `fit` got no caption of a sample.

    Reference:

    - [Enhancing Vision-Language Model Pre-training with Image-text Pair Pruning Based
      on Word Frequency](https://arxiv.org/abs/2410.10879)
    """

    def __init__(self, share: float, threshold: float = 1e-7):
        check_fraction("share", share)
        check_fraction("threshold", threshold)
        self.share, self.threshold = share, threshold
        self._hashes = self._scores = None

    def fit(self, captions: Mapping[str, str | bytes | Sequence[str | bytes]]) -> Self:
        """Takes captions instead of those that are read with the images.

        Args:
            captions: dict from the key of each sample to its caption, str or bytes, or
                a list of captions. An empty caption has the lowest score, 0.

        Returns:
            The sampler itself.
        """
        if not isinstance(captions, Mapping):
            raise ValueError(
                "`captions` must be a dict from keys to captions. Received: an object "
                f"of type {type(captions).__name__}"
            )
        listed = itertools.starmap(_listed, captions.items())
        scores = caption_scores(listed, self.threshold)
        self._hashes, order = sorted_hashes(list(captions))
        self._scores = scores[order]
        return self

    def of_index(self, index: Any) -> Callable[[int, int], np.ndarray]:
        """The function of an epoch that chooses samples of an `Index`."""
        if self._scores is None:
            scores = caption_scores(_captions(index), self.threshold)
        else:
            hashes = index.key_hashes()
            scores = self._scores[places_of(index, hashes, self._hashes, "captions")]
        number = max(int(self.share * len(scores) + 1e-6), 1)
        kept = np.sort(np.argsort(-scores, kind="stable")[:number])
        return functools.partial(_always, kept)


def caption_scores(captions, threshold):
    """The scores of `FrequencyPruning`, in one pass over the captions.

    Args:
        captions: Iterable of the sequence of captions of each sample.
        threshold: float.

    Returns:
        NumPy float array `(num_samples,)`.
    """
    counts, ids = collections.Counter(), collections.defaultdict()
    ids.default_factory = ids.__len__
    # The first words of all captions, how many each has, and the captions of a sample.
    heads, lengths, several = array.array("I"), array.array("I"), array.array("I")

    def flat():
        for each in captions:
            several.append(len(each))
            yield from each

    for words in map(byte_pairs.words_of, byte_pairs.clean_all(flat())):
        counts.update(words)
        heads.extend(ids[word] for word in words[:WORDS])
        lengths.append(min(len(words), WORDS))
    total = counts.total()
    if not total:
        raise ValueError(
            "`captions` must hold words. Where a dataset reads them, it needs a "
            f"tokenizer or `include_captions`. Received: {len(several)} samples "
            "without any"
        )
    highest = max(counts.values()) / total
    if highest <= threshold:
        raise ValueError(
            "`threshold` must be less than the share of the most frequent word of the "
            f"captions. Received: threshold={threshold}, a highest share of "
            f"{highest:.3g} among {total} words"
        )
    p = [discard_probability(counts[word] / total, threshold) or 1.0 for word in ids]
    lengths, several = np.asarray(lengths), np.asarray(several)
    firsts = np.cumsum(lengths, dtype="int64") - lengths
    # Captions without words have the lowest score, 0.
    has_words, scores = lengths > 0, np.zeros(len(lengths))
    products = np.multiply.reduceat(np.array(p)[np.asarray(heads)], firsts[has_words])
    scores[has_words] = (1 - products) / lengths[has_words]
    samples = np.repeat(np.arange(len(several)), several)
    sums = np.bincount(samples, scores, len(several))
    return sums / np.maximum(several, 1)


def _listed(key, captions):
    """The captions of a sample as a sequence."""
    captions = [captions] if isinstance(captions, str | bytes) else captions
    if not isinstance(captions, list | tuple) or not all(
        isinstance(each, str | bytes) for each in captions
    ):
        raise ValueError(
            "`captions` must be str or bytes, or lists of them; that of a sample "
            f"without a caption may be ''. Received: captions[{key!r}]={captions!r}"
        )
    return captions


def _captions(index):
    """The captions of each sample of an index."""
    pairs = index.read(range(len(index)), with_images=False)
    return (getattr(pair, "captions", ()) for pair in pairs)


def _always(kept, num_samples, epoch):
    return kept
