import io

import numpy as np
import pytest
from PIL import Image, ImageOps

tf = pytest.importorskip("tensorflow")

from keras_cluster_mask.data import backgrounds, images  # noqa: E402


def smooth_picture(height, width, channels=3, seed=0):
    """A photograph's slow changes: low-frequency noise."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), "uint8")
    return np.array(Image.fromarray(grid).resize((width, height), Image.BICUBIC))


def seed(number):
    return tf.constant([number, 0], "int64")


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_of_every_kind_of_channels_is_laid_over_white(mode, encode):
    picture = Image.fromarray(smooth_picture(20, 30, 4)).convert(mode)
    white = Image.new("RGBA", picture.size, "white")
    expected = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    actual = backgrounds.composite(images.decode(encode(picture)))
    assert actual.dtype == "uint8"
    difference = np.abs(actual.numpy().astype(int) - np.array(expected))
    assert difference.max() <= 1


def test_a_transparent_palette_png_is_laid_over_white(encode):
    picture = Image.new("P", (4, 4))
    picture.putpalette([10, 20, 30, 200, 100, 0])
    picture.putpixel((1, 2), 1)
    image = images.decode(encode(picture, transparency=0))
    image = backgrounds.composite(image, "white").numpy()
    assert image[2, 1].tolist() == [200, 100, 0]
    assert image[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_decoded_exactly_as_pillow_does(mode, encode):
    content = encode(Image.fromarray(smooth_picture(50, 70)).convert(mode), "JPEG")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    actual = backgrounds.composite(images.decode(content))
    np.testing.assert_array_equal(actual, np.array(expected))


def test_webp_and_the_first_picture_of_an_animation_are_decoded(encode):
    array = smooth_picture(20, 30, 4)
    webp = encode(array, "WEBP", lossless=True, exact=True)
    np.testing.assert_array_equal(images.decode(webp), array)
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(animation).numpy()[0, 0].tolist() == [255, 0, 0]


def test_a_background_colour_shows_through_in_parts_of_alpha():
    image = np.zeros((1, 3, 4), "uint8")
    image[0, :, 0] = 255
    image[0, :, 3] = [0, 51, 255]
    actual = backgrounds.composite(image, (0, 100, 200)).numpy()
    assert actual[0].tolist() == [[0, 100, 200], [51, 80, 160], [255, 0, 0]]


def test_random_backgrounds_vary_and_follow_their_seed():
    image = np.zeros((48, 40, 4), "uint8")
    image[10:20, 10:20] = 255
    draw = tf.function(lambda s: backgrounds.composite(image, "random", s))
    pictures = np.stack([draw(seed(number)).numpy() for number in range(60)])
    again = np.stack([draw(seed(number)).numpy() for number in range(60)])
    np.testing.assert_array_equal(pictures, again)
    assert (pictures[:, 10:20, 10:20] == 255).all()
    assert len(np.unique(pictures.reshape(60, -1), axis=0)) == 60
    # A third is plain; of the others the textures change more between neighbours.
    changes = np.abs(np.diff(pictures[:, 20:].astype(int), axis=2)).mean(axis=(1, 2, 3))
    assert 8 <= np.sum(changes == 0) <= 32
    assert 8 <= np.sum((changes > 0) & (changes < 8)) <= 36
    assert np.sum(changes >= 8) >= 8
    # Colours are spread over the whole range.
    assert 90 < pictures[:, 30:].mean() < 165
    assert pictures[:, 30:].std() > 50


def test_of_a_list_of_backgrounds_each_is_drawn_as_often():
    image = np.zeros((4, 4, 4), "uint8")
    choices = ["white", (9, 8, 7), "random"]
    draw = tf.function(lambda s: backgrounds.composite(image, choices, s))
    pictures = np.stack([draw(seed(number)).numpy() for number in range(90)])
    white = np.sum((pictures == 255).all(axis=(1, 2, 3)))
    given = np.sum((pictures == (9, 8, 7)).all(axis=(1, 2, 3)))
    # Five deviations of a binomial of 90 and a third.
    assert 8 <= white <= 52
    assert 8 <= given <= 52
    assert 8 <= 90 - white - given <= 52


def test_a_seed_is_demanded_for_random_backgrounds_and_colours_are_checked():
    image = np.zeros((4, 4, 4), "uint8")
    with pytest.raises(ValueError, match="`seed`"):
        backgrounds.composite(image, "random")
    with pytest.raises(ValueError, match="`seed`"):
        backgrounds.composite(image, ["white", (0, 0, 0)])
    for wrong in ("black", (1, 2), (0, 0, 256), None, [], ["white", "black"]):
        with pytest.raises(ValueError, match=r"`background`.*Received"):
            backgrounds.composite(image, wrong)


@pytest.mark.parametrize(
    "shape", [(160, 213), (213, 160), (97, 300), (50, 40), (64, 64)]
)
@pytest.mark.parametrize("size", [64, 33])
def test_the_center_crop_is_torchvisions(shape, size):
    transforms = pytest.importorskip("torchvision.transforms")
    array = smooth_picture(*shape)
    reference = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    expected = np.array(reference(Image.fromarray(array))).astype(int)
    actual = images.center_crop(array, size).numpy().astype(int)
    assert actual.shape == (size, size, 3)
    assert np.abs(actual - expected).mean() < 0.5
    assert np.abs(actual - expected).max() <= 3


def test_the_center_crop_is_antialiased():
    # Lines of one pixel: a resize that only picks pixels would show them as patterns.
    array = np.zeros((256, 256, 3), "uint8")
    array[:, ::3] = 255
    actual = images.center_crop(array, 32).numpy()[:, 2:-2]
    assert np.abs(actual.astype(int) - 85).max() <= 4


def test_the_center_crop_covers_a_size_that_is_not_square():
    # A grey level for each column: the middle half of them must be left.
    array = np.tile(np.arange(200, dtype="uint8")[None, :, None], (50, 1, 3))
    actual = images.center_crop(array, (50, 100)).numpy()
    np.testing.assert_array_equal(actual, array[:, 50:150])
    tall = images.center_crop(array.transpose(1, 0, 2), (100, 50)).numpy()
    np.testing.assert_array_equal(tall, array[:, 50:150].transpose(1, 0, 2))


def crops(shape, count, **options):
    """Place and size of random crops, read off an image of its own coordinates."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    array = np.stack([rows, columns, 0 * rows], axis=-1).astype("uint8")
    size = options.pop("size", 64)
    cut = tf.function(lambda s: images.random_resized_crop(array, size, s, **options))
    for number in range(count):
        part = cut(seed(number)).numpy().astype(int)
        middle = part.shape[0] // 2, part.shape[1] // 2
        top, bottom = part[0, middle[1], 0], part[-1, middle[1], 0]
        left, right = part[middle[0], 0, 1], part[middle[0], -1, 1]
        yield top, bottom + 1, left, right + 1


def test_random_crops_keep_to_the_ranges_of_area_and_ratio():
    found = np.array(list(crops((100, 120), 200, scale=(0.2, 0.5))), float)
    heights, widths = found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]
    areas, ratios = heights * widths / (100 * 120), widths / heights
    assert 0.18 < areas.min() < 0.24
    assert 0.44 < areas.max() < 0.53
    assert 0.70 < ratios.min() < 0.80
    assert 1.25 < ratios.max() < 1.40
    # Places reach from edge to edge.
    assert found[:, 0].min() <= 1
    assert found[:, 1].max() >= 99
    assert found[:, 2].min() <= 1
    assert found[:, 3].max() >= 119


def test_a_crop_that_does_not_fit_gets_smaller_rather_than_distorted():
    found = np.array(list(crops((20, 200), 50, scale=(0.9, 1.0))), float)
    ratios = (found[:, 3] - found[:, 2]) / (found[:, 1] - found[:, 0])
    assert ratios.min() > 0.65
    assert ratios.max() < 1.5


def test_the_ratio_is_that_of_the_size_asked_for():
    options = {"size": (32, 64), "scale": (0.3, 0.3), "ratio": (1, 1)}
    found = np.array(list(crops((120, 120), 30, **options)), float)
    ratios = (found[:, 3] - found[:, 2]) / (found[:, 1] - found[:, 0])
    np.testing.assert_allclose(ratios, 2, atol=0.15)


def test_random_crops_follow_their_seed_and_flip_only_if_asked():
    found = list(crops((100, 120), 40))
    assert found == list(crops((100, 120), 40))
    assert len(set(found)) > 30
    assert all(left < right for _, _, left, right in found)
    flipped = [left > right for _, _, left, right in crops((99, 99), 40, flip=True)]
    assert 8 < sum(flipped) < 32


def test_a_whole_image_of_the_right_size_is_not_touched():
    array = smooth_picture(40, 40)
    actual = images.random_resized_crop(array, 40, seed(0), (1, 1), (1, 1)).numpy()
    np.testing.assert_array_equal(actual, array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_photographs_are_turned_upright(orientation, order):
    picture = Image.fromarray(smooth_picture(24, 16))
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif, quality=95)
    content = file.getvalue()
    assert images.exif_orientation(content) == orientation
    expected = np.array(ImageOps.exif_transpose(Image.open(file))).astype(int)
    actual = images.upright(images.decode(content), tf.constant(orientation)).numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2


def test_broken_exif_data_means_upright(encode):
    plain = encode(smooth_picture(8, 8), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    tagged = encode(smooth_picture(8, 8), "JPEG", exif=exif)
    start = tagged.index(b"Exif\0\0")
    for content in (plain, b"", tagged[: start + 12], tagged[: start + 18]):
        assert images.exif_orientation(content) == 1
    assert images.exif_orientation(tagged) == 6


def test_image_sizes_are_checked():
    assert images.height_and_width(8) == (8, 8)
    assert images.height_and_width([8, 16]) == (8, 16)
    for wrong in (0, (8,), (8, -1), "8", 8.0, None):
        with pytest.raises(ValueError, match=r"`image_size`.*Received"):
            images.height_and_width(wrong)
