"""Which samples are pairs, and what is wrong with the others."""

import json

import pytest

from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import Fault, PairReader

pytestmark = pytest.mark.any_backend


def read(source, with_images=False, **options):
    """The pairs, and the keys and reasons of all broken samples."""
    index = open_index(source, PairReader(**options))
    found = [*index.read(range(len(index)), with_images)]
    faults = [*index.examples(9), *(each for each in found if isinstance(each, Fault))]
    pairs = [each for each in found if not isinstance(each, Fault)]
    return pairs, [(fault.key, fault.reason) for fault in faults]


def test_of_several_image_fields_the_first_that_exists_is_used(write_tar):
    files = [("1.png", b"png"), ("1.webp", b"webp"), ("1.txt", b"t")]
    shard = write_tar("x.tar", files)
    assert read(shard)[0][0].image == b"png"
    assert read(shard, image_keys=["jpg", "webp", "png"])[0][0].image == b"webp"
    assert read(shard, image_keys="jpg") == ([], [("1", "no image")])


def test_the_field_filename_holds_the_image_unless_another_holds_its_path():
    row = {"filename": "a.png", "text": "t"}
    for fields, path in (row, "a.png"), (row | {"filepath": "b/a.png"}, "b/a.png"):
        ((pair,), _) = read([fields])
        assert pair.path == path


def test_a_key_may_be_repeated_in_another_shard(write_pairs, write_tar):
    files = [("0001.jpg", b"j"), ("0001.txt", b"t")]
    source = [write_pairs("a.tar", 0, 3), write_tar("b.tar", files)]
    pairs, faults = read(source)
    assert [pair.key for pair in pairs] == ["0000", "0001", "0002", "0001"]
    assert faults == []


@pytest.mark.parametrize("image", [None, "", 3, [], [4], {"bytes": "x"}, [["a"]]])
def test_cells_that_name_no_file_are_no_images(tmp_path, image):
    lines = [{"id": 1, "image": image, "text": "t"}, {"id": 2, "text": "t"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    pairs, faults = read(path)
    assert pairs == []
    assert sorted(faults) == [("1", "no image"), ("2", "no image")]
