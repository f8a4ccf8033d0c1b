import os

import numpy as np
import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.samples import Fields
from keras_cluster_mask.data.shards import find_shards

pytestmark = pytest.mark.any_backend


@pytest.fixture
def images(tmp_path, encode):
    names = ("cats/2.png", "cats/1.PNG", "dogs/1.png", "3.png", ".hidden/4.png")
    for index, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((8, 8, 3), index, "uint8")))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_folder_holds_the_images_in_it_and_below(images, read_all):
    usual = ["4.tif", "5.TIFF", "6.jfif", "7.avif", "8.jpeg"]
    for name in usual:
        (images / name).write_bytes(b"image")
    (shard,) = find_shards(images)
    assert shard == f"{images}/"
    samples, faults = read_all(shard)
    assert samples == [
        *((name, {"path": name, "folder": ""}) for name in ("3.png", *usual)),
        ("cats/1.PNG", {"path": "cats/1.PNG", "folder": "cats"}),
        ("cats/2.png", {"path": "cats/2.png", "folder": "cats"}),
        ("dogs/1.png", {"path": "dogs/1.png", "folder": "dogs"}),
    ]
    assert faults == []
    assert files.beside(shard, "cats/1.PNG") == f"{images}/cats/1.PNG"


@pytest.mark.parametrize("at", ["", "memory://texts"])
def test_the_text_beside_an_image_is_its_caption(images, memory, tmp_path, at):
    (images / "cats/1.txt").write_text("a cat, é\n", "utf-8-sig")
    (images / "dogs/1.txt").write_text("")
    (images / "4.txt").write_text("no image")
    memory.put(f"{images}/", "/texts/", recursive=True)
    options = {"index_dir": tmp_path / "index"}
    for text in ("a cat, é", "another"):
        index = open_index(at or images, Fields(), **options)
        (pair,) = index.read([0])
        assert (len(index), pair.key, pair.captions) == (1, "cats/1.PNG", (text,))
        assert pair.image == (images / "cats/1.PNG").read_bytes()
        # A new text changes the stamp of the folder.
        (images / "cats/1.txt").write_text("another")
        memory.pipe("/texts/cats/1.txt", b"another")


def test_links_to_folders_and_captions_are_followed(images, tmp_path):
    (images / "dogs").rename(tmp_path / "dogs")
    (images / "dogs").symlink_to(tmp_path / "dogs")
    (images / "dogs/1.txt").symlink_to(tmp_path / "text")
    options = {"index_dir": tmp_path / "index"}
    for second, text in enumerate(("a dog", "a fox")):
        (tmp_path / "text").write_text(text)
        os.utime(tmp_path / "text", (second, second))
        (pair,) = open_index(images, Fields(), **options).read([0])
        assert (pair.key, pair.captions) == ("dogs/1.png", (text,))
    # The link is to a file that is missing.
    (tmp_path / "text").unlink()
    assert open_index(images, Fields(), **options).faults["no caption"] == 4
    (images / "cats/above").symlink_to(images)
    with pytest.raises(ValueError, match=r"`source` must not hold.*Received: .*above"):
        find_shards(images)


def test_a_single_image_is_a_shard(images, read_all):
    (shard,) = find_shards(images / "dogs/1.png")
    (sample,) = read_all(shard)[0]
    assert sample[0] == "1.png"
    assert files.beside(shard, sample[1]["path"]) == shard
    names = [f"{images}/cats/1.PNG", f"{images}/cats/2.png"]
    assert list(find_shards(f"{images}/cats/*")) == names


def test_a_new_image_changes_the_stamp_of_a_folder(images):
    before = find_shards(images)
    assert find_shards(images) == before
    (images / "cats/2.png").rename(images / "cats/5.png")
    assert find_shards(images) != before


def test_file_names_that_are_not_utf_8_are_different_keys(images, read_all):
    for name in (b"\xff.png", b"\xfe.png"):
        with open(os.path.join(os.fsencode(images), name), "wb") as file:
            file.write(b"image")
    (shard,) = find_shards(images)
    samples, _ = read_all(shard)
    assert len({key for key, _ in samples}) == 6
    for _, fields in samples:
        assert os.path.exists(files.beside(shard, fields["path"]))
