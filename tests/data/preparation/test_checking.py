import json

import pytest

from keras_cluster_mask.data.preparation import check


def test_whole_samples_are_counted(write_pairs):
    found = check([write_pairs("a.tar", 0, 5), write_pairs("b.tar", 5, 3)])
    assert (found["samples"], found["broken"]) == (8, 0)
    assert found["all_broken"] == []


def test_what_is_broken_is_named_with_its_reason(write_pairs, noise):
    photograph = noise(1, (200, 300), "JPEG")
    broken = [
        ("cut.jpg", photograph[: len(photograph) * 9 // 10]),
        ("cut.txt", b"cut short near its end"),
        ("png.png", noise(2)[:-40]),
        ("png.txt", b"cut"),
        ("silent.png", noise(3)),
        ("blank.png", noise(3)),
        ("blank.txt", b" \n"),
        ("0000.png", noise(4)),
        ("0000.txt", b"the key once more"),
    ]
    found = check(write_pairs("a.tar", 0, 4, broken))
    assert found["samples"] == 4
    reasons = {each["key"]: each["reason"] for each in found["all_broken"]}
    assert reasons == {
        "cut": "the image does not decode",
        "png": "the image does not decode",
        "silent": "no caption",
        "blank": "empty caption",
        "0000": "duplicate key",
    }
    assert found["broken"] == 5
    assert found["by_reason"]["the image does not decode"] == 2
    assert json.loads(json.dumps(found)) == found


def test_keys_of_another_shard_are_found_but_for_manifests(
    write_pairs, noise, tmp_path
):
    shards = [write_pairs("a.tar", 0, 3), write_pairs("b.tar", 2, 3)]
    (broken,) = check(shards)["all_broken"]
    assert broken["key"] == "0002"
    assert broken["shard"] == str(shards[1])
    assert broken["reason"] == "duplicate key across shards"
    assert str(shards[0]) in broken["details"]
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(noise(1))
        (tmp_path / f"{name}.csv").write_text(f"key,path,text\none,{name}.png,text\n")
    assert check(tmp_path / "?.csv")["broken"] == 0


def test_a_damaged_shard_is_one_and_others_are_read(write_pairs):
    first, second = write_pairs("a.tar", 0, 6), write_pairs("b.tar", 6, 2)
    first.write_bytes(first.read_bytes()[:5000])
    found = check([first, second])
    assert found["by_reason"] == {"damaged shard": 1}
    assert found["samples"] == 4
    assert "is damaged" in found["all_broken"][0]["details"]


def test_missing_pictures_of_a_manifest_are_broken(tmp_path, noise):
    (tmp_path / "a.png").write_bytes(noise(1))
    rows = "file_name,caption\na.png,first\na.png,second\nmissing.png,third\n"
    (tmp_path / "metadata.csv").write_text(rows)
    found = check(tmp_path)
    # Two captions of a picture are one sample.
    assert found["samples"] == 1
    assert found["by_reason"] == {"the image file cannot be read": 1}


def test_the_number_of_threads_changes_nothing(write_pairs, noise):
    broken = [("cut.png", noise(1)[:200]), ("cut.txt", b"cut")]
    shard = write_pairs("a.tar", 0, 50, broken)
    assert check(shard, num_threads=1) == check(shard, num_threads=7)


def test_other_fields_can_be_named(write_tar, noise):
    shard = write_tar("a.tar", [("1.seg.png", noise(1)), ("1.alt", b"text")])
    assert check(shard)["broken"] == 1
    assert check(shard, image_keys="seg.png", caption_key=["x", "alt"])["broken"] == 0


def test_missing_shards_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Received \(missing\)"):
        check(tmp_path / "missing.tar")
