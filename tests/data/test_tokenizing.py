import keras
import numpy as np
import pytest

from keras_cluster_mask.data import CLIPTokenizer, image_text_dataset

TOKENIZER = CLIPTokenizer.train([f"no {i}" for i in range(200)], 600, context_length=9)


@pytest.fixture
def shard(write_pairs):
    return write_pairs("a.tar", 0, 20)


def make(source, tokenizer, **options):
    arguments = {"training": False, "format": "grain", "include_captions": True}
    arguments.update(options)
    return image_text_dataset(source, tokenizer, 16, 8, **arguments)


def first(dataset):
    iterator = iter(dataset)
    batch = {name: np.asarray(value) for name, value in next(iterator).items()}
    if hasattr(iterator, "close"):
        iterator.close()
    return batch


def test_any_callable_can_tokenize(shard):
    def lengths(captions):
        assert {type(caption) for caption in captions} == {bytes}
        return [[len(caption)] for caption in captions]

    batch = first(make(shard, lengths))
    np.testing.assert_array_equal(batch["token_ids"], [[4]] * 8)
    assert batch["token_ids"].dtype == "int32"


def test_a_tokenizer_may_return_tensors(shard):
    batch = first(make(shard, lambda texts: keras.ops.ones((len(texts), 3), "int32")))
    np.testing.assert_array_equal(batch["token_ids"], np.ones((8, 3)))


@pytest.mark.parametrize(
    "tokenizer", [lambda texts: [0] * len(texts), lambda texts: [[0, 0]]]
)
def test_a_tokenizer_that_returns_no_rows_is_an_error(shard, tokenizer):
    with pytest.raises(Exception, match=r"`tokenizer` must return ints of shape"):
        first(make(shard, tokenizer))


def test_an_error_of_a_tokenizer_is_raised(shard):
    with pytest.raises(ZeroDivisionError):
        first(make(shard, lambda texts: 1 / 0))


def test_without_a_tokenizer_captions_are_not_needed(write_tar, noise):
    shard = write_tar("a.tar", [(f"{i}.png", noise(i)) for i in range(8)])
    batch = first(make(shard, None, include_captions=False))
    assert sorted(batch) == ["images"]
    assert len(batch["images"]) == 8


@pytest.fixture
def layer():
    pytest.importorskip("tensorflow")
    layer = keras.layers.TextVectorization(output_sequence_length=4)
    layer.adapt(["no no", "7"])
    return layer


@pytest.mark.parametrize("format", ["grain", "tf"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_keras_layer_can_tokenize(shard, layer, format, training, include):
    options = {"training": training, "format": format, "include_captions": include}
    dataset = make(shard, layer, include_keys=True, **options)
    names = {"images", "token_ids", "keys"} | ({"captions"} if include else set())
    assert {*dataset.element_spec} == names
    batch = first(dataset)
    assert {*batch} == names
    assert batch["token_ids"].dtype == "int32"
    expected = [[2, 3 if int(key) == 7 else 1, 0, 0] for key in batch["keys"]]
    np.testing.assert_array_equal(batch["token_ids"], expected)
    assert training or [2, 3, 0, 0] in expected


def test_a_keras_layer_tokenizes_the_first_of_all_captions(shard, layer):
    batch = first(make(shard, layer, include_captions="all", include_keys=True))
    assert batch["captions"][7] == (b"no 7",)
    np.testing.assert_array_equal(batch["token_ids"][7], [2, 3, 0, 0])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="ragged tensors are TensorFlow's"
)
def test_a_keras_layer_of_rows_of_different_lengths_is_refused(shard):
    layer = keras.layers.TextVectorization(ragged=True)
    layer.adapt(["no no", "7"])
    with pytest.raises(ValueError, match=r"`tokenizer` must return rows of equal"):
        first(make(shard, layer))


def test_a_keras_hub_preprocessor_gives_the_ids_of_a_clip_tokenizer(shard):
    pytest.importorskip("tensorflow")
    keras_hub = pytest.importorskip("keras_hub")
    config = TOKENIZER._config()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(t, t): i for i, t in enumerate(config["vocabulary"])}
    merges = [" ".join(merge) for merge in config["merges"]]
    tokenizer = keras_hub.models.CLIPTokenizer(vocabulary, merges)
    preprocessor = keras_hub.models.CLIPPreprocessor(tokenizer, sequence_length=9)
    batch = first(make(shard, preprocessor))
    np.testing.assert_array_equal(batch["token_ids"], TOKENIZER(batch["captions"]))
    with pytest.raises(ValueError, match="CLIPPreprocessor"):
        make(shard, tokenizer)
