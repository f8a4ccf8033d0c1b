import collections
import itertools
import pathlib

import numpy as np
import pytest
from keras import ops
from sklearn.preprocessing import normalize

from keras_cluster_mask.data import image_text_dataset, split
from keras_cluster_mask.evaluation import (
    chance_recall,
    embed,
    evaluate_retrieval,
    retrieval,
    retrieval_recall,
)
from tests.encoders.test_pooled import make_model, roberta
from tests.helpers import random_pairs, vit_encoder


def random_embeddings(count, width=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, width))
    return normalize(x).astype("float32")


def recall_of(similarity, matches, ks):
    """Recall@k, where wrong items that tie with a match are ahead of it."""
    found = {}
    for name, scores, is_match in (
        ("image_to_text", similarity, matches),
        ("text_to_image", similarity.T, matches.T),
    ):
        best = np.where(is_match, scores, -2).max(axis=1, keepdims=True)
        ranks = (~is_match & (scores >= best)).sum(axis=1)
        found |= {f"{name}_recall@{k}": np.mean(ranks < k) for k in ks}
    return found


def matches_of(captions, duplicates):
    """Whether each text is of each image, or equals a text of the image."""
    texts, rows = np.concatenate(captions), np.arange(len(captions))
    if duplicates == "positive":
        return np.array([np.isin(texts, each) for each in captions])
    return np.repeat(rows, [*map(len, captions)]) == rows[:, None]


@pytest.mark.any_backend
@pytest.mark.parametrize("num_images", [3, 300])
@pytest.mark.parametrize("ks", [(1, 3), (1, 7, 205)])
def test_parts_of_any_sizes_give_the_order_of_similarity(num_images, ks, monkeypatch):
    monkeypatch.setattr(retrieval, "MAX_PAIRS", 2000)
    # Some images have many texts, and others have none.
    owners = np.random.default_rng(0).integers(0, num_images, 210)
    images, texts = random_embeddings(num_images), random_embeddings(210, seed=1)
    found = retrieval_recall(images, texts, owners, ks=ks)
    matches = owners == np.arange(num_images)[:, None]
    assert found == pytest.approx(recall_of(images @ texts.T, matches, ks))


@pytest.mark.any_backend
def test_embeddings_that_are_equal_up_to_rounding_score_0():
    same = np.ones((20, 4), dtype="float32") / 2
    assert set(retrieval_recall(same, same).values()) == {0.0}
    # All images alike, all texts alike, and these unlike those: there are many numbers
    # of 32 bits around a low similarity.
    images, texts = (
        random_embeddings(1, 64, seed) + 2e-7 * random_embeddings(200, 64, seed + 1)
        for seed in (3, 5)
    )
    assert len(np.unique(images @ texts.T)) > 20
    assert set(retrieval_recall(images, texts).values()) == {0.0}
    # A larger difference decides.
    images = random_embeddings(50, 64)
    texts = images + 2e-3 * random_embeddings(50, 64, seed=1)
    assert retrieval_recall(images, texts, ks=1)["image_to_text_recall@1"] == 1.0


@pytest.mark.any_backend
def test_an_image_without_a_text_finds_none_among_however_few():
    images = random_embeddings(3)
    found = retrieval_recall(images, images[:2], [0, 1], ks=(10,))
    assert found["image_to_text_recall@10"] == pytest.approx(2 / 3)


@pytest.mark.any_backend
@pytest.mark.parametrize("duplicates", ["positive", "negative"])
def test_chance_is_the_mean_of_all_orders(duplicates):
    # An image without a text is a miss.
    captions = [["a", "b"], ["a"], [], ["c", "c", "d"]]
    matches, ks = matches_of(captions, duplicates), (1, 2, 4, 10)
    expected = {}
    for name, is_match in ("image_to_text", matches), ("text_to_image", matches.T):
        orders = [*itertools.permutations(range(is_match.shape[1]))]
        for k in ks:
            found = is_match[:, np.array(orders)[:, :k]].any(axis=2)
            expected[f"{name}_recall@{k}"] = found.mean()
    assert chance_recall(captions, ks, duplicates) == pytest.approx(expected)


@pytest.mark.any_backend
def test_chance_of_distinct_pairs_is_k_over_n():
    chance = chance_recall([str(number) for number in range(3460)], ks=1000)
    assert [*chance.values()] == pytest.approx([1000 / 3460] * 2)
    assert {*chance_recall([*"abcde"], ks=10).values()} == {1.0}
    for captions in ([], "abc"):
        with pytest.raises(ValueError, match=r"`captions` must be a list.*Received: "):
            chance_recall(captions)
    with pytest.raises(
        ValueError, match=r"`captions` must contain at least one text.*Received: "
    ):
        chance_recall([[], []])


def test_a_data_set_is_embedded_and_compared(model):
    pairs = random_pairs(20)
    found = evaluate_retrieval(model, pairs, ks=(1, 3), verbose=0)
    embeddings = model.predict(pairs, verbose=0)
    expected = retrieval_recall(
        embeddings["image_embeddings"], embeddings["text_embeddings"], ks=(1, 3)
    )
    assert found == {
        **expected,
        "chance": chance_recall([*map(str, range(20))], ks=(1, 3)),
    }


@pytest.mark.any_backend
def test_texts_are_equal_if_their_token_ids_are_as_in_training(model, tokenizer):
    captions = ["abcde", "abcdf", b"abcdg"] * 2
    data = {"images": random_pairs(6)["images"], "captions": captions}
    found = evaluate_retrieval(model, data, tokenizer, ks=1, verbose=0)
    chance = chance_recall(["", "", ""] * 2, ks=1)
    assert found == {**dict.fromkeys(chance, 1.0), "chance": chance}


@pytest.mark.any_backend
def test_equal_texts_may_be_padded_to_different_lengths():
    # RoBERTa pads with 1, and its start token is 0.
    texts = [[0, 5, 2, 1], [0, 5, 1, 1]], [[0, 5, 2], [0, 5, 3]]
    batches = [
        {"images": random_pairs(2)["images"], "token_ids": np.array(x)} for x in texts
    ]
    found = embed(make_model(vit_encoder, roberta), batches, verbose=0)
    assert found["text_numbers"].tolist() == [0, 1, 0, 2]


@pytest.mark.any_backend
@pytest.mark.parametrize("duplicates", ["positive", "negative"])
def test_equal_texts_among_several_of_an_image_are_alike(
    model, tokenizer, duplicates, monkeypatch
):
    monkeypatch.setattr(retrieval, "MAX_PAIRS", 40)
    rng = np.random.default_rng(0)
    captions = [[*rng.choice(list("abcdefghi"), 1 + n % 3)] for n in range(12)]
    data = {"images": random_pairs(12)["images"], "captions": captions}
    options = dict(ks=(1, 2, 4), duplicates=duplicates, verbose=0)
    recall = evaluate_retrieval(model, data, tokenizer, **options)
    found = embed(model, data, tokenizer, verbose=0)
    similarity = (found["image_embeddings"] @ found["text_embeddings"].T).round(5)
    matches = matches_of(captions, duplicates)
    expected = chance_recall(captions, ks=(1, 2, 4), duplicates=duplicates)
    assert recall.pop("chance") == expected
    assert recall == pytest.approx(recall_of(similarity, matches, (1, 2, 4)))


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_recall_does_not_depend_on_the_lengths_of_the_embeddings(scale):
    images = random_embeddings(300, 32)
    texts = normalize(images + 1.2 * random_embeddings(300, 32, seed=1))
    lengths = np.random.default_rng(2).lognormal(sigma=2.0, size=(2, 300, 1))
    lengths = (scale * lengths).astype("float32")
    expected = retrieval_recall(images, texts)
    assert 0.5 < expected["image_to_text_recall@1"] < 1
    assert retrieval_recall(lengths[0] * images, lengths[1] * texts) == expected
    # Their lengths exceed the range of float32.
    huge = np.sign(random_embeddings(6, 512)) * np.float32(2e38)
    assert retrieval_recall(huge, huge, ks=1)["image_to_text_recall@1"] == 1
    # A row of zeros is not similar to anything.
    with_zeros = np.concatenate([images, 0 * images[:1]])
    found = retrieval_recall(with_zeros, texts, np.arange(300))
    assert found["image_to_text_recall@1"] < expected["image_to_text_recall@1"]


# === Bad input ===

X = random_embeddings(4)
NAN = np.where(np.arange(4)[:, None] == 2, np.nan, X)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_embeddings", {"text_embeddings": X[:, :5]}),
        ("image_embeddings", {"image_embeddings": X[..., None]}),
        ("text_embeddings", {"text_embeddings": NAN}),
        ("image_of_text", {"image_of_text": [0, 1]}),
        ("image_of_text", {"text_embeddings": X[:3]}),
        ("image_of_text", {"image_of_text": [0, 1, 2, 4]}),
        *(("ks", {"ks": ks}) for ks in ((1, 0), ())),
    ],
)
def test_bad_embeddings_and_labels_are_refused_by_name(name, options):
    given = {"image_embeddings": X, "text_embeddings": X, **options}
    with pytest.raises(ValueError, match=rf"{name}.*Received: "):
        retrieval_recall(**given)


@pytest.mark.any_backend
def test_bad_data_is_refused_by_name(model, tokenizer):
    data = {"images": random_pairs(2)["images"]}
    with pytest.raises(ValueError, match=r"`data`.*Received: "):
        evaluate_retrieval(model, data, tokenizer)
    for missing in (None, [None], np.nan):
        data["captions"] = [["a"], missing]
        with pytest.raises(ValueError, match=r"`captions`.*str.*Received: (None|nan)"):
            evaluate_retrieval(model, data, tokenizer)
    with pytest.raises(ValueError, match=r"`duplicates`.*Received: "):
        evaluate_retrieval(model, data, tokenizer, duplicates="x")


@pytest.fixture
def reads_words(model, tokenizer, monkeypatch):
    """The model with a tokenizer."""
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    return model


@pytest.mark.any_backend
@pytest.mark.parametrize("make", [str, pathlib.Path, lambda path: split(path)[0]])
def test_a_source_is_read_as_the_model_says(
    reads_words, tokenizer, tmp_path, encode, monkeypatch, make
):
    rng = np.random.default_rng(0)
    for number, texts in enumerate(("a\nb", "c\nd", "e\nf", "g\nh")):
        image = rng.integers(0, 256, (20, 30, 3)).astype("uint8")
        (tmp_path / f"{number}.png").write_bytes(encode(image))
        (tmp_path / f"{number}.txt").write_text(texts)
    monkeypatch.setattr(reads_words, "resize", "squash")
    source = make(tmp_path)
    read = image_text_dataset(
        source,
        None,
        16,
        training=False,
        resize="squash",
        include_captions=True,
    )
    expected = evaluate_retrieval(reads_words, read, tokenizer)
    assert evaluate_retrieval(reads_words, source) == expected
    first = image_text_dataset(source, reads_words, training=False)
    with pytest.warns(UserWarning, match=r"captions are ignored.*include_captions"):
        evaluate_retrieval(reads_words, first)


@pytest.mark.any_backend
def test_captions_are_read_before_ids_if_the_model_can(reads_words, tokenizer):
    captions = [("a", "b"), ("c", "d"), ("e", "f")]
    data = {"images": random_pairs(3)["images"], "captions": captions}
    expected = evaluate_retrieval(reads_words, data, tokenizer, ks=2)
    first = {**data, "token_ids": tokenizer([texts[0] for texts in captions])}
    assert evaluate_retrieval(reads_words, first, ks=2) == expected
    del first["captions"]
    # One text for each image raises the chance.
    assert evaluate_retrieval(reads_words, first, ks=2) != expected


@pytest.mark.any_backend
def test_rows_of_an_object_and_lists_of_files_are_sources(reads_words, write_pairs):
    images = random_pairs(6)["images"]
    rows = [{"image": x, "caption": "abcdef"[i]} for i, x in enumerate(images)]
    data = {"images": images, "captions": [*"abcdef"]}
    expected = evaluate_retrieval(reads_words, data)
    assert evaluate_retrieval(reads_words, rows) == expected
    assert evaluate_retrieval(reads_words, collections.UserList(rows)) == expected
    shards = [write_pairs(name, 0, 6) for name in ("a.tar", "b.tar")]
    whole = image_text_dataset(
        shards, reads_words, training=False, include_captions=True
    )
    expected = evaluate_retrieval(reads_words, whole)
    assert evaluate_retrieval(reads_words, shards) == expected


def test_embeddings_of_a_call_that_records_gradients_are_compared(model):
    pairs = random_pairs(6)
    images, texts = (
        getattr(model, f"encode_{kind}")(pairs[name])
        for kind, name in (("image", "images"), ("text", "token_ids"))
    )
    found = retrieval_recall(images, texts, range(6))
    expected = retrieval_recall(*map(ops.convert_to_numpy, (images, texts)), range(6))
    assert found == expected


def test_a_table_of_named_columns_is_refused_with_a_remedy(reads_words):
    class Frame:
        def __len__(self):
            return 1

        def __getitem__(self, name):
            raise KeyError(name)

        def to_dict(self, kind):
            return []

    with pytest.raises(ValueError, match=r"`source` must.*Received: "):
        evaluate_retrieval(reads_words, Frame())
