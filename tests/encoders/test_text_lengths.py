"""Padding is cut off before an encoder sees it, where that changes nothing."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.text_lengths import LEAST, rounded_up
from keras_cluster_mask.encoders.towers import TextTower
from tests import helpers
from tests.encoders import test_pooled
from tests.helpers import (
    FAST,
    assert_close,
    tiny_clip,
    tiny_metaclip,
    values,
)
from tests.training.test_training_data import KINDS

# More than two of the lengths to which texts are cut.
WIDTH = 40


@pytest.fixture(autouse=True)
def long_texts(monkeypatch):
    """Encoders of `tests` take texts of up to `WIDTH` tokens, and have no dropout."""
    monkeypatch.setattr(helpers, "CONTEXT", WIDTH)
    for options in (test_pooled.TEXT, test_pooled.EMBEDDED):
        monkeypatch.setitem(options, "max_sequence_length", WIDTH)
        monkeypatch.setitem(options, "dropout", 0.0)


@pytest.fixture
def widths(monkeypatch):
    """The numbers of tokens with which encoders are called, or compiled."""
    found, prepare = [], TextTower.prepare

    def record(self, inputs):
        ids = inputs["token_ids"] if isinstance(inputs, dict) else inputs
        found.append(ids.shape[1])
        return prepare(self, inputs)

    monkeypatch.setattr(TextTower, "prepare", record)
    return found


def from_backbone(make):
    return kcm.ContrastiveModel.from_backbone(make())


def from_encoders(name):
    return kcm.ContrastiveModel.from_encoders(
        test_pooled.vit_encoder(), test_pooled.TEXTS[name](), projection_dim=4
    )


FAMILIES = {
    "CLIP": lambda: from_backbone(tiny_clip),
    "MetaCLIP2": lambda: from_backbone(tiny_metaclip),
    **{name: lambda name=name: from_encoders(name) for name in test_pooled.TEXTS},
}
# What ends a text, and what follows.
ENDS = {"CLIP": (29, 29), "MetaCLIP2": (2, 1)}


def pairs(name="CLIP", longest=7, count=8, width=WIDTH):
    """Pairs with texts of 2 to `longest` tokens, and padding after them."""
    end, padding = ENDS.get(name, (28, int(name in test_pooled.WITH_ONE)))
    found = helpers.random_pairs(count)
    words = np.random.default_rng(longest).integers(3, 28, width)
    ids = np.full((count, width), padding, "int32")
    for row, length in zip(ids, np.resize(range(longest, 1, -1), count)):
        row[:length] = [*words[: length - 1], end]
    return {**found, "token_ids": ids}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_cut_texts_is_that_on_full_ones(name, widths):
    model, batch = FAMILIES[name](), pairs(name)
    weights, found = model.get_weights(), []
    for train, embed, width in (
        (model.fit, lambda: model.predict(batch, verbose=0), LEAST),
        (model.train_on_batch, lambda: model(batch), WIDTH),
    ):
        model.set_weights(weights)
        # Gradients are the changes of the weights.
        model.compile(keras.optimizers.SGD(1.0), **FAST)
        embeddings = values(embed().values())
        options = {"verbose": 0} if width == LEAST else {"return_dict": True}
        logs = train(batch, **options)
        loss = getattr(logs, "history", logs)["loss"]
        gradients = [x - y for x, y in zip(weights, model.get_weights())]
        found.append((np.ravel(loss), embeddings, gradients))
        assert {*widths} == {width}
        widths.clear()
    (loss, embeddings, gradients), (expected_loss, *expected) = found
    np.testing.assert_allclose(loss, expected_loss, atol=1e-6)
    assert_close(embeddings, expected[0], atol=1e-6)
    largest = max(np.abs(x).max() for x in expected[1])
    assert_close(gradients, expected[1], atol=1e-5 * largest)


# === Captions as labels ===


def padded_otherwise(batch, name):
    """The texts of a batch in fewer columns, and with other padding where possible."""
    ids = batch["token_ids"][:, : WIDTH - 3].copy()
    if name == "CLIP":
        # Tokenizers pad with the end token or with zeros.
        ids[np.cumsum(ids == 29, axis=1) > 1] = 0
        return {"token_ids": ids}
    if name == "MetaCLIP2":
        return {"token_ids": ids}
    mask = ids != int(name in test_pooled.WITH_ONE)
    return {"token_ids": np.where(mask, ids, 5), "padding_mask": mask.astype("int32")}


@pytest.mark.one_case
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_one_text_are_one_caption_whatever_their_padding(name):
    model, batch = FAMILIES[name](), pairs(name)
    rows = batch, padded_otherwise(batch, name)
    labels = values(model.text_tower.family.caption_labels(x) for x in rows)
    assert len(np.unique(labels[0], axis=0)) == 6
    np.testing.assert_array_equal(*labels)
    batches = [{**batch, **each} for each in rows]
    if "padding_mask" in rows[1]:
        mask = batch["token_ids"] != int(name in test_pooled.WITH_ONE)
        batches[0]["padding_mask"] = mask.astype("int32")
    found = kcm.evaluation.embed(model, batches, verbose=0)
    assert found["text_numbers"].tolist() == [*range(6), 0, 1] * 2
    first, second = np.split(found["text_embeddings"], 2)
    np.testing.assert_allclose(first, second, atol=1e-6)


# === All kinds of data ===


def grain_stream(pairs):
    """An `image_text_dataset`, of which a tokenizer looks up the texts."""
    source = [
        {"image": image, "caption": str(row)}
        for row, image in enumerate(pairs["images"])
    ]
    return kcm.data.image_text_dataset(
        source,
        lambda captions: pairs["token_ids"][[int(x) for x in captions]],
        16,
        4,
        training=False,
        format="grain",
    )


@pytest.mark.one_case
@pytest.mark.parametrize("kind", [*KINDS, "stream"])
def test_data_of_any_kind_is_cut_batch_by_batch(kind, widths, monkeypatch):
    keeps = kind == "PyDataset" and keras.backend.backend() == "tensorflow"
    model = from_backbone(tiny_clip)
    # Batches of three lengths, of which the first two are equal.
    batches = [pairs(longest=n, count=4) for n in (5, 6, LEAST + 1, 30)]
    whole = {k: np.concatenate([x[k] for x in batches]) for k in batches[0]}
    make = grain_stream if kind == "stream" else KINDS[kind]
    expected = [WIDTH] * 4 if keeps else [rounded_up(n) for n in (5, 5, LEAST + 1, 30)]
    model.compile("sgd", run_eagerly=True)
    options = {"batch_size": 4} if kind == "arrays" else {}
    model.fit(make(whole), shuffle=False, verbose=0, **options)
    assert widths == expected
    widths.clear()
    logs = model.evaluate(make(whole), verbose=0, return_dict=True, **options)
    # Arrays are cut once in evaluation.
    assert widths == ([max(expected)] * 4 if kind == "arrays" else expected)
    losses = [float(model.test_on_batch(x, return_dict=True)["loss"]) for x in batches]
    assert logs["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
