"""`FrequencyTextMasking`: drops frequent words of long captions first."""

import collections
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from keras_cluster_mask.checks import check_choice, is_positive
from keras_cluster_mask.data import byte_pairs
from keras_cluster_mask.data.text_masking import TextMasking

# The minimum count of a word in the released code of CLIPF.
MIN_COUNT = 5


class FrequencyTextMasking(TextMasking):
    """Drops frequent words of captions that are too long (CLIPF).

    The score of a word `w` is `u - p(w)`: `u` is uniform in [0, 1), and
    `p(w) = max(0, 1 - sqrt(threshold / f(w)))` grows with the relative frequency
    `f(w)` of the word, as in word2vec. Words such as "a" and "the" are mostly dropped,
    and rare words are kept.

    Example:

    ```python
    captions = ["a dog runs in the snow", "the cat is on the mat", "a red boat"]
    tokenizer = kcm.data.CLIPTokenizer.train(captions * 2, 600, 5)
    masking = kcm.data.FrequencyTextMasking(threshold=0.06).fit(captions)
    generator = np.random.default_rng(0)
    ids = masking.tokenize(tokenizer, ["a dog runs in the snow"], [generator])
    print(tokenizer.decode(ids[0]))  # three of the six words
    ```

    Args:
        frequencies: dict from words to positive numbers: counts or frequencies, which
            are divided by their sum. Words are in lower case, as CLIP's tokenizer
            splits them. Defaults to `None`: `fit` counts them.
        threshold: float. A relative frequency. Less frequent words have p = 0. Defaults
            to `1e-6`, as in the paper for CC12M.
        unknown: `"keep"` or `"drop"`. How words outside `frequencies` are treated.
            `"keep"`: like rare words, p = 0. `"drop"`: p = 1, so they are the most
            likely to be dropped, and `fit` ignores words that occur fewer than five
            times, as in the released code. Defaults to `"keep"`.

    Attributes:
        frequencies: dict from words to numbers, or None before `fit`.

    Raises:
        ValueError: If an argument is invalid, or if no word is more frequent than
            `threshold`, so that the masking would be random.

    Reference:

    - [Frequency Is What You Need: Word-frequency Masking Benefits Vision-Language
      Model Pre-training](https://arxiv.org/abs/2412.16148)
    """

    def __init__(
        self,
        frequencies: Mapping[str, float] | None = None,
        threshold: float = 1e-6,
        unknown: str = "keep",
    ):
        check_choice("unknown", unknown, ("keep", "drop"))
        if not is_positive(threshold):
            raise ValueError(
                "`threshold` must be a positive float, a share of all words. "
                f"Received: threshold={threshold!r}"
            )
        self.threshold = float(threshold)
        self.unknown = unknown
        self.frequencies = None
        if frequencies is not None:
            _check_frequencies(frequencies)
            self._set(frequencies)

    def fit(self, captions: Iterable[str | bytes]) -> Self:
        """Counts the words of captions, and replaces `frequencies`.

        Args:
            captions: Iterable of str or bytes, such as those of `read_captions`.

        Returns:
            The masking itself.
        """
        counts, number = collections.Counter(), 0
        for caption in byte_pairs.clean_all(captions):
            counts.update(byte_pairs.words_of(caption))
            number += 1
        least = MIN_COUNT if self.unknown == "drop" else 1
        counts = {word: count for word, count in counts.items() if count >= least}
        if not counts:
            raise ValueError(
                f"`captions` must hold words that occur at least {least} times. "
                f"Received: {number} captions without any"
            )
        self._set(counts)
        return self

    def _set(self, frequencies):
        self._total = math.fsum(frequencies.values())
        highest = max(frequencies.values()) / self._total
        if highest <= self.threshold:
            raise ValueError(
                "`threshold` must be less than the share of the most frequent word, or "
                "words are masked at random, as by `RandomTextMasking`. Received: "
                f"threshold={self.threshold}, a highest share of {highest:.3g}"
            )
        # NumPy numbers cannot be written as JSON.
        self.frequencies = {word: float(count) for word, count in frequencies.items()}

    def probability(self, word: str) -> float:
        """Returns the number p that is subtracted from the random score of a word.

        Args:
            word: str, in lower case.

        Returns:
            float, from 0 to 1.
        """
        count = (self.frequencies or {}).get(word)
        if count is None:
            return float(self.unknown == "drop")
        return max(0.0, 1 - math.sqrt(self.threshold * self._total / count))

    def score(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> Sequence[float]:
        """Returns random scores minus `probability`; see `TextMasking.score`."""
        if self.frequencies is None:
            raise ValueError(
                "`frequencies` must be known before captions are masked: pass them, or "
                "call `fit` with the captions of the training data, such as those of "
                f"`kcm.data.read_captions`. Received: {self!r}"
            )
        draws = generator.random(len(words)).tolist()
        return [u - self.probability(word) for u, word in zip(draws, words)]

    def __repr__(self):
        table = None
        if self.frequencies is not None:
            content = json.dumps(sorted(self.frequencies.items())).encode()
            digest = hashlib.sha256(content).hexdigest()[:16]
            table = f"<{len(self.frequencies)} words, {digest}>"
        return (
            f"FrequencyTextMasking(frequencies={table}, threshold={self.threshold}, "
            f"unknown={self.unknown!r})"
        )


def _check_frequencies(frequencies):
    """Raises an error unless all keys are words, and all values positive numbers."""
    is_table = isinstance(frequencies, Mapping) and frequencies
    for word, count in frequencies.items() if is_table else [(None, frequencies)]:
        is_word = isinstance(word, str) and byte_pairs.words_of(word) == [word.lower()]
        if not is_word or not is_positive(count):
            raise ValueError(
                "`frequencies` must be a dict from single words in lower case, as "
                "CLIP's tokenizer splits captions, to positive numbers, how often each "
                f"occurs: count them with `fit`. Received: {word!r}: {count!r}"
            )
