"""HEIC, as phones write it: read wherever images are read, if pillow-heif is there."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

import keras_cluster_mask as kcm
from keras_cluster_mask.data import images
from keras_cluster_mask.data.images import EncodedImage, UnreadableImage
from tests.data.test_images import cut, smooth_image, whole
from tests.helpers import assert_close, letters_as_tokens, tiny_clip

pytestmark = pytest.mark.any_backend
pillow_heif = pytest.importorskip("pillow_heif")
LOSSLESS = {"quality": -1, "chroma": "444", "matrix_coefficients": 0}


@pytest.fixture(autouse=True)
def first_heic(monkeypatch):
    """As if no HEIC had been opened in this process."""
    # All other formats stay registered after a test.
    Image.init()
    monkeypatch.setattr(Image, "ID", [x for x in Image.ID if x != "HEIF"])


def heic(image, orientation=1, **options):
    """Encodes an image, without loss unless there are other options."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[images.ORIENTATION] = orientation
    options = {"exif": exif.tobytes(), **(options or LOSSLESS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "ID", [*Image.ID])
        pillow_heif.register_heif_opener()
        Image.fromarray(image).save(file, "HEIF", **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_heic_is_turned_upright_once(orientation, encode):
    image = smooth_image(30, 50)
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    png = encode(image, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(png))))
    content = heic(image, orientation)
    assert EncodedImage(content, None).size == upright.shape[:2]
    np.testing.assert_array_equal(whole(content), upright)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_heic_is_decoded_as_by_pillow_heif(channels):
    content = heic(smooth_image(40, 60, channels), quality=50)
    theirs = pillow_heif.open_heif(content).to_pillow().convert("RGBA")
    white = Image.new("RGBA", theirs.size, "white")
    expected = np.array(Image.alpha_composite(white, theirs).convert("RGB"))
    assert np.abs(whole(content).astype(int) - expected).max() <= channels - 3


def test_a_small_part_is_not_read_from_the_thumbnail():
    image = smooth_image(200, 300)
    options = {"size": (40, 60), "training": True, "resize": "squash"}
    with_thumbnail = heic(image, **LOSSLESS, thumbnails=[100])
    assert pillow_heif.open_heif(with_thumbnail).info["thumbnails"] == [100]
    np.testing.assert_array_equal(
        cut(with_thumbnail, **options), cut(heic(image), **options)
    )


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["folder", "table", "tar"])
def test_a_dataset_reads_heic(kind, num_workers, tmp_path, write_tar, write_rows):
    photos = [smooth_image(16, 16, seed=seed) for seed in range(2)]
    files = [(f"IMG_{n}.HEIC", heic(photo)) for n, photo in enumerate(photos)]
    if kind == "tar":
        texts = [(f"IMG_{n}.txt", b"a photo") for n in range(2)]
        pairs = [file for pair in zip(files, texts) for file in pair]
        source = write_tar("photos.tar", pairs)
    else:
        source = tmp_path / "photos"
        source.mkdir()
        for name, content in files:
            (source / name).write_bytes(content)
    if kind == "table":
        write_rows(
            "photos/metadata.csv",
            [{"file_name": name, "caption": "a photo"} for name, _ in files],
        )
    dataset = kcm.data.image_text_dataset(
        source, None, 16, 2, training=False, num_workers=num_workers
    )
    (batch,) = dataset
    np.testing.assert_array_equal(batch["images"], photos)


def test_a_model_embeds_and_searches_heic(tmp_path):
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(), tokenizer=letters_as_tokens)
    photos = [smooth_image(16, 16, seed=seed) for seed in range(3)]
    paths = [tmp_path / f"{n}.heic" for n in range(3)]
    for path, photo in zip(paths, photos):
        path.write_bytes(heic(photo))
    assert_close(model.encode_image(paths), model.encode_image(np.stack(photos)))
    assert {*model.search(paths, "a dog", k=3)} == {*paths}


def test_without_pillow_heif_the_error_says_what_to_install(tmp_path, monkeypatch):
    content = heic(smooth_image(16, 16))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImage, match="pip install pillow-heif"):
        whole(content)
    (tmp_path / "photo.heic").write_bytes(content)
    (tmp_path / "photo.txt").write_text("a photo")
    assert [*kcm.data.check(tmp_path)["by_reason"]] == [images.NO_HEIC]
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    with pytest.raises(ValueError, match=r"photo\.heic.*pip install pillow-heif"):
        model.encode_image([tmp_path / "photo.heic"])


@pytest.mark.parametrize("end", [12, 40, -40])
def test_a_damaged_heic_does_not_decode(end):
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        whole(heic(smooth_image(64, 64))[:end])
