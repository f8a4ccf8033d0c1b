import os

import numpy as np
import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.paths import find_files
from tests.data.reading import read_samples

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
    usual = ["4.tif", "5.TIFF", "6.jfif", "7.avif", "8.jpeg", "9.HEIC"]
    for name in usual:
        (images / name).write_bytes(b"image")
    (shard,) = find_files(images)
    assert shard == f"{images}/"
    samples, faults = read_all(shard)
    assert samples == [
        *((name, {"path": name}) for name in ("3.png", *usual)),
        ("cats/1.PNG", {"path": "cats/1.PNG", "folder": "cats"}),
        ("cats/2.png", {"path": "cats/2.png", "folder": "cats"}),
        ("dogs/1.png", {"path": "dogs/1.png", "folder": "dogs"}),
    ]
    assert faults == []


@pytest.mark.parametrize("at", ["", "memory://texts"])
def test_the_text_beside_an_image_is_its_caption(images, memory, at):
    (images / "cats/1.txt").write_text("a cat, é\n", "utf-8-sig")
    (images / "dogs/1.txt").write_text("")
    (images / "4.txt").write_text("no image")
    memory.put(f"{images}/", "/texts/", recursive=True)
    for text in ("a cat, é", "another"):
        (pair,), faults = read_samples(at or images, with_images=True)
        assert (len(faults), pair.key, pair.captions) == (3, "cats/1.PNG", (text,))
        assert pair.image == (images / "cats/1.PNG").read_bytes()
        (images / "cats/1.txt").write_text("another")
        memory.pipe("/texts/cats/1.txt", b"another")


def test_links_to_folders_and_captions_are_followed(images, tmp_path):
    (images / "dogs").rename(tmp_path / "dogs")
    (images / "dogs").symlink_to(tmp_path / "dogs")
    (images / "dogs/1.txt").symlink_to(tmp_path / "text")
    (tmp_path / "text").write_text("a dog")
    (pair,), faults = read_samples(images)
    assert (pair.key, pair.captions) == ("dogs/1.png", ("a dog",))
    # The link is to a file that is missing.
    (tmp_path / "text").unlink()
    pairs, broken = read_samples(images)
    assert (pairs, len(broken)) == ([], 4)
    assert {*broken} - {*faults} == {("dogs/1.png", "the caption cannot be read")}


def test_a_link_to_a_folder_above_is_not_followed(images):
    expected = read_samples(images)
    (images / "cats/again").symlink_to(images)
    assert read_samples(images) == expected


def test_a_linked_file_has_the_version_of_its_target(tmp_path):
    links, target = tmp_path / "links", tmp_path / "target.csv"
    links.mkdir()
    (links / "captions.csv").symlink_to(target)
    versions = set()
    for content, date in (("a,b", 1), ("c,d", 2)):
        target.write_text(content)
        os.utime(target, (date, date))
        for source in (links, links / "*.csv"):
            versions |= {*find_files(source).items()}
    assert len(versions) == 2


def test_a_single_image_is_a_source(images, read_all):
    (shard,) = find_files(images / "dogs/1.png")
    (sample,) = read_all(shard)[0]
    assert sample[0] == "1.png"
    assert files.beside(shard, sample[1]["path"]) == shard
    names = [f"{images}/cats/1.PNG", f"{images}/cats/2.png"]
    assert list(find_files(f"{images}/cats/*")) == names


def test_file_names_that_are_not_utf_8_are_different_keys(images, read_all):
    for name in (b"\xff.png", b"\xfe.png"):
        with open(os.path.join(os.fsencode(images), name), "wb") as file:
            file.write(b"image")
    (shard,) = find_files(images)
    samples, _ = read_all(shard)
    assert len({key for key, _ in samples}) == 6
    for _, fields in samples:
        assert os.path.exists(files.beside(shard, fields["path"]))
