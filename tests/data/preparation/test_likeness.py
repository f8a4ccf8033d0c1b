import numpy as np
import pytest
from PIL import Image, ImageEnhance

from keras_cluster_mask.data.pictures import Picture
from keras_cluster_mask.data.preparation.deduplication import DISTANCE
from keras_cluster_mask.data.preparation.likeness import likeness, near_pairs


def alike(contents, distance=DISTANCE):
    found = [likeness(Picture(content)) for content in contents]
    hashes, colours = (
        np.array([np.frombuffer(each[place], "uint8") for each in found])
        for place in (0, 1)
    )
    return near_pairs(hashes, colours, distance).tolist()


def smaller(image):
    return image.resize([side // 3 for side in image.size], Image.LANCZOS)


CHANGES = {
    "as it is": lambda image: image,
    "smaller": smaller,
    "larger": lambda image: image.resize([side * 2 for side in image.size]),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_of_photographs_look_alike(change, photographs, encode):
    for name, image in photographs.items():
        copy = encode(CHANGES[change](image), "JPEG", quality=40)
        assert alike([encode(image), copy]) == [[0, 1]], name


def test_different_photographs_do_not_look_alike(photographs, encode):
    assert alike([encode(image) for image in photographs.values()], 10) == []


def test_photographs_are_hashed_upright(photographs, encode):
    image = photographs["coffee"]
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    assert alike([encode(image), lying]) == [[0, 1]]


def test_equal_shapes_of_other_colours_do_not_look_alike(encode):
    # Of the same brightness.
    balloons = []
    for colour in ((200, 20, 20), (20, 20, 255), (20, 200, 20)):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (20, 8, 44, 40))
        balloons.append(encode(image))
    assert alike(balloons, 15) == []


def test_pictures_of_one_colour_have_no_hash(encode):
    for colour in ("white", "red", (100, 100, 100)):
        assert likeness(Picture(encode(Image.new("RGB", (40, 30), colour))))[0] is None


@pytest.mark.parametrize("distance", [0, 3, 4, 6, 9, 15])
def test_the_search_finds_what_comparing_all_with_all_finds(distance):
    generator = np.random.default_rng(distance)
    seeds = generator.integers(0, 256, (40, 8), "uint8")
    bits = np.unpackbits(seeds[generator.integers(0, 40, 400)], axis=1)
    bits ^= generator.random(bits.shape) < 0.08
    hashes = np.packbits(bits, axis=1)
    colours = np.full((400, 48), 99, "uint8")
    colours[::7] = 255
    difference = (bits[:, None] != bits[None]).sum(axis=2)
    expected = difference <= distance
    expected &= colours[:, None, 0] == colours[None, :, 0]
    expected = np.argwhere(np.triu(expected, 1)).tolist()
    assert near_pairs(hashes, colours, distance).tolist() == expected
    assert distance < 4 or len(expected) > 20


def test_no_pictures_have_no_pairs():
    empty = np.empty((0, 8), "uint8"), np.empty((0, 48), "uint8")
    assert near_pairs(*empty, 6).shape == (0, 2)
