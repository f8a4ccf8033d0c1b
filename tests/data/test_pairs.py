"""What is a pair, and what is wrong with what is none."""

import json
import pathlib

import pytest

from keras_cluster_mask.data.pairs import PairReader
from keras_cluster_mask.data.sources import find_shards

pytestmark = pytest.mark.any_backend


def read(source, **options):
    """The pairs, and the keys and reasons of what is left out."""
    reader = PairReader(find_shards(source), **options)
    told = []
    pairs = [
        pair
        for shard in reader.shards
        for pair in reader.read(shard, lambda *sample: told.append(sample[1:3]))
    ]
    given = [key for key, reason in told if reason is None]
    assert given == [pair.key for pair in pairs]
    return pairs, [(key, reason) for key, reason in told if reason]


def test_of_several_image_fields_the_first_that_is_there_counts(write_tar):
    files = [("1.png", b"png"), ("1.webp", b"webp"), ("1.txt", b"t")]
    shard = write_tar("x.tar", files)
    assert read(shard)[0][0].image == b"png"
    assert read(shard, image_keys=["jpg", "webp", "png"])[0][0].image == b"webp"
    assert read(shard, image_keys="jpg") == ([], [("1", "no image")])


def test_every_fault_has_a_reason_and_every_sample_counts(write_tar, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.data.sources.webdataset.MAX_BYTES", 9)
    files = [
        *[("1.jpg", b"j"), ("1.txt", b"t")],
        *[("2.jpg", b"j" * 10), ("2.txt", b"t")],
        *[("1.jpg", b"j"), ("1.txt", b"other")],
        *[("3.txt", b"t")],
        *[("4.jpg", b"j")],
        *[("5.jpg", b"j"), ("5.txt", b" ")],
        *[("6.jpg", b"j"), ("6.txt", b"t" * 10)],
        *[("7.other", b"x")],
        *[("8.jpg", b""), ("8.txt", b"t")],
    ]
    pairs, faults = read(write_tar("x.tar", files))
    # That no bytes are no image shows when it is decoded.
    assert [pair.key for pair in pairs] == ["1", "8"]
    assert faults == [
        ("2", "file too large"),
        ("1", "duplicate key"),
        ("3", "no image"),
        ("4", "no caption"),
        ("5", "empty caption"),
        ("6", "no caption"),
        ("7", "no image"),
    ]


def test_a_key_may_come_again_in_another_shard(write_pairs, write_tar):
    files = [("0001.jpg", b"j"), ("0001.txt", b"t")]
    source = [write_pairs("a.tar", 0, 3), write_tar("b.tar", files)]
    pairs, faults = read(source)
    assert [pair.key for pair in pairs] == ["0000", "0001", "0002", "0001"]
    assert faults == []


def test_the_last_whole_pair_before_the_damage_is_given(write_pairs):
    shard = write_pairs("x.tar", 0, 3)
    content = shard.read_bytes()
    # A pair is four blocks here.
    for blocks, whole in ((0, 0), (3, 0), (4, 1), (4.5, 1), (7, 1), (12, 3)):
        shard.write_bytes(content[: int(512 * blocks)])
        pairs, faults = read(shard)
        assert len(pairs) == whole
        assert [reason for _, reason in faults] == ["damaged shard"]


def test_a_shard_that_is_not_there_is_a_fault_of_its_own(write_pairs):
    reader = PairReader(find_shards(write_pairs("x.tar", 0, 3)))
    (shard,) = reader.shards
    faults = []
    path = pathlib.Path(shard.path)
    path.unlink()
    assert list(reader.read(shard, lambda *fault: faults.append(fault))) == []
    (fault,) = faults
    assert fault[:3] == (str(path), None, "unreadable shard")
    assert str(path) in fault[3]


@pytest.mark.parametrize("image", [None, "", 3, [], [4], {"bytes": "x"}, [["a"]]])
def test_cells_that_name_no_file_are_no_images(tmp_path, image):
    lines = [{"id": 1, "image": image, "text": "t"}, {"id": 2, "text": "t"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read(path) == ([], [("1", "no image"), ("2", "no image")])


def test_rows_of_one_image_are_all_kept(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("image,text\na.png,one\na.png,two\na.png,one\nb.png,1, 2\n")
    pairs, faults = read(path)
    assert [pair.captions for pair in pairs] == [("one",), ("two",), ("one",)]
    assert [pair.image for pair in pairs] == [str(tmp_path / "a.png")] * 3
    assert faults == [("b.png", "more cells than columns")]
