"""Building blocks of CLIP's byte-pair encoding: cleaning, words, bytes and merges."""

import functools
import html
import json
import re

import ftfy
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

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
# also drops U+0345, an accent whose upper case is a letter.
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


def as_text(text):
    """Decodes a text that is bytes."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def clean(text):
    """Cleans a caption, string or bytes, as CLIP does."""
    return repair(text).lower()


def repair(text):
    """Cleans a caption, string or bytes, without changing its case."""
    text = as_text(text)
    # Repair is slow, and plain ASCII without HTML entities does not need it.
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def clean_all(captions):
    """Cleans an iterable of captions lazily."""
    if isinstance(captions, str | bytes):
        raise ValueError(
            "`captions` must be an iterable of captions, not a single caption. "
            f"Received: captions={captions!r}"
        )
    return map(clean, captions)


def word_splitter():
    """Returns a pre-tokenizer from a clean caption to words in byte characters."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([splitter(WORD_PATTERN), to_bytes])


@functools.cache
def splitter(pattern):
    """Returns a pre-tokenizer from a text to words: special tokens, and a pattern's."""
    pattern = tokenizers.Regex(f"(?i:{START}|{END})|{pattern}")
    return pre_tokenizers.Split(pattern, "removed", invert=True)


def words_of(text, pattern=WORD_PATTERN):
    """Splits a clean caption into words, a list of strings."""
    return [word for word, _ in splitter(pattern).pre_tokenize_str(text)]


def clip_vocabulary(merges):
    """Returns the tokens in OpenAI's order: bytes, final bytes, merges, start, end."""
    return [
        *BYTE_CHARACTERS,
        *(character + WORD_END for character in BYTE_CHARACTERS),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]


def read_merges(text):
    """Reads the merges that CLIP uses from OpenAI's file."""
    lines = text.split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ValueError("not a list of merges, with two tokens per line")
    return merges


def learn_merges(captions, vocabulary_size, min_frequency):
    """Learns the most frequent merges; the same captions give the same merges."""
    # The trainer breaks ties by the ids of the letters. Unless the letters are special
    # tokens, their ids depend on the order of a randomized hash table.
    letters = clip_vocabulary([])[:-2]
    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.pre_tokenizer = word_splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        min_frequency=min_frequency,
        special_tokens=letters,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(clean_all(captions), trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
