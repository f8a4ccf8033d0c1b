"""The embeddings of a folder of photographs."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.images import NO_HEIC
from keras_cluster_mask.search.index import Index

pytestmark = pytest.mark.any_backend


class Colors:
    """Embeds an image by its mean color, and counts what it reads."""

    def __init__(self):
        self.read = []

    def encode_image(self, paths):
        images = [np.asarray(Image.open(x).convert("RGB")) for x in paths]
        self.read += [x.name for x in paths]
        return np.array([x.mean((0, 1)) for x in images], "float32")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 20 + number), color).save(folder / f"{color}.png")
    (folder / "blue.png").rename(folder / "inside/blue.png")
    return folder


def updated(photos, version="1"):
    index = Index(Colors(), version, photos, photos.parent / "cache")
    index.update()
    return index


def test_the_nearest_photographs_come_first(photos):
    (_, first), (_, second) = updated(photos).nearest(np.float32([0, 0, 1]), 2)
    assert (first, second) == (255, 0)
    names = [name for name, _ in updated(photos).nearest(np.float32([1, 0, 0.1]), 9)]
    assert names == ["red.png", os.path.join("inside", "blue.png"), "green.png"]


def test_only_new_and_changed_photographs_are_embedded_again(photos):
    assert sorted(updated(photos).model.read) == ["blue.png", "green.png", "red.png"]
    again = updated(photos)
    assert again.model.read == []
    assert len(again.names) == len(again.embeddings) == 3
    Image.new("RGB", (50, 50), "white").save(photos / "red.png")
    Image.new("RGB", (50, 50), "white").save(photos / "white.png")
    (photos / "green.png").unlink()
    changed = updated(photos)
    assert changed.model.read == ["red.png", "white.png"]
    assert changed.names == [os.path.join("inside", "blue.png"), "red.png", "white.png"]
    np.testing.assert_allclose(changed.embeddings[1:], 255)


def test_another_model_embeds_all_photographs(photos):
    updated(photos)
    assert len(updated(photos, "2").model.read) == 3
    assert updated(photos).model.read == []


def test_an_interrupted_start_keeps_what_it_has_embedded(photos, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.search.index.AT_A_TIME", 1)
    index = Index(Colors(), "1", photos, photos.parent / "cache")
    embed = index.model.encode_image

    def until_two(paths):
        if len(index.model.read) == 2:
            raise KeyboardInterrupt
        return embed(paths)

    index.model.encode_image = until_two
    with pytest.raises(KeyboardInterrupt):
        index.update()
    again = updated(photos)
    assert len(again.names) == 3
    assert len(again.model.read) == 1


def test_a_damaged_cache_is_written_again(photos):
    file = updated(photos).file
    file.write_bytes(file.read_bytes()[:99])
    assert len(updated(photos).model.read) == 3
    assert updated(photos).model.read == []


@pytest.mark.parametrize("is_installed", [True, False])
def test_files_that_are_no_images_are_named(is_installed, photos, monkeypatch):
    if not is_installed:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
    names = {"a.avif", "b.JFIF", "\udcff.png"}
    for name in names:
        Image.new("RGB", (30, 50), "blue").save(photos / name)
    for name in ("a.HEIC", "text.jpg", "c.txt", "d.txt"):
        (photos / name).write_text("no image")
    (photos / "link.jpg").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.jpg")
    index = updated(photos)
    assert len(index.names) == 6
    assert names < {*index.names}
    assert index.left_out == [
        "Cannot be read as an image: a.HEIC",
        "Cannot be read as an image: link.jpg",
        "Cannot be read as an image: pipe.jpg",
        "Cannot be read as an image: text.jpg",
        *([] if is_installed else [NO_HEIC]),
        "Not images: .txt (2)",
    ]
