"""Text maskings: which words of a caption stay when it is too long.

A caption that fits into the context of the tokenizer is not masked. Of a longer one,
the words of the highest scores stay whole and in order. Only if none fits, one is cut.
"""

import collections
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from keras_cluster_mask.checks import check_choice, is_positive
from keras_cluster_mask.data import byte_pairs
from keras_cluster_mask.data.tokenizers import CLIPTokenizer

# The release of CLIPF counts words that are seen at least so often.
MIN_COUNT = 5


class TextMasking:
    """The base class of text maskings: which words of long captions stay.

    A subclass implements `score`, one number for each word: the words of the highest
    scores stay. It may override `keep_words`, to choose groups of words together, and
    `of_epoch`, to change with the epoch. `examples/concept_curriculum.py` does both.

    Words are those of CLIP's tokenizer, in lower case and before byte-pair encoding:
    runs of letters, single digits, endings of contractions, and runs of other
    characters. Take all randomness from the `generator`, so that processes, workers and
    resumed runs mask alike. With `num_workers`, a masking must pickle. A run is resumed
    only on data whose masking has an equal `repr`, so override `__repr__` in a subclass
    with options.

    Example:

    ```python
    class LongWords(kcm.data.TextMasking):
        def score(self, words, num_tokens, num_tokens_left, generator):
            return [len(word) for word in words]


    tokenizer = kcm.data.CLIPTokenizer.train(["a dog runs in the snow"] * 2, 600, 5)
    masking = LongWords()
    generator = np.random.default_rng(0)
    ids = masking.tokenize(tokenizer, ["a dog runs in the snow"], [generator])
    print(tokenizer.decode(ids[0]))  # dog runs snow
    ```
    """

    @staticmethod
    def split(caption: str | bytes) -> list[str]:
        """The words of a caption, as `score` gets them.

        Args:
            caption: str or bytes.

        Returns:
            list of str, in lower case.
        """
        return byte_pairs.words_of(byte_pairs.clean(caption, "caption"))

    def score(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> Sequence[float]:
        """The scores of the words of a caption that is too long.

        Args:
            words: list of str, in lower case.
            num_tokens: list of int. The number of tokens of each word.
            num_tokens_left: int. The number of tokens that the words may have together.
            generator: `np.random.Generator` of the sample.

        Returns:
            Sequence of float, one for each word. The highest stay; of equal ones, the
            first in the caption.
        """
        raise NotImplementedError

    def keep_words(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> list[int]:
        """The indices of the words that stay, in order.

        Words are taken by score, each if its tokens still fit. If none fits, the word
        of the highest score stays, and the tokenizer cuts it.

        Args:
            words: See `score`.
            num_tokens: See `score`.
            num_tokens_left: See `score`.
            generator: See `score`.

        Returns:
            list of int.
        """
        scores = self.score(words, num_tokens, num_tokens_left, generator)
        # The sort keeps the order of equal scores.
        by_score = sorted(range(len(words)), key=scores.__getitem__, reverse=True)
        kept = []
        for index in by_score:
            if num_tokens[index] <= num_tokens_left:
                num_tokens_left -= num_tokens[index]
                kept.append(index)
                if not num_tokens_left:
                    break
        return sorted(kept or by_score[:1])

    def of_epoch(self, epoch: int) -> "TextMasking":
        """The masking of an epoch: this one, unless a masking changes with time.

        Args:
            epoch: int, from 0. The number of the pass over the samples.

        Returns:
            A `TextMasking`.
        """
        return self

    def tokenize(
        self,
        tokenizer: CLIPTokenizer,
        captions: Sequence[str | bytes],
        generators: Sequence[np.random.Generator],
        epochs: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The token ids of masked captions.

        Args:
            tokenizer: `CLIPTokenizer`.
            captions: list of str or bytes.
            generators: list of `np.random.Generator`, one for each caption.
            epochs: list of int. The epoch of each caption. Defaults to `None`: 0, the
                first.

        Returns:
            NumPy int32 array of shape `(len(captions), context_length)`.
        """
        epochs = [0] * len(captions) if epochs is None else epochs
        maskings = {epoch: self.of_epoch(epoch) for epoch in {*epochs}}

        def keep_words(index, words, num_tokens, num_tokens_left):
            masking = maskings[epochs[index]]
            return masking.keep_words(
                words, num_tokens, num_tokens_left, generators[index]
            )

        return tokenizer(captions, keep_words)

    def __repr__(self):
        return f"{type(self).__name__}()"


class RandomTextMasking(TextMasking):
    """Keeps random words of captions that are too long (CLIPA).

    The context of the tokenizer says how much stays. A tokenizer with half the context
    keeps about half of the words of long captions, and the text tower costs half.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog runs in the snow"] * 2, 600, 6)
    masking = kcm.data.RandomTextMasking()
    generator = np.random.default_rng(0)
    ids = masking.tokenize(tokenizer, ["a dog runs in the snow"], [generator])
    print(tokenizer.decode(ids[0]))  # four of the six words
    ```

    Reference:

    - [An Inverse Scaling Law for CLIP Training](https://arxiv.org/abs/2305.07017)
    """

    def score(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> Sequence[float]:
        """Random scores; see `TextMasking.score`."""
        return generator.random(len(words)).tolist()


class BlockTextMasking(TextMasking):
    """Keeps a run of neighboring words of captions that are too long (CLIPA).

    The first word of the run is drawn from those that leave enough tokens after them
    to fill the context. Where the next word does not fit, the nearest later words that
    fit fill the row, then the nearest earlier ones.

    Example:

    ```python
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog runs in the snow"] * 2, 600, 6)
    masking = kcm.data.BlockTextMasking()
    generator = np.random.default_rng(0)
    ids = masking.tokenize(tokenizer, ["a dog runs in the snow"], [generator])
    print(tokenizer.decode(ids[0]))  # four words, one after the other
    ```

    Reference:

    - [An Inverse Scaling Law for CLIP Training](https://arxiv.org/abs/2305.07017)
    """

    def score(
        self,
        words: Sequence[str],
        num_tokens: Sequence[int],
        num_tokens_left: int,
        generator: np.random.Generator,
    ) -> Sequence[float]:
        """Scores that fall from the first word on; see `TextMasking.score`."""
        last, left = len(words), 0
        while last and left < num_tokens_left:
            last -= 1
            left += num_tokens[last]
        first, count = int(generator.random() * (last + 1)), len(words)
        return [-i if i >= first else i - count - first for i in range(count)]


class FrequencyTextMasking(TextMasking):
    """Leaves out frequent words of captions that are too long (CLIPF).

    The score of a word `w` is `u - p(w)`: `u` is uniform in [0, 1), and
    `p(w) = max(0, 1 - sqrt(threshold / f(w)))` grows with the share `f(w)` of the word
    among all words, as in word2vec. So "a" and "the" mostly leave, and rare words stay.

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
        frequencies: dict from words to positive numbers: how often each occurs, which
            is divided by the sum. Words are as CLIP's tokenizer splits them, in lower
            case. Defaults to `None`: `fit` counts them.
        threshold: float. A share of all words. Words that are less frequent have p = 0.
            Defaults to `1e-6`, as in the paper for CC12M.
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
        """Counts the words of captions, in place of the words that were given.

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
        # Numbers of NumPy would not be written as JSON.
        self.frequencies = {word: float(count) for word, count in frequencies.items()}

    def probability(self, word: str) -> float:
        """The number p that is subtracted from the random score of a word.

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
        """Random scores minus `probability`; see `TextMasking.score`."""
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


def check_text_masking(text_masking, tokenizer):
    """Raises an error unless a masking can mask the captions for a tokenizer."""
    if not isinstance(text_masking, TextMasking):
        raise ValueError(
            "`text_masking` must be a text masking, such as `RandomTextMasking()`, or "
            f"None. Received: text_masking={text_masking!r}"
        )
    if not isinstance(tokenizer, CLIPTokenizer):
        raise ValueError(
            "`text_masking` needs a `CLIPTokenizer` as the `tokenizer`, which knows "
            "the words of a caption and their tokens: `CLIPTokenizer.from_open_clip()` "
            "and `from_preset` have CLIP's tokens, `train` learns others. Received: "
            f"tokenizer={tokenizer!r}"
        )
    # What is missing shows before any sample is read.
    text_masking.score(["a", "red", "boat"], [1, 1, 1], 2, np.random.default_rng(0))


def _check_frequencies(frequencies):
    """Raises an error unless all keys are words, and all values positive numbers."""
    if not isinstance(frequencies, Mapping) or not frequencies:
        raise ValueError(
            "`frequencies` must be a dict from words to how often each occurs, with at "
            f"least one word. Received: frequencies={frequencies!r}"
        )
    for word, count in frequencies.items():
        if not is_positive(count):
            raise ValueError(
                "`frequencies` must be positive numbers: how often each word occurs. "
                f"Received: {word!r}: {count!r}"
            )
        if not isinstance(word, str) or (
            word != word.lower() or byte_pairs.words_of(word) != [word]
        ):
            raise ValueError(
                "`frequencies` must have single words in lower case as keys, as CLIP's "
                "tokenizer splits captions, or they have no effect: count them with "
                f"`fit`. Received: {word!r}"
            )
