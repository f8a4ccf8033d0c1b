"""Images that were not normalized, and weights that fit no pairs, are refused."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.pixels import pixel_range
from keras_cluster_mask.training.input_rules import InputRules
from tests.helpers import (
    VOCABULARY,
    compiled,
    compiled_model,
    random_images,
    random_pairs,
    to_numpy,
)

RULES = InputRules(
    text_inputs=("token_ids", "padding_mask"),
    context_length=6,
    vocabulary_size=VOCABULARY,
    end_token_id=VOCABULARY - 1,
    padding_id=0,
    training=True,
)


def with_ids(column, value, dtype="int32"):
    """A batch in which one id of row 2 is another."""
    ids = random_pairs(4)["token_ids"].astype(dtype)
    ids[:, 0] = 1
    ids[2, column] = value
    return {"token_ids": ids}


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images": random_images(5)}, "equal lengths.*images of 5, token_ids of 4"),
        (with_ids(1, np.nan, "float32"), "`token_ids` must be integers.*type float32"),
        ({"token_ids": np.ones((4, 7), "int32")}, "of at most 6 columns.*Received:"),
        (
            with_ids(1, VOCABULARY),
            r"vocabulary, \[0, 30\).*Received: ids from .* to 30",
        ),
        (with_ids(1, -1), r"vocabulary, \[0, 30\).*Received: ids from -1"),
        (with_ids(-1, 3), "the end token, 29.*Received: 1 such rows, .* row 2"),
        (with_ids(0, 0), "`padding_mask` must be in.*Received: 1 such rows, .* row 2"),
        (with_ids(3, 0), "`padding_mask` must be in.*Received: 1 such rows, .* row 2"),
        ({"sample_weights": np.ones(4)}, "'sample_weight'.*Received:"),
        *(
            ({"sample_weight": x}, "`sample_weight` must be 4.*Received:")
            for x in (np.ones((4, 1)), -np.ones(4), np.full(4, np.nan))
        ),
        (
            {"images": random_images(1), "token_ids": with_ids(1, 2)["token_ids"][:1]},
            "at least two pairs.*Received: a batch of 1",
        ),
    ],
)
def test_a_batch_that_breaks_a_rule_is_refused(entries, message):
    good = {**random_pairs(4), **with_ids(1, 2)}
    RULES.check(good)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        RULES.check({**good, **entries})


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "entries",
    [
        with_ids(-2, VOCABULARY - 1),
        with_ids(1, 7, "uint8"),
        # With a mask, zeros may be anywhere.
        {**with_ids(3, 0), "padding_mask": np.ones((4, 6), "int32")},
        {"labels": np.arange(4), "scale": np.float32(3)},
    ],
)
def test_arrays_within_the_rules_are_returned_as_they_are(entries):
    given = {**random_pairs(4), **with_ids(1, 2), **entries}
    batch = RULES.check_arrays(given)
    assert batch.keys() == given.keys()
    for name, values in given.items():
        assert batch[name] is values


@pytest.mark.any_backend
def test_without_a_known_vocabulary_ids_pass():
    InputRules().check({**random_pairs(4), **with_ids(1, 10_000)})


# === Images ===

REFUSED = r"`images` must be uint8.*Received: images of type"


def pixels(high, dtype="float32"):
    rng = np.random.default_rng(0)
    return (high * rng.random((4, 16, 16, 3))).astype(dtype)


UNNORMALIZED = {
    "to 1": pixels(1),
    "to 255": pixels(255, "float64"),
    "bfloat16": pixels(1, ml_dtypes.bfloat16),
    "without their mean": pixels(275) - 124,
    "constant": np.full((4, 16, 16, 3), 255.0),
    "int32": pixels(255, "int32"),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", UNNORMALIZED)
def test_images_that_are_not_normalized_are_refused_everywhere(model, kind):
    images = UNNORMALIZED[kind]
    pairs = {**random_pairs(4), "images": images}
    for call in (
        lambda: model.fit(random_pairs(4), validation_data=pairs, verbose=0),
        lambda: model.encode_image(ops.convert_to_tensor(images)),
        lambda: kcm.evaluation.embed(model, images, verbose=0),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert int(model.optimizer.iterations) == 0


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "images",
    [
        random_images(4),
        np.full((4, 16, 16, 3), 0.5, "float32"),
        # Bright, and a little beyond white from a resize after the normalization.
        2.0 + 0.4 * random_images(4).clip(0, 1),
        4.0 * random_images(4),
    ],
    ids=["normalized", "constant", "bright", "wide"],
)
def test_normalized_and_constant_images_pass(images, model):
    assert model.encode_image(images).shape == (4, 16)


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["to 1", "to 255", "int32"])
def test_a_model_without_statistics_takes_images_as_they_are(kind):
    model = compiled_model(pixel_mean=None)
    images = UNNORMALIZED[kind]
    model.fit({**random_pairs(4), "images": images}, verbose=0)
    expected = to_numpy(model.image_encoder(images.astype("float32")))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = to_numpy(model.encode_image(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.any_backend
def test_the_range_is_that_of_the_channels_that_reach_furthest():
    assert pixel_range((0.5, 0.5, 0.4), (0.5, 0.25, 0.5)) == (-2.0, 2.0)
    assert pixel_range(None, None) is None
    rules = InputRules(pixel_range=(-2.0, 2.0))
    rules.check_images(np.array([[0.0, 6.0]]))
    with pytest.raises(ValueError, match=r"Received: .* from 0 to 6\.5"):
        rules.check_images(np.array([[0.0, 6.5]]))


@pytest.mark.any_backend
def test_floats_that_are_normalized_to_0_to_1_pass():
    model = compiled_model(pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
    images = (255 * pixels(1)).astype("uint8")
    found = model.encode_image(images / np.float32(255))
    expected = model.encode_image(images)
    np.testing.assert_allclose(*map(to_numpy, (found, expected)), rtol=1e-4, atol=1e-6)


def test_what_has_no_values_yet_is_not_checked():
    model = compiled_model()
    assert model.encode_image(keras.Input((16, 16, 3))).shape == (None, 16)
    assert model.encode_text(keras.Input((6,), dtype="int32")).shape == (None, 16)
    images = ops.convert_to_tensor(random_images(2))
    found, expected = compiled(model.encode_image)(images), model.encode_image(images)
    np.testing.assert_allclose(*map(to_numpy, (found, expected)), rtol=1e-4, atol=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_mean", (0.5, 0.5)),
        ("pixel_mean", (0.5, np.nan, 0.5)),
        ("pixel_std", (0.5, 0.0, 0.5)),
        ("pixel_std", None),
    ],
)
def test_statistics_that_normalize_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must.*Received: {name}="):
        compiled_model(**{name: value})


@pytest.mark.any_backend
def test_arrays_and_the_share_are_checked_before_they_are_split(model):
    pairs = random_pairs(8)
    with pytest.raises(ValueError, match="Received: validation_split=20"):
        model.fit(pairs, validation_split=20)
    del pairs["token_ids"]
    with pytest.raises(ValueError, match=r"missing: \['token_ids'\]"):
        model.fit(pairs, validation_split=0.5)


# === Batches passed to the model directly ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([*random_pairs(4).values()], "must be a dictionary.*Received: .*list"),
        ({"images": random_images(4)}, r"missing: \['token_ids'\]. Received: keys="),
    ],
)
def test_inputs_that_make_no_batch_are_refused_by_the_model(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(inputs)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (4, {"y": np.arange(4)}, "`y` must be None.*Received: y of type"),
        (4, {"sample_weight": np.ones((4, 1))}, r"shape \(batch,\).*Received: .*4, 1"),
        (1, {}, "at least two pairs.*Received: a batch of 1"),
    ],
)
def test_a_single_step_refuses_what_it_cannot_train_on(model, count, options, message):
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(random_pairs(count), **options)
    assert int(model.optimizer.iterations) == 0
