import numpy as np
import pytest

from keras_cluster_mask.data import ImageTextBatches
from keras_cluster_mask.data.sources import find_shards, folder, read_samples

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


def test_a_folder_without_a_manifest_stands_for_the_images_in_it(images):
    samples = [s for shard in find_shards(images) for s in shard.read()]
    keys = [sample["__key__"] for sample in samples]
    assert keys == ["3.png", "cats/1.PNG", "cats/2.png", "dogs/1.png"]
    assert [s["folder"] for s in samples] == ["images", "cats", "cats", "dogs"]
    assert [s["path"] for s in samples] == [f"{images}/{key}" for key in keys]
    assert list(read_samples(images, {"folder"}))[1] == {
        "__key__": "cats/1.PNG",
        "folder": "cats",
    }


def test_images_are_sources_too(images):
    (shard,) = find_shards([images / "dogs/1.png"])
    assert [s["__key__"] for s in shard.read()] == ["1.png"]
    names = [shard.path for shard in find_shards(f"{images}/cats/*")]
    assert names == [f"{images}/cats/1.PNG", f"{images}/cats/2.png"]


def test_a_manifest_goes_before_the_images(images):
    (images / "metadata.csv").write_text("file_name,caption\n3.png,three\n")
    assert [s["__key__"] for s in find_shards(images)[0].read()] == ["3.png"]


def test_a_large_folder_is_several_shards(images, monkeypatch):
    monkeypatch.setattr(folder, "IMAGES", 3)
    shards = find_shards(images)
    assert [len(list(shard.read())) for shard in shards] == [3, 1]
    assert [str(s) for s in shards] == [
        f"{images}/",
        f"{images}/ from image 3",
    ]


def test_names_that_are_no_text_are_different_keys(images):
    import os

    content = (images / "3.png").read_bytes()
    for name in (b"\xff.png", b"\xfe.png"):
        path = os.path.join(os.fsencode(images), name)
        with open(path, "wb") as file:
            file.write(content)
    keys = {s["__key__"] for shard in find_shards(images) for s in shard.read()}
    assert len(keys) == 6


def test_a_folder_in_memory(encode):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    content = encode(np.zeros((8, 8, 3), "uint8"))
    for name in ("b/1.png", "a/1.png"):
        system.pipe_file(f"/images/{name}", content)
    (shard,) = find_shards("memory://images")
    assert [s["__key__"] for s in shard.read()] == ["a/1.png", "b/1.png"]
    assert [s["folder"] for s in shard.read()] == ["a", "b"]


def test_a_folder_without_images_is_an_error_that_says_what_may_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv.*Received a folder"):
        find_shards(tmp_path)


def test_batches_name_the_files_of_their_images(images, write_pairs):
    options = {"training": False, "include_paths": True}
    sources = [images, images / "cats" / "2.png", write_pairs("a.tar", 0, 2)]
    batches = ImageTextBatches(sources, None, 8, 9, **options)
    assert batches.element_spec["paths"].dtype == "string"
    (batch,) = batches
    names = ("3.png", "cats/1.PNG", "cats/2.png", "dogs/1.png", "cats/2.png")
    expected = [f"{images}/{name}".encode() for name in names] + [b"", b""]
    assert sorted(batch["paths"]) == sorted(expected)
