import json
import os

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data.preparation import deduplicate
from tests.data.preparation.test_converting import run_until_killed


@pytest.fixture
def source(write_tar, photographs, encode, noise):
    """Photographs with copies: of the bytes (b), and alike (c, d)."""
    astronaut = photographs["astronaut"]
    half = astronaut.resize([side // 2 for side in astronaut.size])
    contents = {
        "a": encode(astronaut, "JPEG"),
        "cut": noise(0)[:200],
        "b": encode(astronaut, "JPEG"),
        "other": encode(photographs["coffee"], "JPEG"),
        "c": encode(astronaut, "JPEG", quality=30),
        "d": encode(half),
        "e": encode(photographs["rocket"]),
    }
    files = []
    for key, content in contents.items():
        files += [(f"{key}.img", content), (f"{key}.txt", f"caption {key}".encode())]
    files[-1] = ("e.txt", b"caption a")
    return write_tar("source.tar", files)


FIELD = {"image_keys": "img"}


def groups(found):
    return {
        group["kept"]["key"]: [
            (each["key"], each["bits"]) for each in group["left_out"]
        ]
        for group in found["groups"]
    }


def test_the_same_bytes_are_kept_once(source, tmp_path, pairs_of):
    found = deduplicate(source, tmp_path / "out.tar", **FIELD)
    assert groups(found) == {"a": [("b", None)]}
    assert (found["kept"], found["duplicates"], found["broken"]) == (5, 1, 1)
    assert found["written"]["samples"] == 5
    keys = [key for key, *_ in pairs_of(tmp_path / "out.tar")]
    assert keys == ["a", "other", "c", "d", "e"]


def test_what_looks_alike_is_kept_once(source, tmp_path, pairs_of):
    found = deduplicate(source, tmp_path / "out.tar", near=True, **FIELD)
    (members,) = groups(found).values()
    assert [key for key, _ in members] == ["b", "c", "d"]
    assert members[0][1] is None
    assert all(0 <= bits <= 6 for _, bits in members[1:])
    assert [key for key, *_ in pairs_of(tmp_path / "out.tar")] == ["a", "other", "e"]


def test_captions_may_have_to_be_the_same(write_tar, photographs, encode):
    image = photographs["coffee"]
    small = encode(image.resize((100, 80)))
    files = []
    for key, content, text in (
        ("1", encode(image), b"coffee"),
        ("2", encode(image), b"a cup"),
        ("3", small, b"coffee"),
        ("4", encode(image), b"a cup"),
    ):
        files += [(f"{key}.png", content), (f"{key}.txt", text)]
    shard = write_tar("x.tar", files)
    assert list(groups(deduplicate(shard, near=True))) == ["1"]
    found = groups(deduplicate(shard, near=True, captions=True))
    assert {kept: [key for key, _ in each] for kept, each in found.items()} == {
        "1": ["3"],
        "2": ["4"],
    }


def test_a_chain_of_likenesses_does_not_take_all(write_tar, photographs, encode):
    # Each is like its neighbours; the first and the last are not alike.
    image = photographs["astronaut"]
    width, height = image.size
    files = []
    for step in range(7):
        box = (0, 0, width - 3 * step, height)
        files += [(f"{step}.png", encode(image.crop(box))), (f"{step}.txt", b"text")]
    found = deduplicate(write_tar("x.tar", files), near=True)
    assert 1 < found["kept"] < 7
    for group in found["groups"]:
        assert all(each["bits"] <= 6 for each in group["left_out"])


def test_plain_pictures_are_duplicates_only_byte_by_byte(write_pairs):
    assert deduplicate(write_pairs("a.tar", 0, 5), near=True)["duplicates"] == 0


def test_rows_of_a_picture_are_one_sample_with_all_captions(tmp_path, noise, pairs_of):
    (tmp_path / "a.png").write_bytes(noise(1))
    (tmp_path / "b.png").write_bytes(noise(1))
    rows = "file_name,caption\na.png,first\na.png,second\nb.png,third\n"
    (tmp_path / "metadata.csv").write_text(rows)
    found = deduplicate(tmp_path, tmp_path / "out.tar")
    assert groups(found) == {"a.png": [("b.png", None)]}
    assert pairs_of(tmp_path / "out.tar") == [("a", noise(1), ("first", "second"))]


def test_duplicates_in_other_shards_are_found(write_pairs, tmp_path, files_below):
    shards = [write_pairs("a.tar", 0, 5), write_pairs("b.tar", 3, 5)]
    found = deduplicate(shards)
    assert found["written"] is None
    assert list(groups(found)) == ["0003", "0004"]
    assert found["groups"][0]["left_out"][0]["shard"] == str(shards[1])
    # Nothing is written without `to`.
    assert files_below(tmp_path).keys() == {"a.tar", "b.tar"}


def test_groups_are_shown(source, tmp_path):
    deduplicate(source, near=True, sheet=tmp_path / "groups.png", **FIELD)
    sheet = np.asarray(Image.open(tmp_path / "groups.png").convert("L"))
    # Four pictures in a row: each has something to show.
    columns = np.array_split(sheet[12:188, 12:], 4, axis=1)
    assert all(column.std() > 20 for column in columns)
    deduplicate(source, distance=0, sheet=tmp_path / "none.png", image_keys="none")
    assert Image.open(tmp_path / "none.png").size[0] > 0


@pytest.mark.parametrize("moves", [2, 4, 5])
def test_a_killed_run_goes_on_to_the_same_files(
    moves, write_pairs, tmp_path, files_below
):
    shards = [str(write_pairs("a.tar", 0, 9)), str(write_pairs("b.tar", 5, 9))]
    options = {"samples_per_shard": 4, "near": True}
    whole = deduplicate(shards, tmp_path / "whole" / "u-{0}.tar", **options)
    to = str(tmp_path / "cut" / "u-{0}.tar")
    run_until_killed(f"deduplicate({shards!r}, {to!r}, **{options!r})", moves)
    again = deduplicate(shards, to, **options)
    assert files_below(tmp_path / "cut") == files_below(tmp_path / "whole")
    assert groups(again) == groups(whole)
    assert whole["written"]["samples"] == 14


def test_it_can_be_run_anew_with_other_options(source, tmp_path, pairs_of):
    to = tmp_path / "out.tar"
    deduplicate(source, to, **FIELD)
    with pytest.raises(ValueError, match=r"`to` must go on .*near"):
        deduplicate(source, to, near=True, **FIELD)
    os.utime(source, ns=(1, 1))
    deduplicate(source, to, near=True, overwrite=True, **FIELD)
    assert len(pairs_of(to)) == 3


def test_the_result_is_json(source):
    found = deduplicate(source, near=True, **FIELD)
    assert json.loads(json.dumps(found)) == found


def test_arguments_that_make_no_sense_are_named(source, tmp_path):
    with pytest.raises(ValueError, match=r"`distance` .* Received: 16"):
        deduplicate(source, near=True, distance=16)
    with pytest.raises(ValueError, match=r"`sheet` .* Received: .*jpg"):
        deduplicate(source, sheet=tmp_path / "x.jpg")
