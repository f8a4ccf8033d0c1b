"""Padding is cut off before an encoder sees it, where that changes nothing."""

import pickle

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.text_lengths import LEAST, TextLengths, rounded_up
from keras_cluster_mask.encoders.towers import TextTower
from keras_cluster_mask.losses import caption_labels, without_padding
from tests import helpers
from tests.encoders import test_pooled
from tests.encoders.test_families import pooling_encoder
from tests.helpers import (
    FAST,
    VOCABULARY,
    assert_close,
    assert_same_values,
    image_mlp,
    largest_error,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
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
        if width == WIDTH:
            # On torch, every step cuts texts.
            model.text_tower.lengths = TextLengths(model.text_tower.family)
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
    assert_close(loss, expected_loss)
    assert_close(embeddings, expected[0], atol=1e-6)
    assert largest_error(gradients, expected[1]) <= 1e-5


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
    inputs = {"token_ids": batch["token_ids"]}, padded_otherwise(batch, name)
    family = model.text_tower.family
    labels = values(caption_labels(without_padding(family, **x)) for x in inputs)
    assert len(np.unique(labels[0], axis=0)) == 6
    assert_same_values(*labels)


# === All kinds of data ===


def evaluated_stream(pairs):
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
    )


@pytest.mark.one_case
@pytest.mark.parametrize("kind", [*KINDS, "stream"])
def test_data_of_any_kind_is_cut_batch_by_batch(kind, widths, monkeypatch):
    is_torch = keras.backend.backend() == "torch"
    keeps = not (is_torch or kind in ("arrays", "stream") or "tf.data" in kind)
    model = from_backbone(tiny_clip)
    # Batches of three lengths, of which the first two are equal.
    batches = [pairs(longest=n, count=4) for n in (5, 6, LEAST + 1, 30)]
    whole = {k: np.concatenate([x[k] for x in batches]) for k in batches[0]}
    make = evaluated_stream if kind == "stream" else KINDS[kind]
    expected = [WIDTH] * 4 if keeps else [rounded_up(n) for n in (5, 5, LEAST + 1, 30)]
    model.compile("sgd", run_eagerly=True)
    options = {"batch_size": 4} if kind == "arrays" else {}
    if kind != "stream":
        model.fit(make(whole), shuffle=False, verbose=0, **options)
        assert widths == expected
    widths.clear()
    logs = model.evaluate(make(whole), verbose=0, return_dict=True, **options)
    # Only steps cut the batches of an evaluation of arrays.
    is_whole = kind == "arrays" and not is_torch
    assert widths == ([max(expected)] * 4 if is_whole else expected)
    losses = [float(model.test_on_batch(x, return_dict=True)["loss"]) for x in batches]
    assert logs["loss"] == pytest.approx(np.mean(losses), abs=1e-6)


# === What is compiled ===


def lengths_of_an_epoch():
    """The longest texts of batches, as those of 64 captions of Flickr8k are."""
    return [24, 41, 25, 26, 30, 27, 31, 33, 28, 24]


@pytest.mark.slow_to_compile
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch compiles none.")
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_few_lengths_are_compiled(micro_batch_size, widths, monkeypatch):
    monkeypatch.setattr(helpers, "CONTEXT", 77)
    model = from_backbone(tiny_clip)
    model.micro_batch_size = micro_batch_size
    model.compile("sgd", jit_compile=True)
    batches = [pairs(longest=n, count=4, width=77) for n in lengths_of_an_epoch()]
    whole = {k: np.concatenate([x[k] for x in batches]) for k in batches[0]}
    model.fit(whole, batch_size=4, shuffle=False, verbose=0)
    if keras.backend.backend() == "jax":
        assert {*widths} == {24, 32, 48}
    else:
        # The graph is traced for texts of any length, XLA compiles each.
        assert None in widths
    before = len(widths)
    model.fit(whole, batch_size=4, epochs=2, shuffle=True, verbose=0)
    assert len(widths) == before


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="Others compile lengths."
)
def test_micro_batches_on_torch_have_texts_of_similar_lengths(widths):
    model, batch = from_backbone(tiny_clip), pairs(longest=30)
    # Four long texts, two in each chunk unless they are ordered.
    batch["token_ids"][[0, 2, 5, 7]] = pairs(longest=7)["token_ids"][:4]
    weights, found = model.get_weights(), []
    for size in (None, 4):
        model.set_weights(weights)
        model.micro_batch_size = size
        model.compile(keras.optimizers.SGD(1.0), **FAST)
        loss = model.train_on_batch(batch)[0]
        found.append(
            (float(loss), [x - y for x, y in zip(weights, model.get_weights())])
        )
    # The backward pass encodes both chunks again.
    assert sorted(widths[1:]) == [8, 8, 32, 32]
    (expected_loss, expected), (loss, gradients) = found
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert largest_error(gradients, expected) <= 1e-5


# === What is not cut ===


def mean_of_tokens(backbone):
    """An own encoder whose pooling is not that of its family."""
    encoder = backbone.text_encoder
    pooled = backbone.text_pooler(encoder.output, encoder.inputs[0])
    return keras.Model(encoder.input, pooled + ops.mean(encoder.output, axis=1))


class Blocks(keras.layers.Layer):
    """Works on blocks of 8 tokens, or of 16, and takes whole blocks alone."""

    def call(self, x):
        size = ops.shape(x)
        blocks = ops.reshape(x, (size[0], size[1] // LEAST, LEAST, x.shape[-1]))
        return ops.reshape(blocks + ops.sum(blocks, axis=2, keepdims=True), size)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


def encoder_with_mask(hides=True, length=None, layer=None):
    """An own text encoder with a mask, which it uses or not, and a further layer."""
    ids = keras.Input((length,), dtype="int32", name="token_ids")
    mask = keras.Input((length,), dtype="int32", name="padding_mask")
    x = keras.layers.Embedding(VOCABULARY, 16)(ids)
    if layer is not None:
        x = layer(x * ops.cast(mask, "float32")[:, :, None])
    if hides:
        x = x * ops.cast(mask, "float32")[:, :, None]
        x = ops.sum(x, axis=1) / ops.sum(ops.cast(mask, "float32"), axis=1)[:, None]
    else:
        # Zero until it is trained.
        weigh = keras.layers.Dense(16, kernel_initializer="zeros")
        x = weigh(ops.mean(x, axis=1)) + x[:, 0]
    return keras.Model([ids, mask], x)


def extreme_of_tokens(sign):
    """An own encoder of the largest, or the smallest values, where padding is zero."""
    ids, mask = (
        keras.Input((None,), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask")
    )
    x = keras.layers.Embedding(VOCABULARY, 16)(ids)
    x = x * ops.cast(mask, "float32")[:, :, None]
    return keras.Model([ids, mask], sign * ops.max(sign * x, axis=1))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "is_cut"),
    [
        (encoder_with_mask, True),
        (lambda: encoder_with_mask(hides=False), False),
        (lambda: encoder_with_mask(length=WIDTH), False),
        (lambda: encoder_with_mask(layer=Blocks()), False),
        (lambda: encoder_with_mask(layer=keras.layers.BatchNormalization()), False),
        (lambda: pooling_encoder(tiny_clip()), True),
        (lambda: pooling_encoder(tiny_metaclip()), True),
        (lambda: mean_of_tokens(tiny_clip()), False),
        (lambda: extreme_of_tokens(-1), False),
        (text_bag, False),
        (lambda: tiny_siglip().text_encoder, False),
        (lambda: from_backbone(tiny_clip).text_encoder, True),
    ],
    ids=[
        "hides padding",
        "sees padding",
        "fixed length",
        "blocks",
        "batch normalization",
        "own clip",
        "own metaclip",
        "other pooling",
        "minimum of zeroed",
        "no mask",
        "siglip",
        "clip",
    ],
)
def test_only_encoders_that_padding_does_not_change_get_cut_texts(
    make, is_cut, monkeypatch
):
    model = kcm.ContrastiveModel(image_mlp(), make())
    lengths = model.text_tower.lengths
    assert bool(lengths.names) == is_cut
    kinds = {"highest id": "CLIP", "end token": "MetaCLIP2"}
    batch = pairs(kinds.get(model.text_tower.family.pooling, "BERT"))
    batch["other"] = batch["token_ids"] + 1
    cut = pickle.loads(pickle.dumps(lengths)).cut(batch)
    assert cut["token_ids"].shape == (8, LEAST if is_cut else WIDTH)
    # As does everything that is no input of the encoder.
    assert cut["other"].shape == (8, WIDTH)
    # Tested once, and never in a compiled step.
    monkeypatch.setattr(TextTower, "features", None)
    assert model.text_tower.lengths is lengths


@pytest.mark.any_backend
def test_a_frozen_maximum_over_zeroed_padding_is_that_of_full_texts():
    batch, found = pairs("BERT", longest=LEAST), []
    for train in ("fit", "train_on_batch"):
        keras.utils.set_random_seed(0)
        encoder = extreme_of_tokens(1)
        encoder.trainable = False
        encoder.set_weights([-np.abs(x) for x in encoder.get_weights()])
        model = kcm.ContrastiveModel(image_mlp(), encoder)
        model.compile(keras.optimizers.SGD(1.0), **FAST)
        getattr(model, train)(batch)
        found.append(model.weights)
    assert_close(*found)


@pytest.mark.one_case
@pytest.mark.parametrize("columns", [WIDTH, None])
@pytest.mark.parametrize("name", ["CLIP", "MetaCLIP2", "BERT"])
def test_a_graph_cuts_texts_as_the_host_does(name, columns):
    tf = pytest.importorskip("tensorflow")
    lengths = FAMILIES[name]().text_tower.lengths
    spec = tf.TensorSpec((None, columns), "int32")

    @tf.function
    def cut(batch):
        return lengths.cut(batch, tf.experimental.numpy)

    for longest in range(2, WIDTH + 1, 3):
        batch = {"token_ids": pairs(name, longest)["token_ids"]}
        if name == "BERT" and longest % 2:
            batch["padding_mask"] = np.flip(batch["token_ids"] != 0, 0).astype("int32")
        graph = cut.get_concrete_function(dict.fromkeys(batch, spec))
        found = graph({k: tf.constant(x) for k, x in batch.items()})
        expected = lengths.cut(batch)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


@pytest.mark.any_backend
def test_lengths_end_with_the_last_visible_token():
    lengths = from_encoders("BERT").text_tower.lengths
    ids = np.array([[4, 5, 0, 0], [4, 0, 6, 0], [0, 0, 0, 0], [4, 5, 6, 7]])
    assert lengths.of({"token_ids": ids}).tolist() == [2, 3, 1, 4]
    mask = np.array([[1, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    batch = {"token_ids": ids, "padding_mask": mask}
    assert lengths.of(batch).tolist() == [1, 4, 1, 2]
    # The encoder refuses inputs that do not fit, by name.
    wide = {"token_ids": pairs("BERT")["token_ids"], "padding_mask": mask}
    assert lengths.cut(wide) is wide


@pytest.mark.any_backend
def test_encode_text_cuts_arrays_and_leaves_tensors(widths):
    model, ids = from_backbone(tiny_clip), pairs()["token_ids"]
    given = ids, ids.tolist(), ops.convert_to_tensor(ids)
    found = [to_numpy(model.encode_text(each)) for each in given]
    assert widths == [LEAST, LEAST, WIDTH]
    for each in found[:2]:
        assert_close(each, found[2])


class WithPrior(kcm.ContrastiveModel):
    """Reads an entry of a batch that has no row a pair."""

    def compute_loss(self, x, *args, **options):
        loss = super().compute_loss(x, *args, **options)
        return loss + 0.0 * ops.sum(ops.cast(x["prior"], "float32"))


@pytest.mark.one_case
def test_an_entry_without_a_row_a_pair_reaches_the_step_of_a_dataset():
    tf = pytest.importorskip("tensorflow")
    model = WithPrior.from_backbone(tiny_clip())
    # A graph, in which tensors have shapes before they have values.
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=False)
    batch = pairs("CLIP")
    data = tf.data.Dataset.from_tensor_slices(batch).batch(4)
    data = data.map(lambda x: {**x, "prior": tf.ones(10)})
    history = model.fit(data, verbose=0).history
    assert np.isfinite(history["loss"]).all()
