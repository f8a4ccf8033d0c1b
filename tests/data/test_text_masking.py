"""Text maskings against their references, and in `image_text_dataset`."""

import functools
import itertools

import numpy as np
import pytest

from keras_cluster_mask.data import (
    BlockTextMasking,
    CLIPTokenizer,
    FrequencyTextMasking,
    RandomTextMasking,
    TextMasking,
    subset,
)
from keras_cluster_mask.data.text_masking import check_text_masking
from tests.data.reading import make_dataset, take

pytestmark = pytest.mark.any_backend

CAPTION = "a the dog cat red blue runs sits on under tree snow child it 's , ! 7"
COMMON = CAPTION.split()
# Of several tokens each: no merge is learned from them.
LONG = ["zyx", "qvw", "kjhg", "wxyzq", "über", "rhododendron", "写"]
WORDS = COMMON + LONG
COUNTS = {word: 10 ** (index % 5) for index, word in enumerate(COMMON)}


class Shifted(TextMasking):
    """Keeps other words in each epoch."""

    def __init__(self, epoch=0):
        self.epoch = epoch

    def of_epoch(self, epoch):
        return Shifted(epoch)

    def score(self, caption):
        return [(sum(map(ord, word)) + 5 * self.epoch) % 23 for word in caption.words]


def make_tokenizer(context_length):
    return CLIPTokenizer.train([CAPTION] * 5, 600, context_length)


TOKENIZERS = {length: make_tokenizer(length) for length in (3, 6, 10, 200)}
MASKINGS = {
    "random": RandomTextMasking(),
    "block": BlockTextMasking(),
    "keep": FrequencyTextMasking(COUNTS),
    "drop": FrequencyTextMasking(COUNTS, threshold=1e-3, unknown="drop"),
}


def generator(seed):
    return np.random.Generator(np.random.Philox(seed))


def num_tokens(word):
    row = TOKENIZERS[200]([word])[0]
    return int((row > 0).sum()) - 2


def mask(name, caption, length, seed):
    """The words that stay of a caption, and its row of token ids."""
    tokenizer = TOKENIZERS[length]
    row = MASKINGS[name].tokenize(tokenizer, [caption], [generator(seed)])[0]
    return tokenizer.decode(row).split(), row


def random_cases(count):
    draw = np.random.default_rng(0)
    for index in range(count):
        size = int(draw.integers(1, 40))
        length = int(draw.choice([6, 10]))
        yield index, " ".join(draw.choice(WORDS, size)), length


# === References ===


def random_score(words, sizes, num_tokens_left, u):
    return u


def block_score(words, sizes, num_tokens_left, u):
    # Of windows of `num_tokens_left` tokens, those that end within the caption.
    starts = [i for i in range(len(words)) if sum(sizes[i:]) >= num_tokens_left]
    first = starts[int(u[0] * len(starts))]
    order = [*range(first, len(words)), *reversed(range(first))]
    return -np.argsort(order)


def frequency_score(threshold, unknown):
    total = sum(COUNTS.values())

    def score(words, sizes, num_tokens_left, u):
        p = [
            max(0.0, 1 - np.sqrt(threshold * total / COUNTS[word]))
            if word in COUNTS
            else unknown
            for word in words
        ]
        return u - np.array(p)

    return score


SCORES = {
    "random": random_score,
    "block": block_score,
    "keep": frequency_score(1e-6, 0.0),
    "drop": frequency_score(1e-3, 1.0),
}


def kept_words(name, caption, length, seed):
    """Which words stay: by score, each if its tokens still fit."""
    words, num_tokens_left = caption.split(), length - 2
    sizes = [num_tokens(word) for word in words]
    if sum(sizes) <= num_tokens_left:
        return words
    score = SCORES[name](
        words, sizes, num_tokens_left, generator(seed).random(len(words))
    )
    order = np.lexsort((np.arange(len(words)), -score))
    kept = []
    for index in order:
        if sizes[index] <= num_tokens_left:
            num_tokens_left -= sizes[index]
            kept.append(index)
    return [words[index] for index in sorted(kept)]


@pytest.mark.parametrize("name", MASKINGS)
def test_rows_equal_the_reference(name):
    compared = 0
    for seed, caption, length in random_cases(200):
        expected = kept_words(name, caption, length, seed)
        if not expected:
            continue
        words, row = mask(name, caption, length, seed)
        assert words == expected
        np.testing.assert_array_equal(row, TOKENIZERS[length]([" ".join(expected)])[0])
        # For another kind of tokenizer, a word that fills a row counts as too long.
        if length - 2 not in map(num_tokens, caption.split()):
            other = TOKENIZERS[length].__call__
            rows = MASKINGS[name].tokenize(other, [caption], [generator(seed)])
            np.testing.assert_array_equal(rows[0], row)
        compared += len(expected) < len(caption.split())
    assert compared > 120


def test_captions_that_fit_are_not_masked():
    captions = ["", "a red dog", b"A  CAT &amp; a dog", "it's snow", "red " * 8]
    # A word of six letters, whose tokens are fewer than those of its letters.
    chinese = ["一只狗在雪地"]
    merged = CLIPTokenizer.train(chinese * 5, 600, 4)
    for tokenizer, texts in ((TOKENIZERS[10], captions), (merged, chinese)):
        rows = RandomTextMasking().tokenize(tokenizer, texts, [None] * len(texts))
        np.testing.assert_array_equal(rows, tokenizer(texts))


def test_a_caption_without_a_word_that_fits_is_cut_as_without_masking():
    for length in (3, 6):
        tokenizer = TOKENIZERS[length]
        rows = RandomTextMasking().tokenize(tokenizer, [LONG[-2]], [generator(0)])
        np.testing.assert_array_equal(rows, tokenizer([LONG[-2]]))
        assert (rows > 0).all()


def test_special_tokens_in_a_caption_are_words():
    caption = "a dog <end_of_text> on the tree " + "snow " * 9
    for seed in range(20):
        kept = mask("random", caption, 10, seed)[1].tolist()
        assert kept[0] == TOKENIZERS[10].start_token_id
        assert kept[9] == TOKENIZERS[10].end_token_id
        assert 0 not in kept
    # As whole tokens, with `unknown="drop"` the first to leave.
    row = mask("drop", caption, 10, 0)[1].tolist()
    assert row.index(TOKENIZERS[10].end_token_id) == 9


@pytest.mark.parametrize(
    "caption", ["A  Dog's ball, &amp; 42 caf\u00c3\u00a9s", b"no_1", "写真abc"]
)
def test_split_returns_the_words_that_a_masking_gets(caption):
    seen = []

    class Seen(TextMasking):
        def score(self, caption):
            seen.extend(caption.words)
            return [0.0] * len(caption.words)

    Seen().tokenize(TOKENIZERS[3], [caption], [generator(0)])
    assert seen == TextMasking.split(caption)
    assert len(seen) > 2


@pytest.mark.parametrize(
    "pieces",
    [
        "一|只|狗|在|雪|地",
        "ab|写|真|、|ス|キ|ー|cd",
        "สุ|นั|ข|วิ่|ง",
        "ລ|າ|ວ ខ្|មែ|រ မြ|န်|မာ",
        "개가 눈밭을 달린다",
    ],
)
def test_in_scripts_without_spaces_each_character_is_a_word(pieces):
    caption, words = pieces.replace("|", ""), pieces.replace("|", " ").split()
    assert TextMasking.split(caption) == words
    assert [*FrequencyTextMasking().fit([caption]).frequencies] == words
    FrequencyTextMasking(dict.fromkeys(words, 1))


def test_characters_of_chinese_are_kept_as_words_are():
    def characters(texts):
        """A token a character, in rows of 6."""
        texts = [text.replace(" ", "").ljust(6, "\0") for text in texts]
        return [[*map(ord, text[:6])] for text in texts]

    caption = "一只狗在雪地里奔跑"
    rows = RandomTextMasking().tokenize(
        characters, [caption] * 40, [*map(generator, range(40))]
    )
    found = {"".join(map(chr, row)) for row in rows}
    assert found <= {*map("".join, itertools.combinations(caption, 6))}
    assert len(found) > 20


# === Word frequencies ===


def test_the_probability_to_leave_out_a_word_is_the_law_of_word2vec():
    shares = [5e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    names = ["a", "b", "c", "d", "e", "f"]
    table = dict(zip(names, shares), rest=1 - sum(shares))
    masking = FrequencyTextMasking(table, threshold=1e-6)
    expected = [0.996, 0.968, 0.90, 0.68, 0.0, 0.0]
    received = [masking.probability(name) for name in names]
    np.testing.assert_allclose(received, expected, atol=5e-3)
    assert masking.probability("unseen") == 0.0
    assert FrequencyTextMasking(table, unknown="drop").probability("unseen") == 1.0


def test_fit_counts_the_words_of_clean_captions():
    captions = ["A dog, a DOG &amp; it's wet", b"a r\xc3\xb6hre!"] * 3 + ["", "写"]
    masking = FrequencyTextMasking().fit(iter(captions))
    counts = {"a": 9, "dog": 6, ",": 3, "&": 3, "it": 3, "'s": 3, "wet": 3}
    counts |= {"röhre": 3, "!": 3, "写": 1}
    assert masking.frequencies == {word: n / 37 for word, n in counts.items()}
    # The release leaves out words that are seen fewer than five times.
    masking = FrequencyTextMasking(unknown="drop").fit(captions)
    assert masking.frequencies == {"a": 9 / 15, "dog": 6 / 15}
    assert masking.probability("wet") == 1.0


# === Tokenizers of any kind ===


class EachThird(TextMasking):
    def score(self, caption):
        return [index % 3 for index in range(len(caption.words))]


@pytest.mark.parametrize("start", [[], [5]], ids=["SigLIP", "MetaCLIP 2"])
@pytest.mark.parametrize("padding", [1, 2])
def test_kept_words_are_as_in_the_caption(start, padding):
    seen = []

    def tokenizer(texts):
        """A token a word, and an end of 2 in rows of 6."""
        seen[:] = texts
        ids = [[7] * len(text.split()) for text in texts]
        rows = [[*start, *row][:5] + [2] for row in ids]
        return [row + [padding] * (6 - len(row)) for row in rows]

    captions = ["A  Dog, &amp; it's 25!! Two", b"One &amp; 3  Four"]
    EachThird().tokenize(tokenizer, captions, [None] * 2)
    # Captions that fit are not changed.
    assert seen == ["Dog, 's !!" if start else "Dog, it's !!", "One &amp; 3  Four"]


# === In a dataset ===


@pytest.fixture
def shard(write_tar, noise):
    draw = np.random.default_rng(0)
    members = []
    for index in range(24):
        caption = " ".join(draw.choice(WORDS, 12))
        members += [
            (f"{index:02}.png", noise(index)),
            (f"{index:02}.txt", caption.encode()),
        ]
    return write_tar("texts.tar", members)


make = functools.partial(
    make_dataset,
    training=True,
    tokenizer=TOKENIZERS[10],
    text_masking=RandomTextMasking(),
    include_captions=True,
)


@pytest.mark.parametrize("name", MASKINGS)
def test_training_masks_token_ids_and_changes_nothing_else(shard, name):
    masked = take(make(shard, text_masking=MASKINGS[name]), 6)
    whole = take(make(shard, text_masking=None), 6)
    for batch, other in zip(masked, whole):
        changed = batch.pop("token_ids") != other.pop("token_ids")
        assert changed.any(axis=1).sum() > 4
        for entry in other:
            np.testing.assert_array_equal(batch[entry], other[entry])


@pytest.mark.parametrize("length", [24, 20])
@pytest.mark.parametrize("start", [0, 3])
def test_each_epoch_has_its_masking_also_after_a_stop(shard, length, start):
    """A batch may hold samples of two epochs."""

    def rows(masking, start=0):
        source = subset(shard, range(length))
        dataset = make(source, text_masking=masking)
        dataset.start = start
        return np.concatenate([b["token_ids"] for b in take(dataset, 9 - start)])

    epochs = np.arange(72) // length
    fixed = [rows(FixedEpoch(epoch)) for epoch in range(max(epochs) + 1)]
    expected = np.array([fixed[epoch][row] for row, epoch in enumerate(epochs)])
    np.testing.assert_array_equal(rows(Shifted(), start), expected[8 * start :])
    assert (fixed[0] != fixed[1]).any(axis=1).mean() > 0.5


class FixedEpoch(Shifted):
    """Stays in its epoch."""

    def of_epoch(self, epoch):
        return self


def test_the_description_names_the_masking_and_its_options(shard):
    def describe(masking):
        return make(shard, text_masking=masking).description["text_masking"]

    described = [*map(describe, [*MASKINGS.values(), None])]
    assert described[0] == "RandomTextMasking()"
    assert "threshold=0.001, unknown='drop'" in described[3]
    assert described[4] is None
    # The order of a table has no effect, nor the type of its numbers.
    table = {word: np.int64(count) for word, count in reversed(COUNTS.items())}
    assert describe(FrequencyTextMasking(table)) == described[2]
    assert describe(FrequencyTextMasking(table | {"dog": 99})) not in described
    # Evaluation is not masked.
    assert make(shard, training=False).description["text_masking"] is None


# === Errors ===


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            ("frequencies", {"frequencies": table})
            for table in (
                {},
                {"dog": 3, "cat": 0},
                {"dog": float("nan")},
                {"dog": "3"},
                {"Dog": 3},
                {"cat": 1, "it's": 3},
                {"写真": 1},
            )
        ),
        ("threshold", {"threshold": 0}),
        ("unknown", {"unknown": "mask"}),
        ("captions", {"captions": "a dog"}),
        ("frequencies", {"captions": ["", " "]}),
    ],
)
def test_invalid_arguments_of_frequencies_are_named(name, options):
    captions = options.pop("captions", ["a dog"])
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: "):
        FrequencyTextMasking(**options).fit(captions)


class FirstWord(TextMasking):
    def keep_words(self, caption):
        return [0]


def test_a_masking_may_choose_words_without_scores(shard):
    make(shard, text_masking=FirstWord())
    with pytest.raises(NotImplementedError, match="must implement `score"):
        make(shard, text_masking=TextMasking())


def padded_before(captions):
    return [[0] * (9 - len(text[:6])) + [1] * len(text[:6]) + [2] for text in captions]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text_masking", {"tokenizer": padded_before}),
        ("text_masking", {"tokenizer": padded_before, "training": False}),
        ("text_masking", {"tokenizer": None}),
        ("text_masking", {"text_masking": "random"}),
        ("text_masking", {"text_masking": RandomTextMasking}),
        ("frequencies", {"text_masking": FrequencyTextMasking()}),
    ],
)
def test_a_dataset_names_a_masking_that_it_cannot_use(shard, name, options):
    with pytest.raises(ValueError, match=rf"`{name}`.*Received: "):
        make(shard, **options)


def test_a_tokenizer_whose_length_changed_masks_for_the_new_length():
    def letters(texts):
        rows = [[1, *(3 + len(word) for word in x.split()), 2] for x in texts]
        return [(row + [0] * 16)[: letters.context_length] for row in rows]

    masking = RandomTextMasking()
    for letters.context_length in (16, 5):
        check_text_masking(masking, letters)
        ids = masking.tokenize(letters, ["a bb ccc dddd eeeee"], [generator(3)])
        assert np.count_nonzero(ids) == min(letters.context_length, 7)
    assert ids[0, -1] == 2


def test_long_contexts_are_masked_only_if_a_caption_does_not_fit():
    tokenizer, masking = make_tokenizer(1000), RandomTextMasking()
    fits = " ".join(["dog"] * 800)
    (ids,) = masking.tokenize(tokenizer, [fits], [generator(0)])
    np.testing.assert_array_equal(ids, tokenizer([fits])[0])
    # Letters without spaces, of more than 127 tokens.
    tokenizer, wide = make_tokenizer(248), "".join(map(chr, range(0x4E00, 0x4E78)))
    (ids,) = masking.tokenize(tokenizer, [wide], [generator(0)])
    assert not np.array_equal(ids, tokenizer([wide])[0])
