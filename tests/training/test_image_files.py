"""Image files, and images of any size, as the arrays of a model."""

import pathlib

import keras
import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import image_text_dataset
from keras_cluster_mask.training.image_files import read_image_files

pytestmark = pytest.mark.any_backend


@pytest.fixture
def files(tmp_path):
    """Photographs of different shapes: paths, and one turned by its EXIF entry."""
    rng = np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(20, 31, 3), (40, 18, 3), (12, 12, 3)]):
        image = Image.fromarray(rng.integers(0, 256, shape).astype("uint8"))
        exif = image.getexif()
        exif[0x0112] = 1 if number else 6
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1], exif=exif)
    return paths


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_images_are_those_of_a_dataset_for_evaluation(files, resize, data_format):
    keras.config.set_image_data_format(data_format)
    options = dict(image_size=(12, 16), resize=resize)
    rows = [{"image": str(path)} for path in files]
    dataset = image_text_dataset(rows, None, training=False, **options)
    (expected,) = [batch["images"] for batch in dataset]
    of_each_kind = [str(files[0]), files[1], Image.open(files[2])]
    (found,) = read_image_files(of_each_kind, **options)
    np.testing.assert_array_equal(found, expected)
    assert found.shape[1:] == ((3, 12, 16) if "first" in data_format else (12, 16, 3))


def test_arrays_of_the_size_of_the_model_are_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3)).astype("uint8")
    batches = [*read_image_files([*images], (8, 8), "crop")]
    assert [len(batch) for batch in batches] == [64, 6]
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("none.png", "cannot be read.*none.png"),
        (pathlib.Path(__file__), "cannot be decoded"),
        (np.zeros((8, 8, 3), "float32"), "is not uint8.*float32"),
        (3, "no image"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_by_its_place(image, reason):
    good = np.zeros((8, 8, 3), "uint8")
    with pytest.raises(ValueError, match=rf"`images` must.*images\[1\].*{reason}"):
        [*read_image_files([good, image], (8, 8), "crop")]


def test_an_encoder_of_images_of_any_size_needs_arrays():
    with pytest.raises(ValueError, match=r"`images` must be an array.*None, None"):
        [*read_image_files(["a.png"], (None, None), "crop")]
