import functools
import os
import pathlib
import timeit

import keras
import numpy as np
import pytest

from keras_cluster_mask.data import example_images, read_captions
from keras_cluster_mask.data.tokenizing import length_of, tokenize
from tests.data.reading import (
    TOKENIZER,
    keras_hub_tokenizer,
    make_dataset,
    mixed_captions,
    take,
)

# A folder of tar files with captions.
FLICKR8K = "KERAS_CLUSTER_MASK_FLICKR8K"


@pytest.fixture
def shard(write_pairs):
    return write_pairs("a.tar", 0, 20)


make = functools.partial(make_dataset, include_captions=True, include_keys=False)


def first(dataset):
    return take(dataset, 1)[0]


@pytest.mark.one_case
@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda texts: [0] * len(texts),
        lambda texts: [[0, 0]],
        lambda texts: [[0.5, 1.0]] * len(texts),
        lambda texts: [[True, False]] * len(texts),
    ],
)
def test_a_tokenizer_that_returns_no_rows_is_an_error(shard, tokenizer):
    with pytest.raises(Exception, match=r"`tokenizer`.*Received: "):
        first(make(shard, tokenizer=tokenizer))


@pytest.mark.any_backend
def test_without_a_tokenizer_captions_are_not_needed(write_tar, noise, shard):
    images = write_tar("images.tar", [(f"{i}.png", noise(i)) for i in range(8)])
    assert [*first(make(images, tokenizer=None, include_captions=False))] == ["images"]
    assert [*first(make(shard, tokenizer=None))] == ["images", "captions"]


@pytest.fixture
def layer():
    pytest.importorskip("tensorflow")
    layer = keras.layers.TextVectorization(output_sequence_length=4)
    layer.adapt(["no no", "7"])
    return layer


@pytest.mark.one_case
@pytest.mark.parametrize("training", [True, False])
def test_a_keras_layer_can_tokenize(shard, layer, training):
    options = {"training": training, "include_captions": False}
    dataset = make(shard, tokenizer=layer, include_keys=True, **options)
    batch = first(dataset)
    assert {*dataset.element_spec} == {*batch} == {"images", "token_ids", "keys"}
    assert batch["token_ids"].dtype == "int32"
    expected = [[2, 3 if int(key) == 7 else 1, 0, 0] for key in batch["keys"]]
    np.testing.assert_array_equal(batch["token_ids"], expected)
    assert training or [2, 3, 0, 0] in expected


def test_a_keras_hub_preprocessor_gives_the_ids_of_a_clip_tokenizer(shard, tmp_path):
    pytest.importorskip("tensorflow")
    keras_hub = pytest.importorskip("keras_hub")
    tokenizer = keras_hub_tokenizer(TOKENIZER, tmp_path)
    preprocessor = keras_hub.models.CLIPPreprocessor(tokenizer, sequence_length=9)
    batch = first(make(shard, tokenizer=preprocessor))
    np.testing.assert_array_equal(
        batch["token_ids"], TOKENIZER([text for (text,) in batch["captions"]])
    )
    with pytest.raises(ValueError, match=r"`tokenizer`.*Received: "):
        make(shard, tokenizer=tokenizer)


# === Tokenizers of other libraries ===

TEXTS = ["a photo of a cat", "two dogs in the snow", "café &amp; bar"]


@pytest.fixture
def hugging_face():
    """A tokenizer as BERT's, with a small vocabulary, and its ids."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def make(**options):
        words = [word for text in TEXTS for word in text.split()]
        words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *dict.fromkeys(words)]
        ids = {word: index for index, word in enumerate(words)}
        model = tokenizers.models.WordLevel(ids, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = tokenizers.processors.BertProcessing(
            ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
        )
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **options
        )
        return tokenizer, ids

    return make


@pytest.mark.any_backend
def test_tokenizers_of_hugging_face_pad_and_truncate(hugging_face):
    tokenizer, ids = hugging_face(model_max_length=7)
    found = tokenize(tokenizer, [text.encode() for text in TEXTS])
    assert found.shape == (3, length_of(tokenizer)) == (3, 7)
    assert found.dtype == "int32"
    words = ["[CLS]", "a", "photo", "of", "a", "cat", "[SEP]"]
    assert found[0].tolist() == [ids[word] for word in words]
    words = ["[CLS]", "café", "&amp;", "bar", "[SEP]", "[PAD]", "[PAD]"]
    assert found[2].tolist() == [ids[word] for word in words]
    # A model may take shorter texts.
    found = tokenize(tokenizer, TEXTS, context_length=4)
    expected = [ids[word] for word in ["[CLS]", "a", "photo", "[SEP]"]]
    assert found[0].tolist() == expected
    tokenizer, _ = hugging_face()
    with pytest.raises(ValueError, match=r"`model_max_length`.*Received: .*Tokenizer"):
        tokenize(tokenizer, TEXTS)


@pytest.mark.any_backend
def test_a_processor_of_hugging_face_is_not_a_tokenizer(shard, hugging_face):
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(), hugging_face()[0]
    )
    with pytest.raises(ValueError, match=r"`processor.tokenizer`.*Received: CLIPProc"):
        make(shard, tokenizer=processor)


@pytest.mark.any_backend
def test_tokenizers_of_open_clip_are_taken_as_they_are():
    open_clip = pytest.importorskip("open_clip")
    assert length_of(open_clip.get_tokenizer("ViT-B-32")) == 77
    for tokenizer in (open_clip.get_tokenizer("ViT-B-32"), open_clip.tokenize):
        expected = tokenizer(TEXTS).numpy()
        found = tokenize(tokenizer, [text.encode() for text in TEXTS])
        np.testing.assert_array_equal(found, expected)
        found = tokenize(tokenizer, TEXTS, context_length=5)
        np.testing.assert_array_equal(found, tokenizer(TEXTS, 5).numpy())


# === Word pieces of keras_hub ===

# Besides texts of all letters: characters of ASCII, and words at the limit of length.
PLAIN = [f"a{chr(code)}b" for code in range(128)]
LONG = ["x" * 100, "x" * 101, "\u00e9" * 50, "\u00e9" * 51, "a b " * 300]


def odd_texts(count):
    """Texts that UTF-8 has a form of."""
    texts = ["", *PLAIN, *LONG, *mixed_captions(count, seed=1)]
    return [text.encode("utf-8", "ignore").decode() for text in texts]


def hub_preprocessor(words, kind="Bert", length=24, **options):
    """A preprocessor of keras_hub, of word pieces."""
    models = pytest.importorskip("keras_hub").models
    tokenizer = getattr(models, f"{kind}Tokenizer")(words, **options)
    if kind == "DistilBert":
        kind = models.DistilBertTextClassifierPreprocessor
        return kind(tokenizer, sequence_length=length)
    return models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=length)


@pytest.fixture(scope="module")
def minilm(encoders):
    path = encoders / "all_minilm_l6_v2" / "vocab.txt"
    return path.read_text("utf-8").split("\n")[:-1]


def assert_ids_of_keras_hub(preprocessor, texts):
    for first in range(0, len(texts), 500):
        some = texts[first : first + 500]
        found = tokenize(preprocessor, some)
        expected = np.asarray(preprocessor(some)["token_ids"])
        for text, *rows in zip(some, found, expected):
            np.testing.assert_array_equal(*rows, err_msg=ascii(text))


KINDS = [
    ("Bert", {"lowercase": True}),
    ("DistilBert", {}),
    ("Electra", {"lowercase": True, "strip_accents": True}),
    ("Bert", {"lowercase": True, "special_tokens_in_strings": True}),
]


@pytest.mark.any_backend
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_word_pieces_are_those_of_keras_hub(kind, options):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ".", "a", "A"]
    words += [f"##{chr(code)}" for code in range(97, 123)]
    words += [chr(code) for code in range(98, 123)] + ["the", "##ing", "\u00e9"]
    for length in (2, 5, 24):
        preprocessor = hub_preprocessor(words, kind, length, **options)
        assert_ids_of_keras_hub(preprocessor, odd_texts(400))
    # Another vocabulary replaces the first one.
    words[-1], words[7] = words[7], words[-1]
    preprocessor.tokenizer.set_vocabulary(words)
    assert_ids_of_keras_hub(preprocessor, ["a the aing"])


@pytest.mark.slow
@pytest.mark.any_backend
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_word_pieces_of_odd_texts_are_those_of_keras_hub(minilm, kind, options):
    preprocessor = hub_preprocessor(minilm, kind, **options)
    assert_ids_of_keras_hub(preprocessor, odd_texts(10_000))


@pytest.mark.slow
@pytest.mark.any_backend
def test_word_pieces_of_flickr8k_are_those_of_keras_hub(minilm):
    if not os.environ.get(FLICKR8K):
        pytest.skip(f"{FLICKR8K} is not set to a folder of tar files with captions")
    captions = [*read_captions(pathlib.Path(os.environ[FLICKR8K]) / "*.tar")]
    preprocessor = hub_preprocessor(minilm, length=64, lowercase=True)
    assert_ids_of_keras_hub(preprocessor, captions)


@pytest.mark.slow
@pytest.mark.one_case
def test_texts_take_no_longer_than_in_transformers(minilm, encoders):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(encoders / "all_minilm_l6_v2")
    preprocessor = hub_preprocessor(minilm, length=256, lowercase=True)
    # As sentence-transformers calls it.
    options = {"padding": True, "truncation": "longest_first", "return_tensors": "np"}
    texts = [*read_captions(example_images() / "test-*.tar")][:64]
    ours = functools.partial(tokenize, preprocessor, texts)
    rivals = functools.partial(theirs, texts, max_length=256, **options)
    seconds = [min(timeit.repeat(x, number=5, repeat=20)) for x in (ours, rivals)]
    assert seconds[0] <= seconds[1]


@pytest.mark.any_backend
def test_a_subclass_of_a_preprocessor_of_keras_hub_is_called():
    kind = pytest.importorskip("keras_hub").models.BertTextEmbedderPreprocessor

    class Next(kind):
        def call(self, x):
            return {"token_ids": super().call(x)["token_ids"] + 1}

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    preprocessor = Next(hub_preprocessor(words).tokenizer, sequence_length=4)
    assert tokenize(preprocessor, ["a"]).tolist() == [[3, 6, 4, 1]]
