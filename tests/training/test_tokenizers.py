"""Whether a tokenizer suits a text tower, in `fit` and in evaluation."""

import html
import re

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.evaluation import (
    embed,
    embed_texts,
)
from keras_cluster_mask.training.tokenizers import check_tokenizer, digest_of
from tests.data.reading import keras_hub_tokenizer
from tests.encoders.test_pooled import bert, make_model
from tests.helpers import (
    CONTEXT,
    FAST,
    VOCABULARY,
    image_mlp,
    random_pairs,
    stream,
    text_bag,
    tiny_clip,
    tiny_metaclip,
)

pytestmark = pytest.mark.any_backend

START, END = VOCABULARY - 2, VOCABULARY - 1
# The end token that a MetaCLIP 2 backbone pools at.
METACLIP_END = 2


def make_tokenizer(start=(START,), end=END, length=CONTEXT, padding=0):
    """Letters between special tokens, filled up; `None` leaves a special token out."""

    def tokenizer(texts):
        ends = [] if end is None else [end]
        rows = []
        for text in texts:
            letters = [1 + byte % (START - 1) for byte in text.encode()]
            row = [*start, *letters[: length - len(start) - len(ends)], *ends]
            rows.append(row + [padding] * (length - len(row)))
        return rows

    return tokenizer


BAD = {
    "bare": make_tokenizer(start=(), end=None),
    "without a start": make_tokenizer(start=()),
    "without an end": make_tokenizer(end=None),
    "with an end of a low id": make_tokenizer(start=(START,), end=1),
    "with a start of the highest id": make_tokenizer(start=(END,), end=START),
    "with the highest id before the words": make_tokenizer((START, END), None),
    "in rows without words": make_tokenizer((START, END), None, length=3),
}


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_pairs_to):
    return write_pairs_to(tmp_path_factory.mktemp("shards") / "a.tar", 0, 8)


def embed_cat(model, tokenizer):
    return embed_texts(model, ["a cat"], tokenizer, verbose=0)


SPECIAL_TOKENS = r"`tokenizer` must .*highest id.*CLIPPreprocessor.*Received: "


@pytest.mark.parametrize("kind", list(BAD))
def test_a_clip_tower_needs_a_start_and_an_end_of_the_highest_id(clip, kind):
    with pytest.raises(ValueError, match=SPECIAL_TOKENS):
        check_tokenizer(clip, BAD[kind])
    # Other towers do not.
    check_tokenizer(kcm.ContrastiveModel(image_mlp(), text_bag()), BAD["bare"])


def test_a_tokenizer_is_checked_wherever_it_is_used(clip, shard):
    bad, captions = BAD["bare"], ["a cat", "no dog"]
    captioned = {"images": random_pairs(2)["images"], "captions": captions}
    data = stream(shard, bad, training=False)
    retrieval = kcm.callbacks.Retrieval(captioned, bad)
    for call in (
        lambda: embed(clip, captioned, bad),
        lambda: embed_texts(clip, captions, bad),
        lambda: embed(clip, data),
        lambda: clip.evaluate(data),
        lambda: clip.fit(stream(shard, bad)),
        lambda: clip.fit(random_pairs(4), validation_data=data),
        lambda: clip.fit(random_pairs(4), callbacks=[retrieval]),
    ):
        with pytest.raises(ValueError, match=SPECIAL_TOKENS):
            call()


def test_a_bare_tokenizer_of_keras_hub_is_refused(tmp_path):
    pytest.importorskip("tensorflow")
    models = pytest.importorskip("keras_hub").models
    ours = kcm.data.CLIPTokenizer.train(["a cat", "a dog"] * 5, 600, context_length=12)
    ragged = keras_hub_tokenizer(ours, tmp_path)
    layer = models.CLIPTokenizer(ragged.vocabulary, ragged.merges, sequence_length=12)
    model = make_clip(ours.vocabulary_size, 12)
    # The second fills texts up before their end token.
    for tokenizer in (layer, models.CLIPPreprocessor(layer, sequence_length=12)):
        with pytest.raises(ValueError, match=r"CLIPPreprocessor.*Received: "):
            check_tokenizer(model, tokenizer)


def test_rows_that_are_longer_than_the_tower_takes_are_an_error(clip):
    tokenizer = make_tokenizer(length=CONTEXT + 1)
    message = r"`token_ids` must .*at most 6 columns.*Received: .*\(3, 7\)"
    with pytest.raises(ValueError, match=message):
        embed_cat(clip, tokenizer)


def test_a_tokenizer_of_known_captions_alone_cannot_be_checked(clip):
    known = make_tokenizer()(["a cat"])

    def table(texts):
        return [{"a cat": known[0]}[text] for text in texts]

    assert embed_cat(clip, table).shape == (1, 96)


# === The tokenizer that a model was trained with ===


def letters(texts):
    """Another tokenizer of the same special tokens."""
    return make_tokenizer()([text[::-1] for text in texts])


def make_clip(vocabulary_size=VOCABULARY, length=CONTEXT):
    backbone = kcm.models.clip_backbone("tiny", 16, vocabulary_size, length, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))
    model.compile("sgd", **FAST)
    return model


ANOTHER = r"`tokenizer` must give the token ids.*`model.tokenizer`.*Received: "


def test_stages_of_any_length_take_one_tokenizer_and_no_other(shard):
    captions = ["a photo of red cats", "a drawing of blue dogs"] * 2
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, 16)
    other = kcm.data.CLIPTokenizer.train(["red dogs", "photos of cats"] * 2, 600, 16)
    model = make_clip(600, 16)
    for length in (3, 4, 8, 16):
        model.fit(stream(shard, tokenizer.with_context_length(length)), verbose=0)
        # A model reads as long texts as it was trained on.
        assert model.tokenizer.context_length == length
        with pytest.raises(ValueError, match=ANOTHER):
            model.fit(stream(shard, other.with_context_length(length)), verbose=0)
    model.fit(stream(shard, tokenizer.with_context_length(4)), verbose=0)
    assert model.tokenizer.context_length == 16


def test_a_checkpoint_of_another_tokenizer_is_refused(shard, tmp_path):
    checkpoint = kcm.callbacks.Checkpoint(tmp_path)
    model = make_clip()
    model.fit(stream(shard, make_tokenizer()), callbacks=[checkpoint], verbose=0)
    again = make_clip()
    with pytest.raises(ValueError, match=r"Received: .*tokenizer: '"):
        again.fit(stream(shard, letters), resume_from=tmp_path, verbose=0)
    # Nothing was trained, so another tokenizer may still be taken.
    assert again.tokenizer is None
    # A callable that gives the same ids is the same tokenizer.
    again.fit(
        stream(shard, make_tokenizer()), resume_from=tmp_path, epochs=2, verbose=0
    )


def test_the_tokenizer_may_be_changed_on_purpose(shard):
    model = make_clip()
    # Of arrays, no tokenizer is known.
    model.fit(random_pairs(4), verbose=0)
    assert model.tokenizer is None
    model.fit(stream(shard, make_tokenizer()), verbose=0)
    model.tokenizer = None
    embed_cat(model, letters)
    model.fit(stream(shard, letters), verbose=0)
    with pytest.raises(ValueError, match=ANOTHER):
        embed_cat(model, make_tokenizer())


def test_towers_that_read_whole_rows_tell_how_they_are_filled_up():
    model = kcm.ContrastiveModel(image_mlp(), text_bag(), tokenizer=make_tokenizer())
    check_tokenizer(model, make_tokenizer())
    with pytest.raises(ValueError, match=ANOTHER):
        check_tokenizer(model, make_tokenizer(padding=END))


def test_towers_that_hide_padding_take_rows_of_any_length():
    model = make_model(texts=lambda: bert(max_sequence_length=16))
    model.tokenizer = make_tokenizer(length=16)
    check_tokenizer(model, make_tokenizer(length=8))
    with pytest.raises(ValueError, match=ANOTHER):
        check_tokenizer(model, make_tokenizer(length=8, end=1))


# === A tokenizer of its own length ===


def hugging_face(end, **options):
    """A tokenizer of words that ends texts in a token of this id."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    names = {START: "<s>", end: "</s>", 1: "<pad>", 3: "<unk>"}
    words = iter(["dog", "two", "red", "boats", "on", "the", "sea", "a", "child"])
    ids = {names.get(i) or next(words, f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(ids, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", end)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **options
    )


@pytest.mark.parametrize(
    ("backbone", "end"), [(tiny_clip, END), (tiny_metaclip, METACLIP_END)]
)
def test_a_trained_model_takes_its_tokenizer_of_a_length_below_the_towers(
    shard, backbone, end
):
    tokenizer = hugging_face(end, model_max_length=4)
    model = kcm.ContrastiveModel.from_backbone(backbone())
    model.compile("sgd", **FAST)
    model.fit(stream(shard, tokenizer), verbose=0)
    # Texts are truncated as in training.
    found = embed_texts(model, ["two red boats on"], tokenizer, verbose=0)
    ids = tokenizer("two red", padding=False)["input_ids"]
    expected = keras.ops.convert_to_numpy(model.encode_text(np.array([ids])))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_tokenizer_without_a_length_makes_rows_of_the_towers():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    text = "two red boats on the sea"
    found, expected = (
        embed_texts(model, [text], hugging_face(END, **options), verbose=0)
        for options in ({}, {"model_max_length": CONTEXT})
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("backbone", "end", "lengths"),
    [
        (lambda: kcm.models.clip_backbone("tiny", 16, VOCABULARY, 12, 4), END, (12, 8)),
        (tiny_metaclip, METACLIP_END, (CONTEXT,)),
    ],
)
def test_towers_that_pool_at_the_end_take_rows_of_any_length_and_padding(
    backbone, end, lengths
):
    model = kcm.ContrastiveModel.from_backbone(backbone())
    tokenizers = [
        make_tokenizer(end=end, length=length, padding=padding)
        for length in lengths
        for padding in (0, end)
    ]
    model.tokenizer = tokenizers[0]
    texts = ["aac", "d"]
    expected = embed_texts(model, texts, tokenizers[0], verbose=0)
    for tokenizer in tokenizers[1:]:
        found = embed_texts(model, texts, tokenizer, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


# === What a tokenizer does to texts that are not of plain words ===

CLEANED = {
    "case": str.lower,
    "digits": lambda text: re.sub(r"\d", "0", text),
    "punctuation": lambda text: re.sub(r"[.,!']", "", text),
    "accents": lambda text: text.replace("é", "e"),
    "symbols": lambda text: text.replace("€", "?"),
    "entities": html.unescape,
}


@pytest.mark.parametrize("kind", list(CLEANED))
def test_a_tokenizer_that_cleans_texts_otherwise_is_another(clip, kind):
    tokenizer, clean = make_tokenizer(), CLEANED[kind]

    def cleaned(texts):
        return tokenizer([clean(text) for text in texts])

    assert digest_of(clip, cleaned) != digest_of(clip, tokenizer)


def test_a_tokenizer_of_plain_words_alone_is_recognized_too(clip):
    def plain(texts):
        if not all(re.fullmatch("[a-z ]*", text) for text in texts):
            raise KeyError("unknown letter")
        return make_tokenizer()(texts)

    def reverse(texts):
        return plain([text[::-1] for text in texts])

    assert digest_of(clip, plain) != digest_of(clip, reverse)


# === Tokenizers that drop words ===


@pytest.mark.parametrize("known", ["", "dog", "sea", "two red", "tall tree"])
def test_a_clip_tower_takes_a_tokenizer_that_drops_unknown_words(clip, known):
    words = known.split()

    def tokenizer(texts):
        kept = ["".join(w for w in text.split() if w in words) for text in texts]
        return make_tokenizer()(kept)

    found = embed_texts(clip, ["dog", "two cats"], tokenizer, verbose=0)
    assert found.shape == (2, 96)
