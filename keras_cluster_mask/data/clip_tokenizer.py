"""CLIP's tokenizer in Python: cleaning, words, bytes and merges."""

import functools
import gzip
import hashlib
import html
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Self

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.data import files

# The characters that represent the 256 bytes, in the order of OpenAI's vocabulary:
# printable Latin-1 characters represent themselves, and the rest start at U+0100.
BYTE_CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
WORD_END = "</w>"
START = "<start_of_text>"
END = "<end_of_text>"
# OpenAI's file lists more merges than CLIP uses: 49,408 ids minus bytes and specials.
CLIP_MERGES = 49408 - 2 * 256 - 2
# A word is the ending of a contraction, a run of letters, one digit, or a run of other
# characters that are not white space. The reference implementation ignores case, which
# also drops U+0345, an accent with a letter as upper case.
OTHERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
WORD_PATTERN = r"\p{L}+|" + OTHERS
# Scripts without spaces between words, and the mark of a long vowel in Japanese. A text
# masking gets each character, with its accents, as a word.
UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\x{30FC}\x{FF70}"
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
)
PIECE_PATTERN = rf"[{UNSPACED}]\p{{M}}*|[\p{{L}}&&[^{UNSPACED}]]+|{OTHERS}"
# ASCII without "&" and without control characters other than white space.
PLAIN = re.compile(r"[\t\n\r -%'-~]*")
# The names of the special tokens in KerasHub, which accepts no others.
KERAS_HUB = {START: "<|startoftext|>", END: "<|endoftext|>"}


def as_text(text):
    """Decodes a text that is bytes."""
    if not isinstance(text, str | bytes):
        raise ValueError(f"A caption must be str or bytes. Received: {text!r}")
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def clean(text, lower=True):
    """Cleans a caption, string or bytes, as CLIP does, or without changing its case."""
    text = as_text(text)
    # Repair is slow, and plain ASCII without HTML entities does not need it.
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split())
    return text.lower() if lower else text


def clean_all(captions):
    """Cleans an iterable of captions lazily."""
    if isinstance(captions, str | bytes):
        raise ValueError(
            "`captions` must be an iterable of captions, not a single caption. "
            f"Received: captions={captions!r}"
        )
    return map(clean, captions)


@functools.cache
def splitter(pattern):
    """Returns a pre-tokenizer from a text to words: special tokens, and a pattern's."""
    pattern = tokenizers.Regex(f"(?i:{START}|{END})|{pattern}")
    return pre_tokenizers.Split(pattern, "removed", invert=True)


def words_of(text, pattern=WORD_PATTERN):
    """Splits a clean caption into words, a list of strings."""
    return [word for word, _ in splitter(pattern).pre_tokenize_str(text)]


# Splits a clean caption into words in byte characters.
WORDS = pre_tokenizers.Sequence(
    [
        splitter(WORD_PATTERN),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


def clip_vocabulary(merges):
    """Returns the tokens in OpenAI's order: bytes, final bytes, merges, start, end."""
    return [
        *BYTE_CHARACTERS,
        *(character + WORD_END for character in BYTE_CHARACTERS),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]


class CLIPTokenizer:
    """Lower-casing byte-pair tokenizer that returns exactly CLIP's token ids.

    Captions are cleaned as in OpenAI's and open_clip's tokenizers (broken encodings
    repaired, HTML entities resolved, white space collapsed, lower case), so that
    pre-trained text towers see the tokens that they were trained on. Each row starts
    with a start token, ends with an end token and is padded with zeros. The end token
    has the highest id of the vocabulary: CLIP's text towers pool at
    `argmax(token_ids)`.

    Letters newer than Unicode 16 may be split differently from open_clip.

    In most cases, use one of the constructors `from_open_clip`, `from_file`,
    `from_preset` or `train`. The tokenizer does not need TensorFlow.

    Example:

    ```python
    captions = ["a photo of a cat", "a photo of a dog", "two dogs in the snow"]
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, context_length=16)
    token_ids = tokenizer(["a dog in the snow", "a cat"])  # (2, 16) int32
    tokenizer.decode(token_ids[1])  # "a cat"
    ```

    Args:
        vocabulary: List of strings. The tokens in the order of their ids.
        merges: List of pairs of strings. The merge rules in the order of their
            priority.
        context_length: Integer. The length of every row of ids. A longer caption is
            truncated and still ends with the end token. Defaults to `77`.

    Attributes:
        context_length: Integer. The length of every row of ids.
        vocabulary_size: Integer. The number of token ids, and of embeddings that a text
            tower needs.
        start_token_id: Integer. The id of the start token.
        end_token_id: Integer. The id of the end token, the highest of all ids.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        merges: Sequence[Sequence[str]],
        context_length: int = 77,
    ):
        # At least one token fits between the start and end tokens.
        context_length = check_integer("context_length", context_length, 3)
        self._vocabulary = list(vocabulary)
        self._merges = [tuple(merge) for merge in merges]
        ids = {token: index for index, token in enumerate(self._vocabulary)}
        self.vocabulary_size = len(self._vocabulary)
        if self._vocabulary[-1:] != [END] or len(ids) < self.vocabulary_size:
            raise ValueError(
                f"`vocabulary` must end with {END!r}, so that this token has the "
                "highest id, and must not contain a token twice. Received: "
                f"{self.vocabulary_size} tokens, ...{self._vocabulary[-2:]}"
            )
        self.start_token_id, self.end_token_id = ids[START], ids[END]
        model = models.BPE(ids, self._merges, end_of_word_suffix=WORD_END)
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = WORDS
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens([START, END])
        # Adds the start and end tokens.
        self._tokenizer.post_processor = processors.BertProcessing(
            (END, self.end_token_id), (START, self.start_token_id)
        )
        self.context_length = context_length
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.enable_padding(length=context_length, pad_id=0)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike, context_length: int | None = None
    ) -> Self:
        """Loads a tokenizer from a file saved by `save`, or OpenAI's list of merges.

        Args:
            path: String or path. A JSON file written by `save`, or
                `bpe_simple_vocab_16e6.txt.gz` as published by OpenAI and open_clip.
            context_length: Integer. Defaults to `None`: the saved length, or 77 for a
                list of merges.

        Returns:
            A `CLIPTokenizer`.

        Raises:
            ValueError: If the file is damaged or has another format, or if
                `context_length` is invalid.
        """
        with files.open_file(path) as file:
            content = file.read()
        try:
            if content.startswith(b"\x1f\x8b"):
                content = gzip.decompress(content)
            text = content.decode("utf-8")
            if text.startswith("{"):
                tokenizer = cls(**json.loads(text))
            else:
                lines = text.split("\n")[1 : CLIP_MERGES + 1]
                merges = [tuple(line.split()) for line in lines if line.strip()]
                if not merges or any(len(merge) != 2 for merge in merges):
                    raise ValueError("not a list of merges, with two tokens per line")
                tokenizer = cls(clip_vocabulary(merges), merges)
        # The package tokenizers raises errors without a type of their own.
        except Exception as error:
            raise ValueError(
                "`path` must be a file written by `CLIPTokenizer.save`, or OpenAI's "
                f"list of merges. This file is damaged or in another format ({error}). "
                f"Received: path={path!r}"
            ) from error
        if context_length is None:
            return tokenizer
        return tokenizer.with_context_length(context_length)

    @classmethod
    def from_open_clip(cls, context_length: int = 77) -> Self:
        """Loads OpenAI's vocabulary of 49,408 tokens from the package open_clip.

        Only the vocabulary file of the package is read; open_clip and PyTorch are not
        imported.

        Args:
            context_length: Integer. Defaults to `77`, as in all of OpenAI's models.

        Returns:
            A `CLIPTokenizer`.

        Raises:
            ImportError: If open_clip is not installed.
        """
        package = importlib.util.find_spec("open_clip")
        if package is None:
            raise ImportError(
                "`CLIPTokenizer.from_open_clip` needs the vocabulary file of "
                "open_clip: `pip install open_clip_torch`, or pass the file to "
                "`CLIPTokenizer.from_file`, or use `CLIPTokenizer.from_preset`."
            )
        folder = pathlib.Path(package.origin).parent
        return cls.from_file(folder / "bpe_simple_vocab_16e6.txt.gz", context_length)

    @classmethod
    def from_preset(cls, preset: str, context_length: int | None = None) -> Self:
        """Loads the vocabulary of a KerasHub CLIP preset.

        Args:
            preset: String. The folder of a preset, or the name of a preset of
                `keras_hub.models.CLIPTokenizer`, such as `"clip_vit_base_patch32"`,
                unless there is a folder with this name.
            context_length: Integer. Defaults to `None`: the text encoder's length in
                the folder, or 77.

        Returns:
            A `CLIPTokenizer`.
        """
        # Imported here because worker processes do not import Keras.
        from keras_cluster_mask.distribution.backends import import_keras_hub, preset_of

        preset = preset_of(preset)
        folder = pathlib.Path(preset)
        config = folder / "config.json"
        if context_length is None and config.exists():
            backbone = json.loads(config.read_text())["config"]
            encoder = backbone.get("text_encoder", {"config": backbone})["config"]
            context_length = encoder.get("max_sequence_length")
        assets = folder / "assets" / "tokenizer"
        if assets.is_dir():
            paths = assets / "vocabulary.json", assets / "merges.txt"
            return cls.from_vocabulary(*paths, context_length or 77)
        source = import_keras_hub().models.CLIPTokenizer.from_preset(preset)
        return cls._of_others(source.vocabulary, source.merges, context_length or 77)

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: str | os.PathLike,
        merges: str | os.PathLike,
        context_length: int = 77,
    ) -> Self:
        """Loads the two files of a CLIP tokenizer of Hugging Face or KerasHub.

        Args:
            vocabulary: String or path, such as `"vocab.json"`.
            merges: String or path, such as `"merges.txt"`.
            context_length: Integer. Defaults to `77`.

        Returns:
            A `CLIPTokenizer`.
        """
        ids = json.loads(pathlib.Path(vocabulary).read_text("utf-8"))
        lines = pathlib.Path(merges).read_text("utf-8").splitlines()
        return cls._of_others(ids, lines, context_length)

    @classmethod
    def _of_others(cls, ids, lines, context_length):
        names = {name: token for token, name in KERAS_HUB.items()}
        tokens = [names.get(token, token) for token in sorted(ids, key=ids.get)]
        merges = [line.split() for line in lines if "#version:" not in line]
        return cls(tokens, [merge for merge in merges if merge], context_length)

    @classmethod
    def train(
        cls,
        captions: Iterable[str | bytes],
        vocabulary_size: int = 4096,
        context_length: int = 32,
        min_frequency: int = 2,
    ) -> Self:
        """Trains a tokenizer on captions.

        A small dataset needs a small vocabulary: most of CLIP's 49,408 embeddings would
        never be trained. The same captions always give the same vocabulary.

        Args:
            captions: Iterable of strings or bytes.
            vocabulary_size: Integer. The maximum number of tokens, at least 514: the
                256 bytes, each within and at the end of a word, and two special tokens.
                Fewer are used if there are not enough frequent pairs. Defaults to
                `4096`.
            context_length: Integer. Defaults to `32`.
            min_frequency: Integer. The minimum frequency of a pair that is merged.
                Defaults to `2`.

        Returns:
            A `CLIPTokenizer`.
        """
        check_integer("vocabulary_size", vocabulary_size, 514)
        # Before the captions are read, which may take long.
        check_integer("context_length", context_length, 3)
        check_integer("min_frequency", min_frequency, 0)
        learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
        learner.pre_tokenizer = WORDS
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size - 2,
            min_frequency=min_frequency,
            # The trainer breaks ties by the ids of the letters. Unless the letters are
            # special tokens, their ids depend on the order of a randomized hash table.
            special_tokens=clip_vocabulary([])[:-2],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner.train_from_iterator(clean_all(captions), trainer)
        merges = json.loads(learner.to_str())["model"]["merges"]
        return cls(clip_vocabulary(merges), merges, context_length)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tokenizer as JSON, for `from_file`.

        Args:
            path: String or path, for example `"tokenizer.json"`. The file is written
                under a temporary name and renamed when it is complete.
        """
        with files.replacing(path) as file:
            config = {
                "vocabulary": self._vocabulary,
                "merges": self._merges,
                "context_length": self.context_length,
            }
            file.write(json.dumps(config).encode())

    def save_to_preset(self, preset_dir: str | os.PathLike) -> None:
        """Writes the tokenizer into the folder of a KerasHub CLIP preset.

        `keras_hub.models.CLIPTokenizer.from_preset` and `from_preset` read it. Only the
        text encoder of a preset states the context length.

        Args:
            preset_dir: String or path, such as the one that a backbone was saved to.
        """
        tokens = [KERAS_HUB.get(token, token) for token in self._vocabulary]
        words = {token: index for index, token in enumerate(tokens)}
        config = {
            "module": "keras_hub.models",
            "class_name": "CLIPTokenizer",
            "config": {},
            "registered_name": "keras_hub>CLIPTokenizer",
        }
        for name, text in (
            ("assets/tokenizer/vocabulary.json", json.dumps(words)),
            ("assets/tokenizer/merges.txt", "\n".join(map(" ".join, self._merges))),
            ("tokenizer.json", json.dumps(config)),
        ):
            with files.replacing(f"{os.fspath(preset_dir)}/{name}") as file:
                file.write(text.encode())

    @functools.cached_property
    def vocabulary_digest(self) -> str:
        """A hash of the vocabulary and the merges."""
        content = repr((self._vocabulary, self._merges)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def with_context_length(self, context_length: int) -> Self:
        """Returns a copy with another context length, such as for a training stage.

        Args:
            context_length: Integer, at least 3.

        Returns:
            A `CLIPTokenizer`.
        """
        return type(self)(self._vocabulary, self._merges, context_length)

    def __call__(
        self, texts: str | bytes | Sequence[str | bytes] | np.ndarray
    ) -> np.ndarray:
        """Converts captions to rows of token ids.

        Args:
            texts: String, or a sequence or array of strings or UTF-8 bytes.

        Returns:
            NumPy int32 array of shape `(len(texts), context_length)`. Each row holds
            the start token, the caption, the end token, and zeros.
        """
        texts = [texts] if isinstance(texts, str | bytes) else texts
        texts = [clean(text) for text in texts]
        # As in the reference implementation, a special token in a caption keeps its id
        # if it is a separate word.
        has_special = any(t in text for t in (START, END) for text in texts)
        if has_special:
            texts = [*map(words_of, texts)]
        rows = self._tokenizer.encode_batch_fast(texts, is_pretokenized=has_special)
        rows = np.array([row.ids for row in rows], "int32")
        return rows.reshape(-1, self.context_length)

    def decode(self, ids: Sequence | np.ndarray) -> str | list[str]:
        """Converts token ids to text, with a space between any two words.

        Args:
            ids: Integers of shape `(length,)` or `(batch, length)`. Start tokens and
                all tokens from the first end token on are dropped.

        Returns:
            A string, or a list of them for a batch.
        """
        ids = np.asarray(ids)
        if ids.ndim == 2:
            return [self.decode(row) for row in ids]
        ids = ids.tolist()
        if self.end_token_id in ids:
            ids = ids[: ids.index(self.end_token_id)]
        return self._tokenizer.decode(ids).replace(WORD_END, " ").strip()

    def __repr__(self):
        return (
            f"<CLIPTokenizer vocabulary_size={self.vocabulary_size}, "
            f"context_length={self.context_length}>"
        )
