import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import resizing

skimage_data = pytest.importorskip("skimage.data")

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_photographs_come_out_as_pillow_resizes_them(name, monkeypatch):
    image = Image.fromarray(getattr(skimage_data, name)())
    box = (7.3, 11.0, image.width - 30.6, image.height - 2.0)
    assert resizing.simd is not None
    quick = resizing.resize(image, (112, 96), box).astype(int)
    monkeypatch.setattr(resizing, "simd", None)
    expected = resizing.resize(image, (112, 96), box).astype(int)
    assert quick.shape == (112, 96, 3)
    assert np.abs(quick - expected).mean() < 0.3
    assert np.mean(np.abs(quick - expected) > 1) < 0.01


def test_an_edge_that_is_not_whole_pixels_is_no_border():
    image = Image.fromarray(np.full((20, 20, 3), 77, "uint8"))
    assert (resizing.resize(image, (8, 8), (0.5, 0.2, 19.3, 19.9)) == 77).all()
