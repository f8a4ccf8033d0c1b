import csv
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import list_shards, read_samples
from keras_cluster_mask.data.preparation import convert

ROOT = pathlib.Path(__file__).resolve().parents[3]

KINDS = {
    "csv": "folder/metadata.csv",
    "tsv": "table/metadata.tsv",
    "jsonl": "lines/metadata.jsonl",
    "tar": "train-{00000}.tar",
    "tfrecord": "train-{000}.tfrecord",
    "one tar": "all.tar",
    "gzip": "train-{0}.tfrecord.gz",
}
CAPTIONS = (
    ("a cat",),
    ("one, two", 'a "quoted" word', "tabs\tand\nlines\rand\r\nboth"),
    ("Grüße, 猫 🐈",),
    ("twice", "twice"),
    ("{}",),
)


@pytest.fixture
def source(write_tar, noise):
    """Five pictures of five kinds, with one caption or several."""
    files = []
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
    for index, (ending, format) in enumerate(formats.items()):
        key, captions = f"part/{index:03}", CAPTIONS[index]
        files.append((f"{key}.{ending}", noise(index, format=format)))
        files.append((f"{key}.txt", captions[0].encode()))
        if len(captions) > 1:
            several = json.dumps({"captions": captions}).encode()
            files.append((f"{key}.json", several))
    return write_tar("source.tar", files)


def needs(kind):
    if kind in ("tfrecord", "gzip"):
        pytest.importorskip("tensorflow")


def converted(source, folder, kind, **options):
    """Converts, and returns what is to be read then."""
    summary = convert(source, folder / KINDS[kind], **options)
    return summary["shards"]


@pytest.mark.parametrize(
    ("first", "second"), itertools.permutations(["csv", "jsonl", "tar", "tfrecord"], 2)
)
def test_pictures_and_captions_survive_two_conversions(
    first, second, source, tmp_path, pairs_of
):
    needs(first), needs(second)
    expected = pairs_of(source)
    assert [captions for _, _, captions in expected] == list(CAPTIONS)
    options = {"samples_per_shard": 2}
    once = converted(source, tmp_path / "a", first, **options)
    assert pairs_of(once) == expected
    assert pairs_of(converted(once, tmp_path / "b", second, **options)) == expected


@pytest.mark.parametrize("kind", ["tsv", "one tar", "gzip"])
def test_pictures_and_captions_survive_other_kinds(kind, source, tmp_path, pairs_of):
    needs(kind)
    assert pairs_of(converted(source, tmp_path, kind)) == pairs_of(source)


def test_shards_are_numbered_and_hold_so_many_samples(source, tmp_path):
    shards = converted(source, tmp_path / "out", "tar", samples_per_shard=2)
    names = ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert [os.path.basename(shard) for shard in shards] == names
    assert [len(list(read_samples(shard))) for shard in shards] == [2, 2, 1]
    assert list_shards(tmp_path / "out" / "train-*.tar") == shards
    # No empty shard where the samples just fill the last.
    assert len(converted(source, tmp_path / "other", "tar", samples_per_shard=5)) == 1


def test_one_shard_without_a_number_holds_all(source, tmp_path):
    shards = converted(source, tmp_path, "one tar", samples_per_shard=2)
    assert shards == [str(tmp_path / "all.tar")]


def test_a_tar_holds_the_first_caption_as_text_and_all_as_json(source, tmp_path):
    (shard,) = converted(source, tmp_path, "tar")
    samples = list(read_samples(shard))
    assert samples[0].keys() == {"__key__", "jpg", "txt"}
    assert samples[1]["txt"] == b"one, two"
    assert json.loads(samples[1]["json"]) == {"captions": list(CAPTIONS[1])}


def test_a_folder_is_a_table_of_captions_beside_pictures(source, tmp_path, encode):
    converted(source, tmp_path, "csv", samples_per_shard=3)
    with (tmp_path / "folder/metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "file_name", "caption"]
    assert len(rows) == sum(map(len, CAPTIONS))
    assert rows[-1] == {
        "key": "part/004",
        "file_name": "00001/part/004.bmp",
        "caption": "{}",
    }
    for row in rows:
        Image.open(tmp_path / "folder" / row["file_name"]).load()


def test_the_folder_itself_can_be_read(source, tmp_path, pairs_of):
    converted(source, tmp_path, "jsonl")
    assert pairs_of(tmp_path / "lines") == pairs_of(source)


def test_pictures_are_named_by_what_they_are(write_tar, noise, tmp_path, encode):
    tiff = encode(np.zeros((8, 8, 3), "uint8"), "TIFF")
    files = [
        ("1.jpg", noise(1)),
        ("1.txt", b"a PNG"),
        ("2.png", tiff),
        ("2.txt", b"a TIFF"),
    ]
    shard = write_tar("x.tar", files)
    (tar,) = converted(shard, tmp_path, "tar")
    first, second = read_samples(tar)
    assert first["png"] == files[0][1]
    # A name under which it is found again.
    assert second["image"] == tiff
    converted(shard, tmp_path, "csv")
    names = {path.name for path in (tmp_path / "folder/00000").iterdir()}
    assert names == {"1.png", "2.tiff"}


def test_keys_are_cleaned_and_numbered_where_they_must_be(noise, tmp_path, pairs_of):
    keys = ["../up/a.jpg", "up/a", "b.c", "b_c", "A", "a", "x:y?", "", "é" * 150]
    (tmp_path / "1.png").write_bytes(noise(1))
    (tmp_path / "2.png").write_bytes(noise(2))
    rows = [
        {"key": key, "file_name": f"{1 + i % 2}.png", "text": "t"}
        for i, key in enumerate(keys)
    ]
    manifest = tmp_path / "metadata.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    found = [key for key, *_ in pairs_of(converted(manifest, tmp_path, "tar"))]
    assert found[:8] == ["up/a", "up/a-2", "b_c", "b_c-2", "A", "a", "x_y_", "sample"]
    assert len(found[8].encode()) <= 200
    found = [key for key, *_ in pairs_of(converted(manifest, tmp_path, "csv"))]
    # Some file systems take A and a for the same.
    assert found[:6] == ["up/a", "up/a-2", "b.c", "b_c", "A", "a-2"]
    if sys.platform != "win32":
        assert (tmp_path / "folder/00000/up/a-2.png").exists()


def test_keys_that_come_again_in_another_shard_are_numbered(
    write_pairs, tmp_path, pairs_of
):
    shards = [write_pairs("a.tar", 0, 3), write_pairs("b.tar", 1, 3)]
    out = converted(shards, tmp_path, "tar", samples_per_shard=2)
    keys = [key for key, *_ in pairs_of(out)]
    assert keys == ["0000", "0001", "0002", "0001-2", "0002-2", "0003"]


def test_what_is_broken_is_left_out_and_counted(write_pairs, noise, tmp_path):
    broken = [
        ("cut.png", noise(0)[:300]),
        ("cut.txt", b"cut"),
        ("none.txt", b"no picture"),
        ("0001.png", noise(1)),
        ("0001.txt", b"once more"),
    ]
    shard = write_pairs("a.tar", 0, 3, broken)
    summary = convert(shard, tmp_path / "out.tar")
    assert summary["samples"] == 3
    assert summary["broken"] == 3
    assert summary["by_reason"] == {
        "duplicate key": 1,
        "no image": 1,
        "the image does not decode": 1,
    }
    assert [str(shard), "cut", "the image does not decode"] in summary["first_broken"]
    unseen = convert(shard, tmp_path / "copied.tar", verify=False)
    assert unseen["samples"] == 4


def test_only_larger_pictures_are_shrunk(write_tar, photographs, encode, tmp_path):
    large = photographs["astronaut"].resize((300, 200))
    clear = large.convert("RGBA")
    clear.putalpha(77)
    small = encode(large.resize((96, 64)))
    files = []
    for index, content in enumerate(
        [encode(large, "JPEG"), encode(clear), small, encode(large.resize((60, 90)))]
    ):
        files += [(f"{index}.png", content), (f"{index}.txt", b"text")]
    (shard,) = converted(write_tar("x.tar", files), tmp_path, "tar", image_size=64)
    samples = list(read_samples(shard))
    assert Image.open(io.BytesIO(samples[0]["jpg"])).size == (96, 64)
    shrunk = np.asarray(Image.open(io.BytesIO(samples[0]["jpg"])), "float32")
    reference = np.asarray(large.resize((96, 64), Image.BICUBIC), "float32")
    assert np.abs(shrunk - reference).mean() < 4
    kept = Image.open(io.BytesIO(samples[1]["png"]))
    assert (kept.size, kept.mode) == ((96, 64), "RGBA")
    assert samples[2]["png"] == small
    assert samples[3]["png"] == files[6][1]


def test_the_same_input_gives_the_same_files(source, tmp_path, files_below):
    for kind in ("tar", "csv", "jsonl"):
        converted(source, tmp_path / "a", kind, num_threads=1)
        converted(source, tmp_path / "b", kind, num_threads=4)
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


def test_addresses_are_read_and_written(source, tmp_path, pairs_of):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/in/source.tar")
    try:
        for kind in ("tar", "csv"):
            address = f"memory://out/{kind}"
            summary = convert(
                "memory://in/*.tar", f"{address}/{KINDS[kind]}", samples_per_shard=2
            )
            back = convert(summary["shards"], tmp_path / kind / "all.tar")
            assert pairs_of(back["shards"]) == pairs_of(source)
        assert not [name for name in memory.find("/out") if ".part" in name]
    finally:
        memory.rm("/in", recursive=True)
        memory.rm("/out", recursive=True)


# === Going on ===

KILL = """
import os
import signal

from keras_cluster_mask.data import files, preparation

moves, move = [], files._move


def cut_off(old, new):
    moves.append(new)
    if len(moves) == {moves}:
        os.kill(os.getpid(), signal.SIGKILL)
    move(old, new)


files._move = cut_off
preparation.{call}
"""


def run_until_killed(call, moves):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL.format(call=call, moves=moves))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


# A state, then a part and a state in turn; a picture of a folder is a file, too.
@pytest.mark.parametrize(
    ("kind", "moves"), [("tar", 6), ("tar", 7), ("csv", 18), ("csv", 31)]
)
def test_a_killed_run_goes_on_to_the_same_files(
    kind, moves, write_pairs, noise, tmp_path, files_below, pairs_of
):
    broken = [("cut.png", noise(0)[:300]), ("cut.txt", b"cut")]
    shards = [
        str(write_pairs("a.tar", 0, 9, broken)),
        # Keys that were there are numbered.
        str(write_pairs("b.tar", 5, 12)),
    ]
    whole = convert(shards, tmp_path / "whole" / KINDS[kind], samples_per_shard=4)
    assert whole["samples"] == 21
    to = str(tmp_path / "cut" / KINDS[kind])
    run_until_killed(f"convert({shards!r}, {to!r}, samples_per_shard=4)", moves)
    found = files_below(tmp_path / "cut")
    assert sum(name.endswith(".part") for name in found) == 1
    # What has its name is whole.
    for name, content in found.items():
        if not name.startswith(".") and name.endswith((".tar", ".png")):
            assert files_below(tmp_path / "whole")[name] == content
    assert not (tmp_path / "cut" / "folder" / "metadata.csv").exists()
    places = {
        path: path.stat().st_ino
        for path in (tmp_path / "cut").glob("train-0000[01].tar")
    }
    assert kind != "tar" or len(places) == 2
    again = convert(shards, to, samples_per_shard=4)
    # Finished shards were not written again.
    assert all(path.stat().st_ino == place for path, place in places.items())
    assert files_below(tmp_path / "cut") == files_below(tmp_path / "whole")
    assert again["by_reason"] == whole["by_reason"]
    assert pairs_of(again["shards"]) == pairs_of(whole["shards"])


def test_a_finished_run_is_not_done_again(source, tmp_path):
    first = convert(source, tmp_path / "out.tar")
    place = (tmp_path / "out.tar").stat().st_ino
    assert convert(source, tmp_path / "out.tar") == first
    assert (tmp_path / "out.tar").stat().st_ino == place


def test_a_run_with_other_sources_or_options_is_refused(source, tmp_path):
    to = tmp_path / "out-{0}.tar"
    convert(source, to)
    with pytest.raises(ValueError, match=r"`to` must go on .*image_size.* Received: "):
        convert(source, to, image_size=8)
    with pytest.raises(ValueError, match=r"samples_per_shard"):
        convert(source, to, samples_per_shard=1)
    os.utime(source, ns=(1, 1))
    with pytest.raises(ValueError, match=r"sources"):
        convert(source, to)


def test_overwriting_leaves_nothing_of_the_run_before(source, tmp_path, files_below):
    to = tmp_path / "out-{0}.tar"
    convert(source, to, samples_per_shard=1)
    convert(source, to, samples_per_shard=4, overwrite=True)
    names = {"out-0.tar", "out-1.tar", "out-{0}.tar.state.json", "source.tar"}
    assert files_below(tmp_path).keys() == names


def test_what_is_there_is_not_replaced_unasked(source, tmp_path):
    (tmp_path / "out.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"`to` must not be there.*Received: .*out"):
        convert(source, tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"`to` must not be what is read"):
        convert(source, source, overwrite=True)


def test_a_lost_shard_is_named(source, tmp_path):
    shards = converted(source, tmp_path, "tar", samples_per_shard=2)
    os.remove(shards[1])
    with pytest.raises(ValueError, match=rf"lost a part.*{shards[1]}"):
        converted(source, tmp_path, "tar", samples_per_shard=2)


@pytest.mark.parametrize(
    "to", ["out", "out.zip", "out/", "a-{0..9}.tar", "{0}-{0}.tar", "m-{0}.csv"]
)
def test_destinations_of_no_kind_are_refused(to, source, tmp_path):
    with pytest.raises(ValueError, match=r"`to` must .* Received: "):
        convert(source, f"{tmp_path}/{to}")
