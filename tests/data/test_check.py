import json

import pytest

from keras_cluster_mask.data import check

pytestmark = pytest.mark.any_backend


def test_intact_samples_are_counted(write_pairs):
    found = check([write_pairs("a.tar", 0, 5), write_pairs("b.tar", 5, 3)])
    assert found == {"samples": 8, "broken": 0, "by_reason": {}, "first_broken": []}


def test_broken_samples_are_listed_with_their_reasons(write_pairs, noise):
    photograph = noise(1, (200, 300), "JPEG")
    broken = [
        ("cut.jpg", photograph[: len(photograph) * 9 // 10]),
        ("cut.txt", b"truncated near its end"),
        ("png.png", noise(2)[:-40]),
        ("png.txt", b"truncated"),
        ("silent.png", noise(3)),
        ("blank.png", noise(3)),
        ("blank.txt", b" \n"),
        ("0000.png", noise(4)),
        ("0000.txt", b"a duplicate key"),
    ]
    shard = write_pairs("a.tar", 0, 4, broken)
    found = check(shard)
    assert found["samples"] == 4
    assert {each["key"]: each["reason"] for each in found["first_broken"]} == {
        "cut": "the image does not decode",
        "png": "the image does not decode",
        "silent": "no caption",
        "blank": "empty caption",
        "0000": "duplicate key",
    }
    assert {each["shard"] for each in found["first_broken"]} == {str(shard)}
    assert found["broken"] == 5
    assert found["by_reason"]["the image does not decode"] == 2
    assert json.loads(json.dumps(found)) == found


def test_the_first_hundred_broken_samples_are_listed(write_tar):
    found = check(write_tar("a.tar", [(f"{n:03}.txt", b"text") for n in range(120)]))
    assert found["broken"] == 120
    assert [each["key"] for each in found["first_broken"]] == [
        f"{n:03}" for n in range(100)
    ]


def test_a_damaged_shard_counts_once_and_the_others_are_read(write_pairs):
    first, second = write_pairs("a.tar", 0, 6), write_pairs("b.tar", 6, 2)
    first.write_bytes(first.read_bytes()[:5000])
    found = check([first, second])
    assert found["by_reason"] == {"damaged shard": 1}
    assert found["samples"] == 4
    assert "is damaged" in found["first_broken"][0]["details"]


def test_missing_images_of_a_table_are_broken(tmp_path, noise):
    (tmp_path / "a.png").write_bytes(noise(1))
    rows = "file_name,caption\na.png,first\na.png,second\nmissing.png,third\n"
    (tmp_path / "metadata.csv").write_text(rows)
    found = check(tmp_path)
    # Two captions of an image are one sample.
    assert found["samples"] == 1
    assert found["by_reason"] == {"the image file cannot be read": 1}


def test_the_result_does_not_depend_on_the_number_of_threads(write_pairs, noise):
    broken = [
        ("cut.png", noise(1)[:200]),
        ("cut.txt", b"truncated"),
        ("silent.png", noise(2)),
    ]
    shard = write_pairs("a.tar", 0, 50, broken)
    assert check(shard, num_threads=1) == check(shard, num_threads=7)


def test_fields_are_found_by_the_given_names(write_tar, noise):
    shard = write_tar("a.tar", [("1.seg.png", noise(1)), ("1.alt", b"text")])
    assert check(shard)["broken"] == 1
    assert check(shard, image_keys="seg.png", caption_key=["x", "alt"])["broken"] == 0


def test_missing_shards_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Received \(missing\)"):
        check(tmp_path / "missing.tar")
