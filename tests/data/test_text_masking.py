"""Text maskings against their references, and in `image_text_dataset`."""

import itertools
import pickle

import numpy as np
import pytest

from keras_cluster_mask.data import (
    BlockTextMasking,
    CLIPTokenizer,
    FrequencyTextMasking,
    RandomTextMasking,
    SyntaxTextMasking,
    image_text_dataset,
)

pytestmark = pytest.mark.any_backend

CAPTION = "a the dog cat red blue runs sits on under tree snow child it 's , ! 7"
COMMON = CAPTION.split()
# Of several tokens each: no merge is learned from them.
LONG = ["zyx", "qvw", "kjhg", "wxyzq", "über", "rhododendron", "写真"]
WORDS = COMMON + LONG
COUNTS = {word: 10 ** (index % 5) for index, word in enumerate(COMMON)}
TAGS = dict(zip(WORDS, itertools.cycle(["NN", "VBZ", "JJ", "DT", "NNS", "JJR", "VB"])))


def only_nouns(words):
    return ["NN"] * len(words)


def tagger(words):
    return [TAGS.get(word, "X") for word in words]


def make_tokenizer(context_length):
    return CLIPTokenizer.train([CAPTION] * 5, 600, context_length)


TOKENIZERS = {length: make_tokenizer(length) for length in (3, 6, 10, 200)}
MASKINGS = {
    "random": RandomTextMasking(),
    "block": BlockTextMasking(),
    "keep": FrequencyTextMasking(COUNTS),
    "drop": FrequencyTextMasking(COUNTS, threshold=1e-3, unknown="drop"),
    "syntax": SyntaxTextMasking(tagger),
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


def random_cases(count, seed=0, words=WORDS):
    draw = np.random.default_rng(seed)
    for index in range(count):
        size = int(draw.integers(1, 40))
        length = int(draw.choice([6, 10]))
        yield index, " ".join(draw.choice(words, size)), length


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


def syntax_score(words, sizes, num_tokens_left, u):
    ranks = {"NN": 1, "JJ": 2, "VB": 3}
    return -np.array([ranks.get(TAGS.get(word, "X")[:2], 4) for word in words])


SCORES = {
    "random": random_score,
    "block": block_score,
    "keep": frequency_score(1e-6, 0.0),
    "drop": frequency_score(1e-3, 1.0),
    "syntax": syntax_score,
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
        compared += len(expected) < len(caption.split())
    assert compared > 120


@pytest.mark.parametrize("name", ["random", "block", "keep", "syntax"])
def test_words_of_one_token_each_are_chosen_as_in_the_official_code(name):
    """The rule of CLIPA and CLIPF: the words of the highest scores, in order."""
    for seed, caption, length in random_cases(200, 1, COMMON):
        words, num_tokens_left = caption.split(), length - 2
        u = generator(seed).random(len(words))
        if name == "block":
            first = (
                int(u[0] * (len(words) - num_tokens_left + 1))
                if len(words) > num_tokens_left
                else 0
            )
            place = np.arange(len(words))
            score = ((place >= first) & (place < first + num_tokens_left)).astype(float)
        else:
            score = SCORES[name](words, None, num_tokens_left, u)
        kept = np.sort(np.lexsort((np.arange(len(words)), -score))[:num_tokens_left])
        received, row = mask(name, caption, length, seed)
        assert received == [words[index] for index in kept]
        assert (row > 0).sum() == min(len(words), num_tokens_left) + 2


@pytest.mark.parametrize("name", MASKINGS)
def test_words_stay_whole_and_in_order_and_rows_are_full(name):
    for seed, caption, length in random_cases(200, 2):
        words, kept = caption.split(), mask(name, caption, length, seed)[0]
        sizes = [num_tokens(word) for word in words]
        if min(sizes) > length - 2:
            continue
        rest = iter(words)
        assert all(word in rest for word in kept)
        num_tokens_left = length - 2 - sum(num_tokens(word) for word in kept)
        left_out = list(words)
        for word in kept:
            left_out.remove(word)
        assert num_tokens_left >= 0
        assert all(num_tokens(word) > num_tokens_left for word in left_out)


@pytest.mark.parametrize("name", MASKINGS)
def test_captions_that_fit_are_not_masked(name):
    captions = ["", "a red dog", b"A  CAT &amp; a dog", "it's snow", "red " * 8]
    rows = MASKINGS[name].tokenize(
        TOKENIZERS[10], captions, [generator(i) for i in range(len(captions))]
    )
    np.testing.assert_array_equal(rows, TOKENIZERS[10](captions))


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


def test_masked_words_are_drawn_evenly():
    caption = " ".join(COMMON[:8])
    for name in ("random", "block"):
        draw = generator(5)
        rows = MASKINGS[name].tokenize(TOKENIZERS[6], [caption] * 4000, [draw] * 4000)
        rows = [TOKENIZERS[6].decode(row).split() for row in rows]
        first = [sum(word in row for row in rows) for word in COMMON[:8]]
        # The windows of four of eight words that hold each of them, of five windows.
        windows = {"random": [2.5] * 8, "block": [1, 2, 3, 4, 4, 3, 2, 1]}[name]
        np.testing.assert_allclose(
            np.array(first) / 4000, np.array(windows) / 5, atol=0.04
        )


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
    captions = ["A dog, a DOG &amp; it's wet", b"a r\xc3\xb6hre!"] * 3 + ["", "写真"]
    masking = FrequencyTextMasking().fit(iter(captions))
    assert masking.frequencies == {
        **{"a": 9, "dog": 6, ",": 3, "&": 3, "it": 3, "'s": 3, "wet": 3},
        **{"röhre": 3, "!": 3, "写真": 1},
    }
    assert masking.probability("a") == pytest.approx(1 - np.sqrt(1e-6 / (9 / 37)))
    # The release leaves out words that are seen fewer than five times.
    masking = FrequencyTextMasking(unknown="drop").fit(captions)
    assert masking.frequencies == {"a": 9, "dog": 6}
    assert masking.probability("dog") == pytest.approx(1 - np.sqrt(1e-6 / (6 / 15)))
    assert masking.probability("wet") == 1.0


def test_rare_words_stay_and_frequent_words_leave():
    captions = ["the " * 30 + "dog"] * 50 + ["the " * 10 + "lighthouse"]
    frequency = FrequencyTextMasking(threshold=1e-2).fit(captions)
    caption, shares = "the " * 6 + "dog" + " the" * 6, []
    for masking in (frequency, RandomTextMasking()):
        draws = [generator(index) for index in range(400)]
        rows = masking.tokenize(TOKENIZERS[6], [caption] * 400, draws)
        kept = ["dog" in TOKENIZERS[6].decode(row).split() for row in rows]
        shares.append(np.mean(kept))
    assert shares[0] > 0.6
    # Four of 13 words.
    assert shares[1] == pytest.approx(4 / 13, abs=0.1)


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


def make(source, training=True, **options):
    arguments = {"tokenizer": TOKENIZERS[10], "text_masking": RandomTextMasking()}
    arguments |= {"format": "grain", "include_captions": True, "include_keys": True}
    return image_text_dataset(
        source, image_size=16, batch_size=8, training=training, **arguments | options
    )


def take(dataset, count=None):
    iterator = iter(dataset)
    batches = [*itertools.islice(iterator, count)]
    iterator.close()
    return batches


@pytest.mark.parametrize("name", MASKINGS)
def test_training_masks_token_ids_and_changes_nothing_else(shard, name):
    masked = take(make(shard, text_masking=MASKINGS[name]), 6)
    whole = take(make(shard, text_masking=None), 6)
    changed = 0
    for batch, other in zip(masked, whole):
        for entry in ("images", "captions", "keys"):
            np.testing.assert_array_equal(batch[entry], other[entry])
        for caption, row, cut in zip(
            *map(batch.get, ("captions", "token_ids")), other["token_ids"]
        ):
            words = TOKENIZERS[10].decode(row).split()
            rest = iter(caption.decode().split())
            assert all(word in rest for word in words)
            changed += (row != cut).any()
    assert changed > 24


def test_words_are_drawn_anew_in_each_epoch_and_alike_for_a_seed(shard):
    rows = {}
    for batch in take(make(shard), 9):
        for key, row in zip(batch["keys"], batch["token_ids"]):
            rows.setdefault(key, set()).add(tuple(row))
    assert np.mean([len(each) for each in rows.values()]) > 2
    for first, second in zip(take(make(shard), 3), take(make(shard), 3)):
        np.testing.assert_array_equal(first["token_ids"], second["token_ids"])
    other = take(make(shard, seed=1), 3)
    assert (other[0]["token_ids"] != take(make(shard), 1)[0]["token_ids"]).any()


def test_evaluation_and_the_tokenizer_itself_are_not_masked(shard):
    batches = take(make(shard, training=False))
    assert len(batches) == 3
    for batch in batches:
        expected = TOKENIZERS[10](batch["captions"])
        np.testing.assert_array_equal(batch["token_ids"], expected)
    dataset = make(shard)
    prompt = " ".join(WORDS)
    np.testing.assert_array_equal(
        dataset.tokenizer([prompt]), make_tokenizer(10)([prompt])
    )


def test_processes_share_the_batches_of_one(shard):
    whole = take(make(shard), 5)
    shares = [take(make(shard, process=(index, 2)), 5) for index in range(2)]
    for batch, first, second in zip(whole, *shares):
        rows = np.concatenate([first["token_ids"], second["token_ids"]])
        np.testing.assert_array_equal(rows, batch["token_ids"])


def test_a_tf_dataset_is_masked_as_well(shard):
    pytest.importorskip("tensorflow")
    expected = take(make(shard), 2)
    for batch, other in zip(make(shard, format="tf"), expected):
        np.testing.assert_array_equal(batch["token_ids"], other["token_ids"])


def test_the_description_names_the_masking_and_its_options(shard):
    described = [
        make(shard, text_masking=masking).description["data.text_masking"]
        for masking in [
            *MASKINGS.values(),
            None,
            FrequencyTextMasking({**COUNTS, "dog": 99}),
            SyntaxTextMasking(only_nouns),
        ]
    ]
    assert len({*described}) == len(described)
    assert described[0] == "RandomTextMasking()"
    assert "threshold=0.001, unknown='drop'" in described[3]
    assert described[5] is None
    # The order of a table has no effect, nor the type of its numbers.
    table = {word: np.int64(count) for word, count in reversed(COUNTS.items())}
    again = make(shard, text_masking=FrequencyTextMasking(table))
    assert again.description["data.text_masking"] == described[2]
    # Without an effect, it does not stand in the way of a comparison.
    assert make(shard, training=False).description["data.text_masking"] is None


@pytest.mark.parametrize("name", MASKINGS)
def test_a_masking_pickles(name):
    copy = pickle.loads(pickle.dumps(MASKINGS[name]))
    caption = " ".join(WORDS)
    rows = [
        each.tokenize(TOKENIZERS[10], [caption], [generator(3)])
        for each in (copy, MASKINGS[name])
    ]
    np.testing.assert_array_equal(*rows)
    assert repr(copy) == repr(MASKINGS[name])


# === Errors ===


def print_tags(words):
    return [(word, "NN") for word in words]


def one_tag(words):
    return ["NN"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "`frequencies` must be a dict.*Received: frequencies={}"),
        (["dog", "cat"], "`frequencies` must be a dict.*Received: frequencies="),
        ({"dog": 0, "cat": 0}, "`frequencies`.*positive.*Received: 'dog': 0"),
        ({"dog": 3, "cat": -1}, "`frequencies`.*positive.*Received: 'cat': -1"),
        ({"dog": float("nan")}, "`frequencies`.*positive.*Received: 'dog': nan"),
        ({"dog": "3"}, "`frequencies`.*positive.*Received: 'dog': '3'"),
        ({"Dog": 3}, "`frequencies`.*lower case.*`fit`.*Received: 'Dog'"),
        ({"red dog": 3}, "`frequencies`.*`fit`.*Received: 'red dog'"),
        ({"cat": 1, "it's": 3}, '`frequencies`.*`fit`.*Received: "it\'s"'),
        ({7: 3}, "`frequencies`.*`fit`.*Received: 7"),
    ],
)
def test_a_table_without_counts_of_words_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        FrequencyTextMasking(table)


def test_a_masking_without_a_table_asks_for_one(shard):
    with pytest.raises(ValueError, match=r"`frequencies`.*`fit.*Received: .*None"):
        make(shard, text_masking=FrequencyTextMasking())
    with pytest.raises(ValueError, match=r"`captions`.*Received: captions='a dog'"):
        FrequencyTextMasking().fit("a dog")
    with pytest.raises(ValueError, match=r"`captions`.*Received: 2 captions"):
        FrequencyTextMasking().fit(["", " "])


@pytest.mark.parametrize("threshold", [0, -1e-6, float("nan"), "1e-6", True, 0.9])
def test_a_threshold_that_leaves_no_difference_between_words_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must.*Received: threshold="):
        FrequencyTextMasking({"dog": 1, "cat": 1}, threshold=threshold)


def test_unknown_is_keep_or_drop():
    with pytest.raises(ValueError, match=r"`unknown`.*Received: unknown='mask'"):
        FrequencyTextMasking(unknown="mask")


@pytest.mark.parametrize("wrong", [one_tag, print_tags, len])
def test_a_tagger_must_return_a_tag_for_each_word(shard, wrong):
    with pytest.raises(ValueError, match=r"`tagger` must return.*Received: "):
        make(shard, text_masking=SyntaxTextMasking(wrong))
    with pytest.raises(ValueError, match=r"`tagger` must be a function.*Received: tag"):
        SyntaxTextMasking("NN")


def tag_few(words):
    return ["NN"] * min(len(words), 4)


def test_a_tagger_that_fails_on_some_captions_is_named(shard):
    dataset = make(shard, text_masking=SyntaxTextMasking(tag_few))
    with pytest.raises(ValueError, match=r"`tagger` must return.*for 12 words"):
        take(dataset, 3)


def character_codes(captions):
    return [[len(caption)] for caption in captions]


@pytest.mark.parametrize("training", [True, False])
def test_a_masking_needs_a_tokenizer_that_knows_words(shard, training):
    message = r"`text_masking` needs a `CLIPTokenizer`.*Received: tokenizer="
    for tokenizer in (character_codes, None):
        with pytest.raises(ValueError, match=message):
            make(shard, training=training, tokenizer=tokenizer)


@pytest.mark.parametrize("wrong", ["random", RandomTextMasking, 0.5, len])
def test_only_text_maskings_are_taken(shard, wrong):
    message = r"`text_masking` must be.*RandomTextMasking\(\).*Received: text_masking="
    with pytest.raises(ValueError, match=message):
        make(shard, text_masking=wrong)


def test_a_context_too_short_for_one_word_is_refused():
    with pytest.raises(ValueError, match=r"`context_length`.*at least 3.*_length=2"):
        make_tokenizer(2)
