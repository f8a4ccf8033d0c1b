"""Text encoders by family, and those with several inputs, in a ContrastiveModel."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.encoders.test_pooled import bert as bert_backbone
from tests.helpers import (
    CONTEXT,
    FAST,
    VOCABULARY,
    assert_close,
    assert_same_values,
    image_mlp,
    random_pairs,
    text_bag,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
)

pytestmark = pytest.mark.any_backend


def pooling_encoder(backbone):
    """An own text encoder: that of a backbone, and the backbone's pooling layer."""
    encoder = backbone.text_encoder
    tokens, ids = encoder.output, encoder.inputs[0]
    return keras.Model(encoder.input, backbone.text_pooler(tokens, ids), name="own")


END = VOCABULARY - 1


@pytest.mark.parametrize(
    ("make", "end", "is_pooled"),
    [
        (tiny_clip, END, True),
        (tiny_metaclip, 2, True),
        (tiny_siglip, 1, False),
        (lambda: pooling_encoder(tiny_clip()), END, True),
        (lambda: pooling_encoder(tiny_metaclip()), 2, True),
        (text_bag, END, False),
    ],
    ids=["clip", "metaclip", "siglip", "own clip", "own metaclip", "own"],
)
def test_a_text_is_read_up_to_the_token_that_its_family_pools(make, end, is_pooled):
    encoder = make()
    if hasattr(encoder, "text_encoder"):
        model = kcm.ContrastiveModel.from_backbone(encoder)
    else:
        model = kcm.ContrastiveModel(image_mlp(), encoder)
    ids = np.array([[20, 5, 9, end, 7, 3]], "int32")
    found = model.text_tower.family.is_pooled(ids)
    assert (found is not None) == is_pooled
    if is_pooled:
        assert_same_values(found, ids == end)
    expected = to_numpy(model.encode_text(ids))
    for column in (0, 1, 2, 4, 5):
        other = ids.copy()
        other[0, column] = 11
        change = np.abs(to_numpy(model.encode_text(other)) - expected).max()
        assert (change > 1e-6) == (column < 3 or not is_pooled), column


def bert(as_list=True):
    """A BERT that pools; its inputs are a list or a dictionary."""
    backbone = bert_backbone(dropout=0.0, max_sequence_length=CONTEXT, name="bert")
    inputs = backbone.inputs if as_list else backbone.input
    return keras.Model(inputs, backbone.output["pooled_output"], name="bert_pooled")


def texts(count, seed=0):
    """Pairs whose texts have several lengths, with their masks and segments."""
    pairs = random_pairs(count, seed)
    ids = np.maximum(pairs["token_ids"], 1)
    mask = np.arange(CONTEXT) < 3 + np.arange(count)[:, None] % (CONTEXT - 2)
    return {
        "images": pairs["images"],
        "token_ids": np.where(mask, ids, 0).astype("int32"),
        "padding_mask": mask.astype("int32"),
        "segment_ids": np.zeros_like(ids),
    }


def without(batch, *names):
    return {key: value for key, value in batch.items() if key not in names}


def model_of(encoder=None, **kwargs):
    encoder = bert() if encoder is None else encoder
    model = kcm.ContrastiveModel(image_mlp(), encoder, **kwargs)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    return model


@pytest.fixture(scope="module")
def trained():
    """A model that has trained, its batch, and its embeddings of the texts."""
    model, batch = model_of(), texts(8)
    before = values(model.text_encoder.weights)
    history = model.fit(batch, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    moved = [np.any(a != b) for a, b in zip(before, values(model.text_encoder.weights))]
    # The key's bias has no influence, and the second segment does not occur.
    assert sum(moved) >= len(moved) - 1
    return model, batch, expected_embeddings(model, batch)


def expected_embeddings(model, batch):
    """What the text encoder returns for the inputs of their names, normalized."""
    encoder = model.text_encoder
    given = keras.tree.map_structure(lambda x: batch[x.name], encoder.input)
    features = to_numpy(encoder(given))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize("as_list", [True, False])
def test_entries_reach_the_inputs_of_their_names(as_list):
    model = model_of(bert(as_list))
    batch = texts(8)
    batch["segment_ids"] = np.arange(CONTEXT)[None] % 2 + np.zeros((8, 1), "int32")
    expected = expected_embeddings(model, batch)
    for found in (
        model.predict(batch, verbose=0)["text_embeddings"],
        to_numpy(model.encode_text(without(batch, "images"))),
        kcm.evaluation.embed(model, batch, verbose=0)["text_embeddings"],
    ):
        assert_close(found, expected, 1e-5)
    # Each entry has an effect.
    for name, other in (
        ("padding_mask", np.ones_like(batch["padding_mask"])),
        ("segment_ids", 1 - batch["segment_ids"]),
    ):
        found = model.encode_text(without({**batch, name: other}, "images"))
        assert np.abs(to_numpy(found) - expected).max() > 1e-4, name


def test_a_missing_mask_hides_zeros_and_missing_segments_are_zeros(trained):
    model, batch, expected = trained
    bare = without(batch, "padding_mask", "segment_ids")
    for found in (
        model.predict(bare, verbose=0)["text_embeddings"],
        to_numpy(model.encode_text(bare["token_ids"])),
        to_numpy(model.encode_text({"token_ids": bare["token_ids"]})),
        kcm.evaluation.embed(model, bare, verbose=0)["text_embeddings"],
    ):
        assert_close(found, expected, 1e-5)
    loss = model.evaluate(batch, batch_size=8, verbose=0)[0]
    assert model.evaluate(bare, batch_size=8, verbose=0)[0] == pytest.approx(loss)


# === Wrong input ===


def assert_refused(model, batch, message):
    for run in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=message):
            run(batch, batch_size=8, verbose=0)


@pytest.mark.parametrize(
    ("first_ids", "mask_name", "message"),
    [
        ([0, 0, 7], None, "`padding_mask` must be in the batch.*Received:.*row 3"),
        ([5, 0, 7], None, "`padding_mask` must be in the batch.*Received:.*row 3"),
        ([5], "mask", r"one of .*'padding_mask'.*Received: \['mask'\] of shape"),
    ],
)
def test_zeros_that_are_no_padding_need_a_mask(trained, first_ids, mask_name, message):
    model, batch, _ = trained
    ids = batch["token_ids"].copy()
    ids[3, : len(first_ids)] = first_ids
    wrong = without({**batch, "token_ids": ids}, "padding_mask")
    mask = np.ones_like(ids)
    assert_refused(model, wrong | ({mask_name: mask} if mask_name else {}), message)
    model.evaluate({**wrong, "padding_mask": mask}, batch_size=8, verbose=0)


def test_an_input_that_nothing_fills_is_named():
    ids = keras.Input((CONTEXT,), dtype="int32", name="token_ids")
    topics = keras.Input((3,), name="topics")
    x = keras.layers.Concatenate()([text_bag()(ids), topics])
    encoder = keras.Model([ids, topics], keras.layers.Dense(16)(x))
    model = model_of(encoder)
    pairs = random_pairs(4)
    message = r"missing: \['topics'\].*Received: keys="
    assert_refused(model, pairs, message)
    with pytest.raises(ValueError, match=message):
        model.encode_text(pairs["token_ids"])
    pairs["topics"] = np.random.default_rng(0).random((4, 3), dtype="float32")
    assert np.isfinite(model.fit(pairs, batch_size=4, verbose=0).history["loss"][0])
    nameless = keras.Model([keras.Input((CONTEXT,), name="ids"), topics], topics)
    with pytest.raises(ValueError, match=r"`text_encoder`.*'token_ids'.*Received:"):
        model_of(nameless)


@pytest.mark.parametrize("make", [lambda: pooling_encoder(tiny_clip()), text_bag])
def test_entries_that_the_text_encoder_does_not_take_are_refused(make):
    model, pairs = model_of(make()), texts(4)
    found = model.encode_text({"token_ids": pairs["token_ids"]})
    assert_same_values(found, model.encode_text(pairs["token_ids"]))
    for names in (["token_ids", "padding_mask"], ["padding_mask"]):
        with pytest.raises(ValueError, match=r"`token_ids`.*keys=.*'padding_mask'"):
            model.encode_text({name: pairs[name] for name in names})
