"""`FrequencyTextMasking`: drops frequent words of long captions first."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from keras_cluster_mask.checks import check_choice, check_range, is_positive
from keras_cluster_mask.data.clip_tokenizer import PIECE_PATTERN, clean_all, words_of
from keras_cluster_mask.data.samples import digest_of
from keras_cluster_mask.data.text_masking import LongCaption, TextMasking

# The minimum count of a word in the released code of CLIPF.
MIN_COUNT = 5


class FrequencyTextMasking(TextMasking):
    """Drops frequent words of captions that are too long (CLIPF).

    The score of a word `w` is `u - p(w)`: `u` is uniform in [0, 1), and
    `p(w) = max(0, 1 - sqrt(threshold / f(w)))` grows with the relative frequency
    `f(w)` of the word, as in word2vec. Words such as "a" and "the" are mostly dropped,
    and rare words are kept. In scripts without spaces between words, such as Chinese,
    each character is a word.

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
        frequencies: Dictionary from words to positive numbers: counts or frequencies,
            which are divided by their sum. Words are in lower case, as
            `TextMasking.split` returns them. Defaults to `None`: `fit` counts them.
        threshold: Float. A relative frequency. Less frequent words have p = 0. Defaults
            to `1e-6`, as in the paper for CC12M.
        unknown: `"keep"` or `"drop"`. How words outside `frequencies` are treated.
            `"keep"`: like rare words, p = 0. `"drop"`: p = 1, so they are the most
            likely to be dropped, and `fit` ignores words that occur fewer than five
            times, as in the released code. Defaults to `"keep"`.

    Attributes:
        frequencies: Dictionary from words to relative frequencies, or `None` before
            `fit`.

    Raises:
        ValueError: If an argument is invalid.

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
        check_range("threshold", threshold, 0, 1, "(]")
        self.threshold = float(threshold)
        self.unknown = unknown
        for word, count in (frequencies or {}).items():
            # Other words would never be found.
            pieces = words_of(word, PIECE_PATTERN)
            if pieces != [word.lower()] or not is_positive(count):
                raise ValueError(
                    "`frequencies` must be a dict that maps single lowercase words, as "
                    "`TextMasking.split` returns them, to positive counts or "
                    f"frequencies: call `fit` to count words. Received: {word!r}: "
                    f"{count!r}"
                )
        self.frequencies = None if frequencies is None else _shares(frequencies)

    def fit(self, captions: Iterable[str | bytes]) -> Self:
        """Counts the words of captions, and replaces `frequencies`.

        Args:
            captions: Iterable of strings or bytes, such as from `read_captions`.

        Returns:
            The masking itself.
        """
        counts = collections.Counter()
        for caption in clean_all(captions):
            counts.update(words_of(caption, PIECE_PATTERN))
        least = MIN_COUNT if self.unknown == "drop" else 1
        counts = {word: count for word, count in counts.items() if count >= least}
        self.frequencies = _shares(counts)
        return self

    def probability(self, word: str) -> float:
        """Returns the number p that is subtracted from the random score of a word.

        Args:
            word: String, in lower case.

        Returns:
            Float, from 0 to 1.
        """
        if word not in self.frequencies:
            return float(self.unknown == "drop")
        return max(0.0, 1 - math.sqrt(self.threshold / self.frequencies[word]))

    def score(self, caption: LongCaption) -> Sequence[float]:
        """Returns random scores minus `probability`; see `TextMasking.score`."""
        if self.frequencies is None:
            raise ValueError(
                "`frequencies` must be set before captions are masked: pass "
                "`frequencies`, or call `fit` on the training captions, such as from "
                f"`kcm.data.read_captions`. Received: {self!r}"
            )
        draws = caption.generator.random(len(caption.words)).tolist()
        return [u - self.probability(word) for u, word in zip(draws, caption.words)]

    def __repr__(self):
        table = sorted((self.frequencies or {}).items())
        return (
            f"FrequencyTextMasking(<{len(table)} words, {digest_of(table)}>, "
            f"threshold={self.threshold}, unknown={self.unknown!r})"
        )


def _shares(counts):
    if not counts:
        raise ValueError(
            "`frequencies` must contain at least one word: pass captions with words to "
            "`fit`. With `unknown='drop'`, `fit` counts only words that occur at least "
            f"{MIN_COUNT} times. Received: no words"
        )
    # The sum does not depend on the order, and NumPy numbers are not JSON.
    total = math.fsum(counts.values())
    return {word: float(count / total) for word, count in counts.items()}
