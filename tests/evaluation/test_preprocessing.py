"""What evaluation does to images before a model sees them."""

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.evaluation.embedding import resize_image

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("image_size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("size", [(40, 23), (17, 61), (16, 16), (5, 9)])
def test_an_image_becomes_its_center(size, image_size):
    # The row in one channel, the column in another.
    pixels = np.zeros((*size, 3), "uint8")
    pixels[..., 0], pixels[..., 1] = np.indices(size)
    found = resize_image(Image.fromarray(pixels), image_size)
    assert found.shape == (*image_size, 3)
    assert found.dtype == "uint8"
    row, column, _ = found.mean(axis=(0, 1))
    assert abs(row - (size[0] - 1) / 2) <= 1
    assert abs(column - (size[1] - 1) / 2) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize(
    ("image_size", "resize"),
    # open_clip crops squares only.
    [((16, 16), "crop"), ((16, 16), "squash"), ((8, 24), "squash")],
)
def test_images_become_those_of_open_clips_transforms(image_size, mode, resize):
    open_clip = pytest.importorskip("open_clip")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 23, 4), "uint8")
    image = Image.fromarray(pixels)
    if mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    transform = open_clip.image_transform(
        image_size,
        is_train=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        resize_mode={"crop": "shortest", "squash": "squash"}[resize],
    )
    expected = (255 * transform(image)).round().numpy().transpose(1, 2, 0)
    found = resize_image(image, image_size, resize)
    np.testing.assert_array_equal(found, expected)
