"""Images that were not normalized, and weights that fit no pairs, are refused."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models.pixels import pixel_range
from keras_cluster_mask.training.input_rules import InputRules
from tests.helpers import (
    FAST,
    random_images,
    random_pairs,
    small_model,
    tiny_clip,
)

REFUSED = r"`images` must be uint8.*Received: images of type"


def pixels(high, dtype="float32"):
    rng = np.random.default_rng(0)
    return (high * rng.random((4, 16, 16, 3))).astype(dtype)


UNNORMALIZED = {
    "to 1": pixels(1),
    "to 255": pixels(255),
    "float16": pixels(1, "float16"),
    "bfloat16": pixels(1, ml_dtypes.bfloat16),
    "float64": pixels(255, "float64"),
    "int32": pixels(255, "int32"),
    "int64": pixels(255, "int64"),
    "bool": pixels(1) > 0.5,
}


def make_model(**options):
    model = small_model(**options)
    model.compile("sgd", **FAST)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("kind", UNNORMALIZED)
def test_images_that_are_not_normalized_are_refused_everywhere(model, kind):
    tf = pytest.importorskip("tensorflow")
    images = UNNORMALIZED[kind]
    pairs = {**random_pairs(4), "images": images}
    dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(4, drop_remainder=True)
    for call in (
        lambda: model.fit(pairs, verbose=0),
        lambda: model.fit(random_pairs(4), validation_data=pairs, verbose=0),
        lambda: model.fit(dataset, verbose=0),
        lambda: model.evaluate(pairs, verbose=0),
        lambda: model.predict(pairs, verbose=0),
        lambda: model.encode_image(images),
        lambda: kcm.evaluation.embed(model, images, verbose=0),
    ):
        with pytest.raises(Exception, match=REFUSED):
            call()


@pytest.mark.any_backend
def test_tensors_are_refused_as_arrays_are(model):
    for high in (1, 255):
        with pytest.raises(ValueError, match=REFUSED):
            model.encode_image(ops.convert_to_tensor(pixels(high)))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "images",
    [
        random_images(4),
        np.zeros((4, 16, 16, 3), "float32"),
        np.full((4, 16, 16, 3), 0.5, "float32"),
        # Bright, and a little beyond white from a resize after the normalization.
        2.0 + 0.4 * random_images(4).clip(0, 1),
        pixels(255, "uint8"),
    ],
    ids=["normalized", "zeros", "constant", "bright", "uint8"],
)
def test_normalized_constant_and_uint8_images_pass(images, model):
    embeddings = model.encode_image(images)
    assert embeddings.shape == (4, 16)
    model.evaluate({**random_pairs(4), "images": images}, verbose=0)


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["to 1", "to 255", "int32"])
def test_a_model_without_statistics_takes_images_as_they_are(kind):
    model = make_model(pixel_mean=None)
    images = UNNORMALIZED[kind]
    model.fit({**random_pairs(4), "images": images}, verbose=0)
    expected = ops.convert_to_numpy(model.image_encoder(images.astype("float32")))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = ops.convert_to_numpy(model.encode_image(images))
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
    model = make_model(pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 1.0))
    images = (255 * pixels(1)).astype("uint8")
    found = model.encode_image(images / np.float32(255))
    expected = model.encode_image(images)
    np.testing.assert_allclose(
        *map(ops.convert_to_numpy, (found, expected)), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match=REFUSED):
        model.encode_image(images.astype("float32"))


def test_what_has_no_values_yet_is_not_checked():
    model = make_model()
    assert model.encode_image(keras.Input((16, 16, 3))).shape == (None, 16)
    assert model.encode_text(keras.Input((6,), dtype="int32")).shape == (None, 16)
    images = ops.convert_to_tensor(random_images(2))
    if keras.backend.backend() == "torch":
        import torch

        found = torch.func.vmap(lambda x: model.encode_image(x[None])[0])(images)
    elif keras.backend.backend() == "jax":
        import jax

        found = jax.vmap(lambda x: model.encode_image(x[None])[0])(images)
    else:
        import tensorflow as tf

        found = tf.function(model.encode_image)(images)
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(x) for x in (found, model.encode_image(images))),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.any_backend
def test_ids_are_checked_when_texts_are_encoded():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    with pytest.raises(ValueError, match=r"vocabulary, \[0, 30\).*Received: ids"):
        model.encode_text(np.full((2, 6), 30))


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
        make_model(**{name: value})


class Batches(keras.utils.PyDataset):
    def __init__(self, pairs):
        super().__init__()
        self.pairs, self.begun = pairs, 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return (self.pairs,)

    def on_epoch_begin(self):
        self.begun += 1


class Pairs(list):
    """A dataset of torch's."""


def loader(pairs):
    if keras.backend.backend() != "torch":
        pytest.skip("Keras takes dictionaries from torch's loaders on torch alone.")
    data = pytest.importorskip("torch.utils.data")
    rows = Pairs({k: v[i] for k, v in pairs.items()} for i in range(8))
    return data.DataLoader(rows, batch_size=4)


def doubled(pairs):
    return {name: np.concatenate([x, x]) for name, x in pairs.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda pairs: ((pairs,) for _ in range(2)),
        Batches,
        lambda pairs: loader(doubled(pairs)),
    ],
    ids=["generator", "PyDataset", "DataLoader"],
)
def test_batches_of_other_iterables_are_checked_too(make, model):
    for bad, message in (
        ({"images": pixels(1)}, REFUSED),
        ({"sample_weight": -np.ones(4, "float32")}, "`sample_weight` must"),
    ):
        with pytest.raises(Exception, match=message):
            make_model().fit(make({**random_pairs(4), **bad}), verbose=0)
    before = int(model.optimizer.iterations)
    data = make(random_pairs(4))
    model.fit(data, verbose=0)
    assert int(model.optimizer.iterations) == before + 2
    if isinstance(data, Batches):
        assert data.begun > 0


@pytest.mark.any_backend
def test_a_saved_model_refuses_the_same(tmp_path):
    model = make_model(pixel_std=(0.1, 0.1, 0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.input_rules == model.input_rules


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images": random_images(5)}, "equal lengths.*images of 5, token_ids of 4"),
        ({"labels": np.arange(3)}, "equal lengths.*labels of 3"),
        ({"token_ids": 0.7 + np.ones((4, 6))}, "integers.*of type float64"),
        ({"token_ids": np.full((4, 6), np.nan)}, "integers.*of type float64"),
        ({"token_ids": np.ones((4, 6, 1), "int32")}, r"integers.*shape \(4, 6, 1\)"),
        ({"token_ids": np.ones((4, 7), "int32")}, "of at most 6 columns"),
    ],
)
def test_arrays_that_make_no_pairs_are_refused(entries, message):
    pairs = {**random_pairs(4), **entries}
    for call in ("fit", "evaluate", "predict"):
        with pytest.raises(ValueError, match=rf"{message}"):
            getattr(make_model(), call)(pairs)


def test_entries_that_are_none_are_left_out(model):
    pairs = {**random_pairs(4), "labels": None}
    assert np.isfinite(model.fit(pairs, verbose=0).history["loss"]).all()


@pytest.mark.any_backend
def test_a_bright_batch_among_others_is_no_batch_of_pixels():
    # Of SigLIP's statistics, [0, 1] is the upper half of what there is.
    model = make_model(pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5))
    images = 2 * pixels(1) - 1
    images[2:] = np.abs(images[2:])
    pairs = {**random_pairs(4), "images": images}
    model.fit(pairs, batch_size=2, shuffle=False, verbose=0)
    batches = [{k: v[i : i + 2] for k, v in pairs.items()} for i in (0, 2)]
    model.fit(((batch,) for batch in batches), verbose=0)
    with pytest.raises(Exception, match=REFUSED):
        make_model().fit(((batch,) for batch in batches[::-1]), verbose=0)


def test_a_dataset_of_tuples_is_checked_too():
    tf = pytest.importorskip("tensorflow")
    pairs = {**random_pairs(4), "images": pixels(1)}
    data = tf.data.Dataset.from_tensor_slices((pairs,)).batch(4, drop_remainder=True)
    for call in ("fit", "evaluate", "predict"):
        with pytest.raises(Exception, match=REFUSED):
            getattr(make_model(), call)(data, verbose=0)


def test_a_grain_dataset_is_checked_too():
    grain = pytest.importorskip("grain")
    for images, message in ((pixels(1), REFUSED), (random_images(4), None)):
        rows = {**random_pairs(4), "images": images}
        rows = [{k: v[i] for k, v in rows.items()} for i in range(4)]
        data = grain.MapDataset.source(rows).batch(4)
        model = make_model()
        if message is None:
            assert np.isfinite(model.fit(data, verbose=0).history["loss"]).all()
        else:
            with pytest.raises(Exception, match=message):
                model.fit(data, verbose=0)


@pytest.mark.parametrize("weight", [np.ones((5, 1)), -np.ones(4)])
def test_weights_in_tuples_are_checked(weight):
    batch = (random_pairs(4), None, weight.astype("float32"))
    for call in (
        lambda model: model.fit((x for x in [batch]), verbose=0),
        lambda model: model.evaluate(batch[0], None, 4, 0, batch[2]),
    ):
        with pytest.raises(Exception, match=r"`sample_weight` must.*Received:"):
            call(make_model())


@pytest.mark.any_backend
def test_a_split_beside_validation_data_is_refused(model):
    with pytest.raises(ValueError, match=r"`validation_split` must be 0.*Received:"):
        model.fit(
            random_pairs(8), validation_split=0.5, validation_data=random_pairs(4)
        )
