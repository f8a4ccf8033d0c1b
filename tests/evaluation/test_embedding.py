import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.evaluation import (
    embed,
    embed_texts,
    evaluate_retrieval,
    evaluate_zero_shot,
)
from tests.helpers import random_pairs, split, stream, to_numpy


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(70)


@pytest.fixture(scope="module")
def expected(model, pairs):
    return {
        "image_embeddings": to_numpy(model.encode_image(pairs["images"])),
        "text_embeddings": to_numpy(model.encode_text(pairs["token_ids"])),
    }


def assert_expected(found, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-6)


@pytest.mark.slow_to_compile
def test_arrays_and_batches_of_any_kind_give_the_embeddings_of_the_model(
    model, pairs, expected
):
    tensors = [
        {k: ops.convert_to_tensor(v) for k, v in batch.items()}
        for batch in split(pairs, 30)
    ]
    for source, data in (
        (model, pairs),
        (model.backbone, split(pairs, 30)),
        (model, iter(split(pairs, 20))),
        (model, tensors),
    ):
        found = embed(source, data, verbose=0)
        assert_expected(found, expected)
        assert found["image_embeddings"].dtype == "float32"
        assert found["image_of_text"].tolist() == list(range(70))
        assert not {"images", "token_ids"} & {*found}


@pytest.mark.any_backend
def test_progress_ends_at_the_number_of_images(model, pairs, capsys):
    for data, last in ((pairs, "70/70"), (split(pairs, 30), "70/Unknown")):
        embed(model, data, verbose=1)
        *_, shown, end = capsys.readouterr().out.split("\n")
        assert last in shown.split("\r")[-1]
        assert not end


@pytest.mark.any_backend
def test_images_alone_and_with_labels_need_no_texts(model, pairs, expected):
    images, labels = pairs["images"], np.arange(70) % 3
    for data in (
        (images, labels),
        [(images[:40], labels[:40]), (images[40:], labels[40:])],
        {"images": images, "labels": labels},
    ):
        found = embed(model, data, verbose=0)
        assert sorted(found) == ["image_embeddings", "labels"]
        assert_expected(found, {"image_embeddings": expected["image_embeddings"]})
        assert found["labels"].tolist() == labels.tolist()
    assert sorted(embed(model, images, verbose=0)) == ["image_embeddings"]


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "captions",
    [
        [["ab", "c"], ["d"], ["ab", "e", "f"]],
        np.array([["ab", "c"], ["d", "ab"], ["e", "f"]]),
    ],
    ids=["lists", "matrix"],
)
def test_several_captions_of_an_image_are_embedded_each(model, tokenizer, captions):
    data = {"images": random_pairs(3)["images"], "captions": captions}
    texts = embed_texts(model, np.concatenate(captions), tokenizer, verbose=0)
    owners = np.repeat(range(3), [*map(len, captions)])
    # In batches, the numbers continue.
    for each in (data, split(data, 1)):
        found = embed(model, each, tokenizer, verbose=0)
        np.testing.assert_array_equal(found["image_of_text"], owners)
        np.testing.assert_allclose(found["text_embeddings"], texts, atol=1e-6)


@pytest.mark.any_backend
def test_texts_are_str_or_bytes_in_any_number(model, tokenizer):
    texts = [f"{index} é" for index in range(130)]
    found = embed_texts(model, texts, tokenizer, verbose=0)
    ids = np.array(tokenizer(texts))
    expected = to_numpy(model.encode_text(ids))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    encoded = [text.encode() for text in texts]
    again = embed_texts(model, encoded, tokenizer, verbose=0)
    np.testing.assert_array_equal(found, again)


# === Bad input ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data", []),
        ("image_text_dataset", "folder"),
        ("captions", random_pairs(2)["images"]),
    ],
)
def test_bad_data_is_refused_by_name(model, tokenizer, name, data):
    tokenizer = tokenizer if name == "captions" else None
    with pytest.raises(ValueError, match=rf"{name}.*Received: "):
        embed(model, data, tokenizer, verbose=0)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "texts", "tokenizer"),
    [
        ("texts", "a text", bytes),
        ("texts", [], bytes),
        ("tokenizer", ["a text"], None),
        ("tokenizer", ["a text"], "tokenizer.json"),
    ],
)
def test_bad_texts_and_tokenizers_are_refused_by_name(model, name, texts, tokenizer):
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: "):
        embed_texts(model, texts, tokenizer)


@pytest.mark.any_backend
def test_datasets_for_training_and_parts_of_datasets_are_refused(
    model, tokenizer, write_pairs, tmp_path
):
    def read(training, **options):
        return stream(shard, tokenizer, training, **options)

    shard = write_pairs("a.tar", 0, 8)
    with pytest.raises(ValueError, match=r"training=False.*Received: \w+=.*Dataset"):
        embed(model, read(training=True))
    part = read(training=False, process=(1, 2))
    assert len(embed(model, part, verbose=0)["image_embeddings"]) == 4
    for evaluate in (
        lambda: evaluate_retrieval(model, part),
        lambda: evaluate_zero_shot(model, part, ["cat", "dog"], tokenizer),
        lambda: kcm.compute_features(model, part, tmp_path),
        lambda: kcm.callbacks.Retrieval(part),
    ):
        with pytest.raises(ValueError, match=r"`process=\(0, 1\)`.*Received: .*\(1, 2"):
            evaluate()


@pytest.mark.any_backend
def test_entries_that_only_some_batches_hold_are_an_error(model, pairs):
    first, second = split({**pairs, "labels": np.arange(70)}, 35)
    del second["labels"]
    for batches in ([first, second], [second, first]):
        with pytest.raises(ValueError, match=r"`data` must.*Received: .*\['labels'\]"):
            embed(model, batches, verbose=0)
