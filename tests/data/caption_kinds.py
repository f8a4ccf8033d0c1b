"""Captions that try a tokenizer: recombined real ones, generated unicode, and fuzz.

The same seed gives the same captions. `random.Random` draws them, not NumPy: one
character at a time it is several times faster.
"""

import html
import sys

# Blocks that captions are written in: first and last code point.
SCRIPTS = [
    (0x20, 0x7E),  # ASCII
    (0xA0, 0xFF),  # Latin-1
    (0x100, 0x24F),  # Latin, extended
    (0x250, 0x2FF),  # phonetic letters and modifiers
    (0x370, 0x3FF),  # Greek
    (0x400, 0x52F),  # Cyrillic
    (0x530, 0x58F),  # Armenian
    (0x590, 0x6FF),  # Hebrew and Arabic
    (0x900, 0xDFF),  # scripts of India
    (0xE00, 0xFFF),  # Thai, Lao, Tibetan
    (0x10A0, 0x13FF),  # Georgian, Hangul letters, Ethiopic, Cherokee
    (0x1C80, 0x1CBF),  # rare Cyrillic and Georgian capitals
    (0x1E00, 0x1FFF),  # Latin and Greek with accents
    (0x2000, 0x206F),  # punctuation, spaces, directions of text
    (0x2070, 0x24FF),  # raised digits, currencies, fractions, circled letters
    (0x2500, 0x2BFF),  # boxes, dingbats, arrows
    (0x3000, 0x30FF),  # Japanese syllables
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xA640, 0xABFF),  # Latin, Cyrillic and other letters added late
    (0xAC00, 0xD7A3),  # Korean syllables
    (0xF900, 0xFDFF),  # compatibility characters, ligatures, Arabic forms
    (0xFE00, 0xFFFF),  # variation selectors, full-width forms
    (0x10000, 0x1044F),  # ancient scripts, Deseret
    (0x1D400, 0x1D7FF),  # letters of mathematics
    (0x1F000, 0x1FAFF),  # emoji
]
EMOJI = [*"😀🎉❤☺👩👨👧🧑🚀💻🦊🏳🌈⚕✈♀♂🐈⬛", *"0123456789#*"]
SKIN_TONES = [chr(code) for code in range(0x1F3FB, 0x1F400)]
JOINER, TEXT_STYLE, EMOJI_STYLE, KEYCAP = "\u200d", "\ufe0e", "\ufe0f", "\u20e3"
RIGHT_TO_LEFT = ["\u200f", "\u202b", "\u202e", "\u2067", "\u202c", "\u2069", "\u061c"]
SPACES = [*"\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2028\u2029\u202f\u205f"]
SPACES += [*map(chr, range(0x2000, 0x200D)), "\u3000", "\ufeff", "\u2060", "\r\n"]
# What changes with case in a way of its own: Turkish i, long s, sharp s, sigma, iota
# below, Kelvin, Ångström, Dz; and ligatures.
ODD_CASES = [*"\u0130\u0131Ii\u017fs\u00df\u1e9e\u03a3\u03c3\u03c2\u0345\u037a"]
ODD_CASES += [
    *"\u03b9\u0399\u00b5\u03bc\u212aK\u212b\u00c5\u01c5\u01c6\u0149\u01f0\u0390"
]
ODD_CASES += [
    *"\ufb00\ufb01\ufb03\ufb05\ufb06\u0132\ufb13",
    "i\u0307",
    "I\u0307",
    "ΑΣ",
    "ὈΔΥΣΣΕΎΣ",
]
SPECIALS = ["<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>"]
SPECIALS += ["<START_OF_TEXT>", "<\u017ftart_of_text>", "<\ufb05art_of_text>"]
SPECIALS += ["<end_of_text", "start_of_text>", "</w>", "!<end_of_text>", "a</w>b"]
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'Re", "'\u017f"]
CONTRACTIONS += ["\u2019s", "'", "''s", "'sx", "'r", "'1", "`s", "'\u0345", "'d've"]
ENTITIES = ["&amp;", "&lt;", "&gt;", "&quot;", "&nbsp;", "&eacute;", "&AMP;", "&amp"]
ENTITIES += ["&#39;", "&#x27;", "&#xD800;", "&#0;", "&#128;", "&#x110000;", "&#;", "&#"]
ENTITIES += ["&notit;", "&bogus;", "&eacute", "&amp;amp;", "&amp;lt;", "&#38;#39;"]
ENTITIES += ["&ThickSpace;", "&NotEqualTilde;", "&shy;", "&zwj;", "&Sigma;", "&fflig;"]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
DIGITS = "0123456789٣५๙\uff10½²Ⅷ①\u3007"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def recombined(sources, count, rng):
    """Captions of a collection, then new ones out of their words and sentences.

    One in twenty is made of so many captions that it exceeds 77 tokens.

    Args:
        sources: List of str, the collection.
        count: How many captions to make.
        rng: A `random.Random`.
    """
    captions = sources[:count]
    while len(captions) < count:
        parts = rng.choices(sources, k=rng.randint(1, 4))
        if rng.random() < 0.05:
            parts = rng.choices(sources, k=rng.randint(20, 40))
        caption = rng.choice([", ", ". ", " and ", " - "]).join(parts)
        if rng.random() < 0.5:
            words = caption.split()
            caption = " ".join(rng.sample(words, rng.randint(1, len(words))))
        caption = rng.choice(["", "", "a photo of ", "There's "]) + caption
        if rng.random() < 0.5:
            caption = caption.capitalize() + rng.choice(".!?")
        captions.append(caption)
    return captions


def unicode_captions(count, rng):
    """Captions of all scripts and planes, emoji, and text that was decoded wrongly."""
    makers = [_letters, _letters, _any_code_points, _accents, _emoji, _right_to_left]
    makers += [_controls, _mojibake, _surrogates, _full_width, _odd_cases]
    return [_joined(makers, rng) for _ in range(count)]


def fuzz_captions(sources, count, rng):
    """Captions of markup, special tokens, digits, punctuation, and broken real ones."""
    makers = [_entities, _special, _contraction, _digits, _punctuation, _long_word]
    makers += [lambda rng: rng.choice(sources), lambda rng: _mutated(sources, rng)]
    captions = []
    for _ in range(count):
        if rng.random() < 0.02:
            captions.append("".join(rng.choices(SPACES, k=rng.randint(0, 5))))
        else:
            captions.append(_joined(makers, rng))
    return captions


def _joined(makers, rng):
    parts = []
    for maker in rng.choices(makers, k=rng.randint(1, 5)):
        parts += [maker(rng), rng.choice(["", " ", " ", rng.choice(SPACES)])]
    return "".join(parts)


def _letters(rng):
    first, last = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))


def _any_code_points(rng):
    return "".join(_any_code_point(rng) for _ in range(rng.randint(1, 6)))


def _any_code_point(rng):
    # Planes 0 to 3 hold almost all there is, the others almost nothing.
    last = rng.choice([0xFFFF, 0x1FFFF, 0x3FFFF, sys.maxunicode])
    code = rng.randint(0, last)
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)


def _accents(rng):
    letters = rng.choices(ALPHABET + "αіאあ한", k=rng.randint(1, 5))
    accents = [*map(chr, range(0x300, 0x370)), "\u0591", "\u0301", "\u3099", "\u20d2"]
    return "".join(
        x + "".join(rng.choices(accents, k=rng.randint(0, 3))) for x in letters
    )


def _emoji(rng):
    joints = [JOINER, EMOJI_STYLE + JOINER, EMOJI_STYLE, TEXT_STYLE, KEYCAP, ""]
    parts = []
    for _ in range(rng.randint(1, 5)):
        parts.append(rng.choice(EMOJI))
        parts.append(rng.choice(["", rng.choice(SKIN_TONES)]) + rng.choice(joints))
    flag = "".join(chr(0x1F1E6 + rng.randrange(26)) for _ in range(rng.randint(0, 4)))
    return "".join(parts) + flag


def _right_to_left(rng):
    text = "".join(chr(rng.randint(0x590, 0x6FF)) for _ in range(rng.randint(1, 8)))
    return rng.choice(RIGHT_TO_LEFT) + text + rng.choice(["", *RIGHT_TO_LEFT])


def _controls(rng):
    controls = [*map(chr, [*range(0x20), *range(0x7F, 0xA0)]), "\x1b[31m", *SPACES]
    return "".join(rng.choice(controls) + rng.choice(ALPHABET) for _ in range(4))


def _mojibake(rng):
    text = rng.choice(
        ["café “naïve” — it\u2019s", "Größe", "señor…", "日本", "😀", "İstanbul"]
    )
    encoding = rng.choice(["latin-1", "cp1252", "cp1251", "macroman", "cp437"])
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8").decode(encoding, errors="replace")
    return text


def _surrogates(rng):
    # What `errors="surrogateescape"` makes of bytes, and halves of UTF-16.
    text = bytes(rng.randrange(256) for _ in range(rng.randint(1, 6)))
    text = text.decode("utf-8", errors="surrogateescape")
    return text + rng.choice(["", "\ud83d", "\udc00", "\ud83d\ude00"])


def _full_width(rng):
    return "".join(chr(rng.randint(0xFF00, 0xFFEF)) for _ in range(rng.randint(1, 8)))


def _odd_cases(rng):
    return "".join(rng.choices(ODD_CASES + ["a", "'"], k=rng.randint(1, 6)))


def _entities(rng):
    entity = rng.choice(ENTITIES)
    if rng.random() < 0.3:
        entity = f"&#{rng.randrange(0x3000)};"
    for _ in range(rng.choice([0, 0, 0, 1, 2, 3])):
        entity = html.escape(entity)
    return entity[: rng.randint(1, len(entity))] if rng.random() < 0.3 else entity


def _special(rng):
    return rng.choice(SPECIALS)


def _contraction(rng):
    return rng.choice(["it", "we", "don", "", "x1", "é"]) + rng.choice(CONTRACTIONS)


def _digits(rng):
    return "".join(rng.choices(DIGITS + ".,x", k=rng.randint(1, 15)))


def _punctuation(rng):
    if rng.random() < 0.5:
        return rng.choice(PUNCTUATION) * rng.randint(1, 40)
    return "".join(rng.choices(PUNCTUATION, k=rng.randint(1, 15)))


def _long_word(rng):
    length = rng.choice([10, 30, 100, 400])
    return "".join(rng.choices(ALPHABET[: rng.choice([2, 26, 52])], k=length))


def _mutated(sources, rng):
    caption = list(rng.choice(sources))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(caption) + 1)
        piece = _any_code_point(rng) if rng.random() < 0.5 else rng.choice(PUNCTUATION)
        caption[place : place + rng.randint(0, 3)] = rng.choice(["", piece, piece * 2])
    text = "".join(caption)
    return rng.choice([text, text.upper(), text.title(), text[: len(text) // 2]])
