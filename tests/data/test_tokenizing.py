import functools

import keras
import numpy as np
import pytest

from keras_cluster_mask.data.tokenizing import length_of, tokenize
from tests.data.reading import (
    TOKENIZER,
    keras_hub_tokenizer,
    make_dataset,
    take,
)


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
