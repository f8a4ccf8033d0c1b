"""Text maskings, which choose the words to keep in captions that are too long.

A caption that fits into the context length of the tokenizer is not masked. In a longer
caption, the words with the highest scores are kept, whole and in order. If no word
fits, one word is truncated.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keras_cluster_mask.data.clip_tokenizer import (
    PIECE_PATTERN,
    CLIPTokenizer,
    clean,
    splitter,
    words_of,
)
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.types import Tokenizer

# The number of words for which token counts are cached.
MAX_WORDS = 1 << 16
# The length of the rows in which they are counted, unless the tokenizer's is longer.
MAX_TOKENS = 128


class LongCaption(NamedTuple):
    """A caption that has too many tokens, for a `TextMasking`.

    Attributes:
        words: List of strings, in lower case.
        num_tokens: List of integers. The number of tokens of each word, up to 127,
            or up to one more than the context length.
        num_tokens_left: Integer. The maximum number of tokens of all kept words.
        generator: `np.random.Generator` of the sample.
    """

    words: Sequence[str]
    num_tokens: Sequence[int]
    num_tokens_left: int
    generator: np.random.Generator


class TextMasking:
    """Base class of text maskings, which choose the words to keep in long captions.

    A subclass implements `score`, which returns one number for each word. The words
    with the highest scores are kept. A subclass may override `keep_words`, to choose
    groups of words together, and `of_epoch`, to change with the epoch.
    `examples/concept_curriculum.py` does both.

    Captions are split as in CLIP's tokenizer, in lower case and before byte-pair
    encoding: runs of letters, single digits, endings of contractions, and runs of other
    characters. In scripts without spaces between words (Chinese, Japanese, Thai, Lao,
    Khmer and Burmese), each character is a word. The tokens of each character are
    counted separately, so rows of such scripts may be shorter. Other tokenizers get the
    kept words with the case of the caption, and tokens are counted for each word.

    Draw all random numbers from `generator`, so that all processes, workers and resumed
    runs mask in the same way. With `num_workers`, a masking must be picklable. A run
    can only be resumed with a masking of equal `repr`, so override `__repr__` in a
    subclass with options.

    Example:

    ```python
    class LongWords(kcm.data.TextMasking):
        def score(self, caption):
            return [len(word) for word in caption.words]


    tokenizer = kcm.data.CLIPTokenizer.train(["a dog runs in the snow"] * 2, 600, 5)
    masking = LongWords()
    generator = np.random.default_rng(0)
    ids = masking.tokenize(tokenizer, ["a dog runs in the snow"], [generator])
    print(tokenizer.decode(ids[0]))  # dog runs snow
    ```
    """

    @staticmethod
    def split(caption: str | bytes) -> list[str]:
        """Splits a caption into words, as `score` receives them.

        Args:
            caption: String or bytes.

        Returns:
            List of strings, in lower case.
        """
        return words_of(clean(caption), PIECE_PATTERN)

    def score(self, caption: LongCaption) -> Sequence[float]:
        """Computes the scores of the words of a caption that is too long.

        Args:
            caption: `LongCaption`, with the attributes `words`, a list of strings in
                lower case; `num_tokens`, a list of the number of tokens of each word,
                up to 127; `num_tokens_left`, the maximum number of tokens of all kept
                words; and `generator`, the `np.random.Generator` of the sample.

        Returns:
            Sequence of floats, one for each word. Words with the highest scores are
            kept. Among equal scores, earlier words are kept.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `score(caption)`."
        )

    def keep_words(self, caption: LongCaption) -> list[int]:
        """Returns the indices of the words to keep, in order.

        Words are taken from the highest score down, if their tokens still fit. If no
        word fits, the word with the highest score is kept, and the tokenizer truncates
        it.

        Args:
            caption: See `score`.

        Returns:
            List of integers.
        """
        scores, left = self.score(caption), caption.num_tokens_left
        # The sort keeps the order of equal scores.
        words = range(len(caption.words))
        by_score = sorted(words, key=scores.__getitem__, reverse=True)
        kept = []
        for index in by_score:
            if caption.num_tokens[index] <= left:
                left -= caption.num_tokens[index]
                kept.append(index)
                if not left:
                    break
        return sorted(kept or by_score[:1])

    def of_epoch(self, epoch: int) -> "TextMasking":
        """Returns the masking of an epoch: by default, this masking in all epochs.

        Args:
            epoch: Integer, from 0. The number of the pass over the samples.

        Returns:
            A `TextMasking`.
        """
        return self

    def tokenize(
        self,
        tokenizer: Tokenizer,
        captions: Sequence[str | bytes],
        generators: Sequence[np.random.Generator],
        epochs: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Masks captions, and converts them to token ids.

        Args:
            tokenizer: A tokenizer that `image_text_dataset` takes and that pads the
                ends of rows.
            captions: List of strings or bytes.
            generators: List of `np.random.Generator`, one for each caption.
            epochs: List of integers. The epoch of each caption. Defaults to `None`:
                epoch 0.

        Returns:
            NumPy int32 array of shape `(len(captions), context_length)`.
        """
        epochs = [0] * len(captions) if epochs is None else epochs
        maskings = [*map(functools.cache(self.of_epoch), epochs)]
        return word_tokenizer(tokenizer)(captions, maskings, generators)

    def __repr__(self):
        return f"{type(self).__name__}()"


class RandomTextMasking(TextMasking):
    """Keeps random words of captions that are too long (CLIPA).

    The context length of the tokenizer sets the number of words that are kept. Half the
    context length keeps about half of the words of long captions, and halves the cost
    of the text tower.

    In scripts without spaces between words, such as Chinese, each character is a word.

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

    def score(self, caption: LongCaption) -> Sequence[float]:
        """Returns random scores; see `TextMasking.score`."""
        return caption.generator.random(len(caption.words)).tolist()


class BlockTextMasking(TextMasking):
    """Keeps consecutive words of captions that are too long (CLIPA).

    The first word of the run is drawn from the words with enough tokens after them to
    fill the context. If the next word does not fit, the nearest later words that fit
    fill the row, then the nearest earlier words.

    In scripts without spaces between words, such as Chinese, each character is a word.

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

    def score(self, caption: LongCaption) -> Sequence[float]:
        """Returns scores that decrease along the run; see `TextMasking.score`."""
        last, left = len(caption.words), 0
        while last and left < caption.num_tokens_left:
            last -= 1
            left += caption.num_tokens[last]
        first = int(caption.generator.random() * (last + 1))
        count = len(caption.words)
        return [-i if i >= first else i - count - first for i in range(count)]


class WordTokenizer:
    """Applies a tokenizer of any kind to the words of captions that a masking keeps.

    Args:
        tokenizer: See `tokenize`.
    """

    def __init__(self, tokenizer):
        self.tokenizer = self._counter = tokenizer
        self._sizes = {}
        self._is_clip = isinstance(tokenizer, CLIPTokenizer)
        most = MAX_TOKENS
        if self._is_clip:
            most = max(most, tokenizer.context_length + 2)
            self._counter = tokenizer.with_context_length(most)
        long_text = ["a child reads a book " * most]
        self._num_tokens_left = int(_num_tokens(tokenizer, long_text)[0])
        self._most = int(_num_tokens(self._counter, long_text)[0])
        if self._num_tokens_left < 1:
            raise ValueError(
                "`text_masking` needs a `tokenizer` that pads rows at the end, so that "
                "the tokens of each word can be counted. Received: "
                f"tokenizer={tokenizer}"
            )

    def __call__(self, captions, maskings, generators):
        """Converts captions to token ids.

        Args:
            captions: List of strings or bytes.
            maskings: List of `TextMasking`, which choose the words of those captions
                that are too long.
            generators: List of `np.random.Generator`, one for each caption.
        """
        captions = [*captions]
        texts = [clean(caption, lower=self._is_clip) for caption in captions]
        split = splitter(PIECE_PATTERN).pre_tokenize_str
        pieces = [split(text) for text in texts]
        words = [[word for word, _ in each] for each in pieces]
        runs = [words_of(text) for text in texts]
        sizes = self._sizes = self._sizes if len(self._sizes) < MAX_WORDS else {}
        new = [*{word for each in words + runs for word in each} - sizes.keys()]
        counts = _num_tokens(self._counter, new)
        # A word that fills a row may have been truncated.
        sizes.update(zip(new, (counts + (counts == self._most)).tolist()))
        for index, each in enumerate(words):
            # A run may have fewer tokens than the sum over its characters.
            if sum(sizes[run] for run in runs[index]) > self._num_tokens_left:
                num_tokens = [sizes[word] for word in each]
                text, lower = texts[index], [word.lower() for word in each]
                settings = num_tokens, self._num_tokens_left, generators[index]
                kept = maskings[index].keep_words(LongCaption(lower, *settings))
                # From the end, so that earlier places stay the same.
                for place in sorted({*range(len(each))} - {*kept}, reverse=True):
                    start, end = pieces[index][place][1]
                    text = f"{text[:start]} {text[end:]}"
                captions[index] = " ".join(text.split())
        return tokenize(self.tokenizer, captions)


# A tokenizer counts the tokens of a word once.
word_tokenizer = functools.lru_cache(4)(WordTokenizer)


def _num_tokens(tokenizer, texts):
    """Counts the tokens of each text, without special tokens."""
    rows = tokenize(tokenizer, ["", *texts])
    # A word, too, may have a token with the id of padding.
    ends = np.max((rows != rows[0, -1]) * np.arange(1, rows.shape[1] + 1), axis=1)
    return ends[1:] - ends[0]


def check_text_masking(text_masking, tokenizer):
    """Raises an error unless a masking can mask the captions for a tokenizer."""
    if not isinstance(text_masking, TextMasking) or tokenizer is None:
        raise ValueError(
            "`text_masking` must be a text masking, such as `RandomTextMasking()`, and "
            f"needs a `tokenizer`. Received: text_masking={text_masking!r}, "
            f"tokenizer={tokenizer}"
        )
    # Raise the errors of both before any sample is read.
    # Its length may have changed since another dataset was made.
    word_tokenizer.cache_clear()
    word_tokenizer(tokenizer)
    words, generator = ["a", "red", "boat"], np.random.default_rng(0)
    text_masking.keep_words(LongCaption(words, [1, 1, 1], 2, generator))
