import copy
import functools
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from keras_cluster_mask.data import images
from keras_cluster_mask.data.images import EncodedImage, Images, UnreadableImage

pytestmark = pytest.mark.any_backend

DRAWS = np.random.default_rng(0).random((200, 4))


def cut(content, size=(8, 8), training=False, seed=0, **options):
    return Images(size, training, **options)(content, np.random.default_rng(seed))


@pytest.fixture
def limit(monkeypatch):
    """Sets Pillow's limit on the pixels of an image."""
    return functools.partial(monkeypatch.setattr, Image, "MAX_IMAGE_PIXELS")


def smooth_image(height, width, channels=3, seed=0):
    """Low-frequency noise, which changes as slowly as a photograph."""
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), "uint8")
    return np.array(Image.fromarray(grid).resize((width, height), Image.BICUBIC))


def whole(content, **options):
    """The whole image in its own size, on white."""
    return cut(content, EncodedImage(content, None).size, **options)


def over_white(image):
    white = Image.new("RGBA", image.size, "white")
    image = image.convert("RGBA")
    return np.array(Image.alpha_composite(white, image).convert("RGB")).astype(int)


# === Modes and orientations ===


@pytest.mark.parametrize("options", [{}, {"training": True, "resize": "squash"}])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_of_every_mode_is_blended_with_white(mode, options, encode):
    image = Image.fromarray(smooth_image(20, 30, 4)).convert(mode)
    actual = whole(encode(image), **options)
    assert actual.dtype == "uint8"
    assert np.abs(actual.astype(int) - over_white(image)).max() <= 1


def test_a_transparent_palette_is_blended_with_white(encode):
    palette = Image.new("P", (4, 4))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putpixel((1, 2), 1)
    for format in ("PNG", "GIF"):
        image = whole(encode(palette, format, transparency=0))
        assert image[2, 1].tolist() == [200, 100, 0]
        assert image[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["JPEG", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_other_modes_and_formats_are_decoded_as_by_pillow(mode, format, encode):
    if mode == ("P" if format == "JPEG" else "CMYK"):
        pytest.skip("the format has no such mode")
    image = Image.fromarray(smooth_image(21, 30)).convert(mode)
    content = encode(image, format)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(whole(content), np.array(expected))


@pytest.mark.parametrize("options", [{}, {"transparency": 5000}])
def test_sixteen_bits_of_gray_become_eight(encode, options):
    levels = np.arange(0, 65536, 256, dtype="uint16").reshape(16, 16)
    actual = whole(encode(levels, **options))
    assert np.abs(actual[..., 0].astype(int) - levels / 257.0).max() <= 0.5
    assert (actual[..., 0] == actual[..., 2]).all()


def test_webp_and_the_first_image_of_an_animation_are_decoded(encode):
    array = smooth_image(20, 30, 3)
    np.testing.assert_array_equal(whole(encode(array, "WEBP", lossless=True)), array)
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        animation = encode(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = whole(animation)[0, 0].tolist()
        assert red > 250
        assert max(green, blue) < 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_exif_orientation_is_applied(orientation, format, order, encode):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {}
    content = encode(smooth_image(24, 16), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert EncodedImage(content, None).size == upright.size[::-1]
    np.testing.assert_array_equal(whole(content), np.array(upright))


def test_the_orientation_of_a_png_may_come_after_its_pixels(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = smooth_image(24, 16)
    content = encode(image, exif=exif)
    # A chunk starts with its length, of four bytes, before its name.
    start, end = (content.index(name) - 4 for name in (b"eXIf", b"IDAT"))
    last = content.index(b"IEND") - 4
    moved = content[:start] + content[end:last] + content[start:end] + content[last:]
    for each in (moved, Image.open(io.BytesIO(moved))):
        assert EncodedImage(each, None).size == (16, 24)
        np.testing.assert_array_equal(whole(each), np.rot90(image, -1))


def test_broken_exif_data_is_ignored(encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    tagged = bytearray(encode(smooth_image(8, 16), "JPEG", exif=exif))
    assert EncodedImage(bytes(tagged), None).size == (16, 8)
    start = tagged.index(b"Exif\0\0")
    tagged[start + 6 : start + 14] = b"\xff" * 8
    assert EncodedImage(bytes(tagged), None).size == (8, 16)


# === Images that do not decode ===


def test_damaged_images_are_unreadable(encode):
    jpeg = encode(smooth_image(64, 64), "JPEG")
    png = encode(smooth_image(64, 64))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    for content in (b"", b"GIF89a", jpeg[:400], png[: len(png) // 2], bytes(flipped)):
        with pytest.raises(UnreadableImage, match="cannot be decoded"):
            cut(content, training=True)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_before_they_are_decoded(encode, limit):
    content = encode(np.zeros((26, 40), "uint8"))
    # Pillow itself refuses images of more than twice its limit.
    for pixels in (1039, 519):
        limit(pixels)
        with pytest.raises(UnreadableImage, match="too many pixels"):
            cut(content, training=True)
    for pixels in (1040, None):
        limit(pixels)
        assert cut(content, training=True).shape == (8, 8, 3)


def test_the_limit_is_that_with_which_a_dataset_was_made(encode, limit):
    limit(1000)
    images = Images(8, True)
    limit(None)
    for each in (images, copy.deepcopy(images)):
        with pytest.raises(UnreadableImage, match="too many pixels"):
            each(encode(np.zeros((26, 40), "uint8")), np.random.default_rng(0))


def test_a_line_is_not_enlarged_to_gigabytes(encode, limit):
    content = encode(np.zeros((2000, 1, 3), "uint8"))
    limit(4_000_000)
    assert cut(content, training=True).shape == (8, 8, 3)
    with pytest.raises(UnreadableImage, match="too narrow"):
        cut(content, (64, 64))
    limit(None)
    assert cut(content, (64, 64)).shape == (64, 64, 3)


def test_too_little_memory_is_no_damaged_image(encode, monkeypatch):
    def fail(*args):
        raise MemoryError

    content = encode(smooth_image(8, 8))
    for name in ("PIL.Image.open", "PIL.ImageFile.ImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(MemoryError):
                cut(content)


# === Center crops ===


@pytest.mark.parametrize(
    ("resize", "size"),
    [("crop", (64, 64)), ("crop", (33, 33)), ("squash", (64, 40))],
)
@pytest.mark.parametrize(
    "shape", [(160, 213), (213, 160), (97, 300), (50, 40), (64, 64), (64, 40), (20, 10)]
)
def test_images_of_evaluation_are_torchvisions(shape, resize, size, encode):
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(smooth_image(*shape))
    edge, content = size[0] if resize == "crop" else size, encode(image)
    resized = transforms.Resize(edge, transforms.InterpolationMode.BICUBIC)(image)
    expected = np.array(transforms.CenterCrop(size)(resized))
    np.testing.assert_array_equal(cut(content, size, resize=resize), expected)
    if resize == "squash":
        # Training, which is faster, differs by rounding.
        found = cut(content, size, resize=resize, training=True).astype(int)
        assert np.abs(found - expected).mean() < 0.3


def test_the_center_crop_covers_a_size_that_is_not_square(encode):
    # A gray level for each column, of which the middle half must remain.
    array = np.tile(np.arange(200, dtype="uint8")[None, :, None], (50, 1, 3))
    actual = cut(encode(array), (50, 100))
    np.testing.assert_array_equal(actual, array[:, 50:150])
    standing = np.ascontiguousarray(array.transpose(1, 0, 2))
    tall = cut(encode(standing), (100, 50))
    np.testing.assert_array_equal(tall, standing[50:150])


# === Random crops ===


def boxes(size, image_size=(64, 64), **options):
    found = [images.random_box(size, image_size, draw, **options) for draw in DRAWS]
    return np.array(found, float)


def test_random_crops_keep_to_the_ranges_of_area_and_ratio():
    top, left, height, width = boxes((1000, 1200), scale=(0.2, 0.5)).T
    areas, ratios = height * width / (1000 * 1200), width / height
    assert 0.199 < areas.min() < 0.22
    assert 0.48 < areas.max() < 0.501
    assert 0.745 < ratios.min() < 0.77
    assert 1.30 < ratios.max() < 1.34
    # Places reach from edge to edge.
    assert min(top.min(), left.min()) >= 0
    assert max(top.min(), left.min()) <= 20
    assert 980 < (top + height).max() <= 1000
    assert 1180 < (left + width).max() <= 1200


def test_a_crop_that_does_not_fit_is_reduced_and_not_distorted():
    _, _, height, width = boxes((20, 200), scale=(0.9, 1.0)).T
    assert (width / height).min() > 0.7
    assert (width / height).max() < 1.4


def test_the_ratio_is_relative_to_the_requested_size():
    scale = (0.3, 0.3)
    square, wide = (
        boxes((1200, 1200), size, scale=scale).T for size in ((64, 64), (32, 64))
    )
    np.testing.assert_allclose(wide[3] / wide[2], 2 * square[3] / square[2], rtol=0.02)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(700, 500), (1400, 1000)])
def test_reducing_a_jpeg_while_decoding_hardly_changes_a_pixel(
    size, orientation, encode
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(smooth_image(*size), "JPEG", quality=90, exif=exif)
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    exact = image.resize((64, 64), Image.BICUBIC, box=(21, 37, 471, 437))
    exact = np.array(exact).astype(int)
    quick = EncodedImage(content, None).part((37, 21, 400, 450), (64, 64)).astype(int)
    assert np.abs(quick - exact).mean() < 1


# === Transforms ===


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_transform_changes_each_crop_in_place_with_a_seeded_generator(
    mode, resize, encode
):
    content = encode(Image.fromarray(smooth_image(40, 40)).convert(mode))

    def transform(image, generator):
        assert image.flags.c_contiguous
        image[:4] = generator.integers(0, 100)
        return image

    levels = set()
    for seed in range(8):
        options = {"seed": seed, "training": True, "resize": resize}
        plain = cut(content, **options)
        changed = cut(content, image_transform=transform, **options)
        np.testing.assert_array_equal(changed[4:], plain[4:])
        levels.add(*np.unique(changed[:4]))
        again = cut(content, image_transform=transform, **options)
        np.testing.assert_array_equal(changed, again)
    assert len(levels) > 4


@pytest.mark.parametrize("change", [lambda i, _: i[1:], lambda i, _: i / 255.0])
def test_a_transform_that_returns_another_shape_or_type_is_an_error(encode, change):
    with pytest.raises(ValueError, match=r"`image_transform` must return.*Received"):
        cut(encode(smooth_image(8, 8)), training=True, image_transform=change)


# === Resizing ===


def test_photographs_are_resized_as_by_pillow():
    image = Image.fromarray(pytest.importorskip("skimage.data").astronaut())
    box = (7.3, 11.0, image.width - 30.6, image.height - 2.0)
    actual = images.resize(image, (112, 96), box)
    expected = np.asarray(image.resize((96, 112), Image.Resampling.BICUBIC, box))
    assert actual.shape == (112, 96, 3)
    assert actual.dtype == "uint8"
    difference = np.abs(actual.astype(int) - expected)
    assert difference.mean() < 0.3
    assert np.mean(difference > 1) < 0.01


def test_edges_between_pixels_make_no_border():
    image = Image.fromarray(np.full((20, 20, 3), 77, "uint8"))
    assert (images.resize(image, (8, 8), (0.5, 0.2, 19.3, 19.9)) == 77).all()
