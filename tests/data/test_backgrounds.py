import numpy as np
import pytest

from keras_cluster_mask.data.backgrounds import composite

pytestmark = pytest.mark.any_backend


def test_white_is_blended_by_alpha():
    image = np.zeros((1, 3, 4), "uint8")
    image[0, :, 0] = 255
    image[0, :, 3] = [0, 51, 255]
    actual = composite(image, ["white"])
    assert actual[0].tolist() == [[255, 255, 255], [255, 204, 204], [255, 0, 0]]


def test_random_backgrounds_differ_and_follow_their_seed():
    image = np.zeros((48, 40, 4), "uint8")
    image[10:20, 10:20] = 255
    images = np.stack([composite(image, ["random"], number) for number in range(60)])
    again = np.stack([composite(image, ["random"], number) for number in range(60)])
    np.testing.assert_array_equal(images, again)
    assert (images[:, 10:20, 10:20] == 255).all()
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60
    # A third is plain. Textures change more between neighbors than gradients.
    changes = np.abs(np.diff(images[:, 20:].astype(int), axis=2)).mean(axis=(1, 2, 3))
    assert 8 <= np.sum(changes == 0) <= 32
    assert 8 <= np.sum((changes > 0) & (changes < 8)) <= 36
    assert np.sum(changes >= 8) >= 8
    # Colors are spread over the whole range.
    assert 90 < images[:, 30:].mean() < 165
    assert images[:, 30:].std() > 50


def test_each_background_of_a_list_is_drawn_equally_often():
    image = np.zeros((4, 4, 4), "uint8")
    choices = ["white", "random"]
    images = np.stack([composite(image, choices, number) for number in range(90)])
    white = np.sum((images == 255).all(axis=(1, 2, 3)))
    # Five standard deviations of a binomial distribution.
    assert 21 <= white <= 69
