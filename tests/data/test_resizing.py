import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.resizing import resize

skimage_data = pytest.importorskip("skimage.data")

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_photographs_are_resized_as_by_pillow(name):
    image = Image.fromarray(getattr(skimage_data, name)())
    box = (7.3, 11.0, image.width - 30.6, image.height - 2.0)
    actual = resize(image, (112, 96), box)
    expected = np.asarray(image.resize((96, 112), Image.Resampling.BICUBIC, box))
    assert actual.shape == (112, 96, 3)
    assert actual.dtype == "uint8"
    difference = np.abs(actual.astype(int) - expected)
    assert difference.mean() < 0.3
    assert np.mean(difference > 1) < 0.01


def test_transparent_images_are_resized_with_their_alpha():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 4), "uint8")
    image = Image.fromarray(array)
    actual = resize(image, (8, 9), (0, 0, 30, 20))
    assert actual.shape == (8, 9, 4)
    np.testing.assert_array_equal(
        actual, image.resize((9, 8), Image.Resampling.BICUBIC)
    )


def test_edges_between_pixels_make_no_border():
    image = Image.fromarray(np.full((20, 20, 3), 77, "uint8"))
    assert (resize(image, (8, 8), (0.5, 0.2, 19.3, 19.9)) == 77).all()
