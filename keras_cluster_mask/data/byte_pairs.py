"""What CLIP's byte-pair vocabulary is made of: cleaning, words, bytes and merges."""

import html
import json

import ftfy
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

# The characters that stand for the 256 bytes, in the order of OpenAI's vocabulary: the
# printable Latin-1 characters stand for themselves, the rest follow from U+0100 on.
BYTE_CHARACTERS = [
    *map(chr, range(0x21, 0x7F)),
    *map(chr, range(0xA1, 0xAD)),
    *map(chr, range(0xAE, 0x100)),
    *map(chr, range(0x100, 0x100 + 68)),
]
WORD_END = "</w>"
START = "<start_of_text>"
END = "<end_of_text>"
# OpenAI's file lists more merges than CLIP uses: 49,408 ids less bytes and specials.
CLIP_MERGES = 49408 - 2 * 256 - 2
# A word is a contraction's ending, a run of letters, one digit, or a run of anything
# else but white space. The reference matches blind to case, which makes the long s,
# U+017F, an s and drops U+0345, an accent whose upper case is a letter.
WORD_PATTERN = r"'[s\x{17F}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


def clean(text):
    """A caption as CLIP's vocabulary expects it."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    if not isinstance(text, str):
        raise TypeError(f"`texts` must be str or bytes. Received: {text!r}")
    # Nothing in printable ASCII without an entity needs repair, and repair is slow.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def word_splitter(*special_tokens):
    """The Rust step that cuts a clean caption into words, spelt in byte characters."""
    specials = "|".join(token.replace("|", r"\|") for token in special_tokens)
    pattern = tokenizers.Regex(f"{specials}|{WORD_PATTERN}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def clip_vocabulary(merges):
    """OpenAI's order: bytes, bytes that end a word, merges, start, end."""
    return [
        *BYTE_CHARACTERS,
        *(character + WORD_END for character in BYTE_CHARACTERS),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]


def read_merges(text):
    """OpenAI's file: a comment, then a merge a line; only so many are in use."""
    lines = text.split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ValueError("not a list of merges, two tokens a line after a comment")
    return merges


def learn_merges(captions, vocabulary_size, min_frequency):
    """The merges that shorten the captions most, always the same for the same ones."""
    # The trainer numbers the letters it meets in the order of a randomised hash table
    # and breaks ties between pairs by these numbers: so the numbers are given to it.
    letters = clip_vocabulary([])[:-2]
    learner = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.pre_tokenizer = word_splitter(START, END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        min_frequency=min_frequency,
        special_tokens=letters,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(map(clean, captions), trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
