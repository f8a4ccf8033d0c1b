"""Images that were not normalised, and weights that fit no pairs, are refused."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.models.pixels import brightest_pixel
from keras_cluster_mask.training.input_rules import InputRules
from tests.helpers import FAST, image_mlp, random_images, random_pairs, text_bag

REFUSED = r"`images` must be uint8.*Received: images of type"


def pixels(high, dtype="float32"):
    rng = np.random.default_rng(0)
    return (high * rng.random((4, 16, 16, 3))).astype(dtype)


UNNORMALISED = {
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
    model = kcm.ContrastiveModel(image_mlp(), text_bag(), **options)
    model.compile("sgd", **FAST)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("kind", UNNORMALISED)
def test_images_that_are_not_normalised_are_refused_everywhere(kind):
    tf = pytest.importorskip("tensorflow")
    images = UNNORMALISED[kind]
    pairs = {**random_pairs(4), "images": images}
    dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(4, drop_remainder=True)
    for call in (
        lambda model: model.fit(pairs, verbose=0),
        lambda model: model.fit(random_pairs(4), validation_data=pairs, verbose=0),
        lambda model: model.fit(dataset, verbose=0),
        lambda model: model.evaluate(pairs, verbose=0),
        lambda model: model.predict(pairs, verbose=0),
        lambda model: model.encode_image(images),
        lambda model: kcm.evaluation.embed(model, images, verbose=0),
    ):
        # On JAX, a model is lost whose first step in Keras's `fit` fails.
        with pytest.raises(Exception, match=REFUSED):
            call(make_model())


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
        # Bright, and a little beyond white from a resize after the normalisation.
        2.0 + 0.4 * random_images(4).clip(0, 1),
        pixels(255, "uint8"),
    ],
    ids=["normalised", "zeros", "constant", "bright", "uint8"],
)
def test_normalised_constant_and_uint8_images_pass(images, model):
    embeddings = model.encode_image(images)
    assert embeddings.shape == (4, 16)
    model.evaluate({**random_pairs(4), "images": images}, verbose=0)


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["to 1", "to 255", "int32"])
def test_a_model_without_statistics_takes_images_as_they_are(kind):
    model = make_model(pixel_mean=None)
    images = UNNORMALISED[kind]
    model.fit({**random_pairs(4), "images": images}, verbose=0)
    expected = ops.convert_to_numpy(model.image_encoder(images.astype("float32")))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = ops.convert_to_numpy(model.encode_image(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.any_backend
def test_the_brightest_pixel_is_that_of_the_channel_that_reaches_furthest():
    assert brightest_pixel((0.5, 0.5, 0.5), (0.5, 0.25, 0.5)) == 2.0
    assert brightest_pixel(None, None) is None
    limit = InputRules(max_pixel=2.0)
    limit.check_images(np.array([[0.0, 6.0]]))
    with pytest.raises(ValueError, match=r"Received: .* from 0 to 6\.5"):
        limit.check_images(np.array([[0.0, 6.5]]))


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
    """A data set of torch's."""


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
