import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")

from keras_cluster_mask.data import CLIPTokenizer, image_text_dataset

TOKENIZER = CLIPTokenizer.train([f"no {i}" for i in range(200)], 600, context_length=9)


@pytest.fixture
def shard(write_pairs):
    return write_pairs("a.tar", 0, 20)


def make(source, tokenizer):
    return image_text_dataset(
        source, tokenizer, 16, 8, training=False, include_captions=True
    )


def test_any_callable_and_any_keras_layer_can_tokenize(shard):
    batch = next(iter(make(shard, lambda texts: [[len(texts)]] * len(texts))))
    np.testing.assert_array_equal(batch["token_ids"], [[8]] * 8)
    layer = keras.layers.TextVectorization(output_sequence_length=4)
    layer.adapt(["no no", "7"])
    batch = next(iter(make(shard, layer)))
    assert batch["token_ids"].dtype == "int32"
    np.testing.assert_array_equal(batch["token_ids"][7], [2, 3, 0, 0])
    with pytest.raises(Exception, match=r"`tokenizer` must return ints.*\(8,\)"):
        list(make(shard, lambda texts: [0] * len(texts)))


def test_a_keras_hub_preprocessor_tokenizes_in_the_graph(shard):
    keras_hub = pytest.importorskip("keras_hub")
    config = TOKENIZER._config()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(t, t): i for i, t in enumerate(config["vocabulary"])}
    merges = [" ".join(merge) for merge in config["merges"]]
    tokenizer = keras_hub.models.CLIPTokenizer(vocabulary, merges)
    preprocessor = keras_hub.models.CLIPPreprocessor(tokenizer, sequence_length=9)
    dataset = make(shard, preprocessor)
    batch = next(iter(dataset))
    expected = TOKENIZER(batch["captions"].numpy())
    np.testing.assert_array_equal(batch["token_ids"], expected)
    with pytest.raises(ValueError, match="CLIPPreprocessor"):
        make(shard, tokenizer)
