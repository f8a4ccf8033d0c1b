import io
import json
import pathlib
import random
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from keras_cluster_mask.data import convert, files, list_shards
from keras_cluster_mask.data.index import open_index
from keras_cluster_mask.data.pairs import PairReader

pytestmark = pytest.mark.any_backend

PHOTOGRAPHS = pathlib.Path(__file__).parents[2] / "datasets" / "photographs"
CAPTIONS = (
    ("a cat",),
    ("one, two", 'a "quoted" word', "tabs\tand\nlines\rand\r\nboth"),
    ("Grüße, 猫 🐈",),
    ("twice", "twice"),
    ("{}",),
    ('["a list"]', "\\", "x\u2028\x00y", "&amp;"),
)
FORMATS = {
    "jpg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "image": "TIFF",
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def images(noise):
    """dict from an extension to an encoded image."""
    return {
        extension: noise(index, format=format)
        for index, (extension, format) in enumerate(FORMATS.items())
    }


@pytest.fixture
def source(write_tar, images):
    """One sample of each image format, with one caption or several."""
    members = []
    for index, (extension, content) in enumerate(images.items()):
        key, captions = f"part/{index:03}", CAPTIONS[index]
        several = json.dumps({"captions": captions}).encode()
        members += [(f"{key}.{extension}", content), (f"{key}.json", several)]
    return write_tar("source.tar", members)


@pytest.fixture
def write_table(tmp_path, noise):
    """Writes a table with a row for each key and its captions; returns its path."""

    def write_table(rows):
        path = tmp_path / "metadata.jsonl"
        with path.open("w") as table:
            for index, (key, captions) in enumerate(rows):
                (tmp_path / f"{index}.png").write_bytes(noise(index))
                row = {"key": key, "file_name": f"{index}.png", "captions": captions}
                table.write(json.dumps(row) + "\n")
        return path

    return write_table


def pairs_of(source):
    """The keys, images and captions that a dataset reads."""
    index = open_index(source, PairReader())
    assert index.faults == {}
    pairs = [*index.read(range(len(index)))]
    return [(pair.key, pair.image, pair.captions) for pair in pairs]


def samples_of(shard):
    """The fields of the samples of a tar, each with its key."""
    samples = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            key, _, field = member.name.partition(".")
            fields = samples.setdefault(key, {})
            fields[field] = archive.extractfile(member).read()
    return samples


def members_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(pathlib.Path(folder).rglob("*.tar"))
        if path.is_file()
    }


# === What is written is read back ===


@pytest.mark.parametrize("name", ["train-{0}.tar", "all.tar"])
def test_keys_images_and_captions_are_read_back(name, source, tmp_path):
    expected = pairs_of(source)
    assert [captions for _, _, captions in expected] == list(CAPTIONS)
    result = convert(source, tmp_path / "out" / name, samples_per_shard=2)
    assert result["samples"] == len(CAPTIONS)
    assert result["broken"] == 0
    assert pairs_of(result["shards"]) == expected


def test_any_key_is_read_back_with_its_captions(write_table):
    keys = [
        *("../up/a.jpg", "up/a", "b.c", "b_c", "A", "a", "x:y?", "", "é" * 150),
        *(".hidden", "./.x/..", "a-2", "a", "a", "/", "c/", "d.tar.gz", "__key__"),
        *("\ud800", "\x00\n", "n" * 5000, "n" * 5001, "a b", " a", "a ", "猫/🐈.", "é"),
        *("..", "e/.f.PNG", "PaxHeader/x", "caption\t.txt", "%2e", "\u2028", "0.json"),
    ]
    rows = [(key, CAPTIONS[index % len(CAPTIONS)]) for index, key in enumerate(keys)]
    table = write_table(rows)
    to = table.parent / "{0}.tar"
    result = convert(table, to, samples_per_shard=10)
    assert (result["samples"], result["broken"]) == (len(keys), 0)
    found = pairs_of(result["shards"])
    assert [captions for _, _, captions in found] == [captions for _, captions in rows]
    images = [
        (table.parent / f"{index}.png").read_bytes() for index in range(len(keys))
    ]
    assert [image for _, image, _ in found] == images
    written = [key for key, _, _ in found]
    assert len(set(written)) == len(written)
    assert written[:8] == [
        *("up/a", "up/a-2", "b_c", "b_c-2", "A", "a", "x_y_", "sample")
    ]
    # Names of files have at most 255 bytes, and none leads to another folder.
    for part in "/".join(written).split("/"):
        assert part
        assert not part.startswith(".")
        assert len(part.encode()) <= 210
    # A second conversion changes nothing.
    again = convert(result["shards"], table.parent / "again.tar")
    assert pairs_of(again["shards"]) == found


def test_random_keys_and_captions_are_read_back(write_table):
    draw = random.Random(0)
    letters = "aA.. //\\-_:é猫🐈\u0301\u2028\u00a0\udcff\0\n\t\"'{}%~*?\x85"
    words = ("../", "./", ".jpg", ".tar.gz", "__key__", "PaxHeader/", "con", "a" * 120)

    def text(most):
        return "".join(
            draw.choice(words) if draw.random() < 0.1 else draw.choice(letters)
            for _ in range(draw.randrange(most))
        )

    rows = []
    for _ in range(400):
        captions = [f"{text(30)}x{text(30)}" for _ in range(draw.choice((1, 1, 2, 5)))]
        # Many duplicates among short keys.
        rows.append((text(draw.choice((2, 3, 40))), captions))
    table = write_table(rows)
    result = convert(table, table.parent / "{0}.tar", samples_per_shard=150)
    assert (result["samples"], result["broken"]) == (400, 0)
    found = pairs_of(result["shards"])
    assert len({key for key, _, _ in found}) == 400
    for index, ((key, image, captions), (_, expected)) in enumerate(zip(found, rows)):
        assert image == (table.parent / f"{index}.png").read_bytes()
        # Surrogates are no text that UTF-8 can hold.
        valid = [each.encode("utf-8", "replace").decode() for each in expected]
        assert list(captions) == [each.strip() for each in valid]
        for part in key.split("/"):
            assert part.strip(". ")
            assert len(part.encode()) <= 210
    assert (
        pairs_of(convert(result["shards"], table.parent / "all.tar")["shards"]) == found
    )


def test_captions_that_are_not_valid_unicode_are_kept_as_far_as_possible(write_table):
    table = write_table([("1", ["a \ud800 b"]), ("2", ["\udcff", "c"])])
    result = convert(table, table.parent / "out.tar")
    captions = [captions for _, _, captions in pairs_of(result["shards"])]
    assert captions == [("a ? b",), ("?", "c")]


def test_rows_of_one_image_become_one_sample(tmp_path, noise):
    (tmp_path / "a.png").write_bytes(noise(1))
    rows = "key,file_name,caption\n1,a.png,first\n1,a.png,second\n"
    (tmp_path / "metadata.csv").write_text(rows)
    (pair,) = pairs_of(convert(tmp_path, tmp_path / "out.tar")["shards"])
    assert pair == ("1", noise(1), ("first", "second"))


def test_tfrecords_are_converted(tmp_path, noise):
    tf = pytest.importorskip("tensorflow")

    def feature(*values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    features = {"image": feature(noise(1)), "caption": feature(b"one", b"two")}
    example = tf.train.Example(features=tf.train.Features(feature=features))
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example.SerializeToString())
    (pair,) = pairs_of(convert(path, f"{path}.tar")["shards"])
    assert pair == ("00000000", noise(1), ("one", "two"))


def test_objects_are_converted(tmp_path, noise):
    rows = [{"image": noise(1), "caption": ["one", "two"]}, {"image": b"broken"}]
    result = convert(rows, tmp_path / "out.tar")
    assert pairs_of(result["shards"]) == [("0", noise(1), ("one", "two"))]
    assert (result["samples"], result["by_reason"]) == (1, {"no caption": 1})
    with pytest.raises(ValueError, match=r"`source` must be.*source={'a': 1}"):
        convert({"a": 1}, tmp_path / "weights.tar")


def test_parquet_files_are_converted(tmp_path, noise):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = {"id": ["a", "b"], "image": [noise(1), noise(2)], "caption": ["one", "two"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    pairs = pairs_of(convert(tmp_path / "a.parquet", tmp_path / "a.tar")["shards"])
    assert pairs == [("a", noise(1), ("one",)), ("b", noise(2), ("two",))]


def test_addresses_are_read_and_written(source):
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/in/source.tar")
    try:
        to = "memory://out/{0}.tar"
        result = convert("memory://in/*.tar", to, samples_per_shard=2)
        assert pairs_of(result["shards"]) == pairs_of(source)
        names = ["/out/0.tar", "/out/1.tar", "/out/2.tar"]
        assert sorted(memory.find("/out")) == names
    finally:
        memory.rm("/in", recursive=True)
        memory.rm("/out", recursive=True)


# === The layout of the shards ===


def test_shards_are_numbered_and_hold_the_given_number_of_samples(source, tmp_path):
    to = tmp_path / "out" / "train-{00000}.tar"
    shards = convert(source, to, samples_per_shard=4)["shards"]
    names = ["train-00000.tar", "train-00001.tar"]
    assert [pathlib.Path(shard).name for shard in shards] == names
    assert [len(samples_of(shard)) for shard in shards] == [4, 2]
    assert list_shards(tmp_path / "out" / "train-*.tar") == shards
    # There is no empty shard if the samples exactly fill the last one.
    exact = convert(source, tmp_path / "exact" / "{0}.tar", samples_per_shard=3)
    assert len(exact["shards"]) == 2


def test_the_first_caption_is_text_and_several_are_json(source, tmp_path):
    (shard,) = convert(source, tmp_path / "out.tar")["shards"]
    first, second, *_ = samples_of(shard).values()
    assert first.keys() == {"jpg", "txt"}
    assert second["txt"] == b"one, two"
    assert json.loads(second["json"]) == {"captions": list(CAPTIONS[1])}


def test_images_get_the_extension_of_their_format(write_tar, images, tmp_path):
    files = [("1.jpg", images["png"]), ("1.txt", b"a PNG")]
    files += [("2.png", images["image"]), ("2.txt", b"a TIFF")]
    (shard,) = convert(write_tar("x.tar", files), tmp_path / "out.tar")["shards"]
    first, second = samples_of(shard).values()
    assert first["png"] == images["png"]
    assert second["image"] == images["image"]


def test_keys_of_another_shard_get_a_number(write_pairs, tmp_path):
    shards = [write_pairs("a.tar", 0, 3), write_pairs("b.tar", 1, 3)]
    result = convert(shards, tmp_path / "out-{0}.tar", samples_per_shard=2)
    keys = [key for key, *_ in pairs_of(result["shards"])]
    assert keys == ["0000", "0001", "0002", "0001-2", "0002-2", "0003"]


def test_only_larger_images_are_resized(write_tar, encode, tmp_path):
    large = Image.open(PHOTOGRAPHS / "astronaut.jpg").resize((300, 200))
    clear = large.convert("RGBA")
    clear.putalpha(77)
    contents = [
        *(encode(large, "JPEG"), encode(clear)),
        *(encode(large.resize((96, 64))), encode(large.resize((60, 90)))),
    ]
    files = []
    for index, content in enumerate(contents):
        files += [(f"{index}.png", content), (f"{index}.txt", b"text")]
    shard = write_tar("x.tar", files)
    (shard,) = convert(shard, tmp_path / "out.tar", image_size=64)["shards"]
    samples = list(samples_of(shard).values())
    resized = Image.open(io.BytesIO(samples[0]["jpg"]))
    assert resized.size == (96, 64)
    reference = np.asarray(large.resize((96, 64), Image.BICUBIC), "float32")
    assert np.abs(np.asarray(resized, "float32") - reference).mean() < 4
    transparent = Image.open(io.BytesIO(samples[1]["png"]))
    assert (transparent.size, transparent.mode) == ((96, 64), "RGBA")
    assert [samples[2]["png"], samples[3]["png"]] == contents[2:]


# === Broken samples and existing files ===


def test_broken_samples_are_left_out_and_counted(write_pairs, noise, tmp_path):
    broken = [
        ("cut.png", noise(0)[:300]),
        ("cut.txt", b"truncated"),
        ("none.txt", b"no image"),
        ("0001.png", noise(1)),
        ("0001.txt", b"a duplicate key"),
    ]
    shard = write_pairs("a.tar", 0, 3, broken)
    result = convert(shard, tmp_path / "out.tar")
    assert (result["samples"], result["broken"]) == (3, 3)
    assert result["by_reason"] == {
        "duplicate key": 1,
        "no image": 1,
        "the image does not decode": 1,
    }
    assert {each["key"] for each in result["first_broken"]} == {"cut", "none", "0001"}
    assert [key for key, *_ in pairs_of(tmp_path / "out.tar")] == [
        *("0000", "0001", "0002")
    ]


def test_a_source_without_an_intact_sample_gives_no_shard(write_tar, tmp_path):
    result = convert(write_tar("a.tar", [("1.txt", b"text")]), tmp_path / "out.tar")
    assert (result["samples"], result["shards"]) == (0, [])
    assert not (tmp_path / "out.tar").exists()


def test_an_interrupted_run_leaves_complete_shards_only(source, tmp_path, monkeypatch):
    to = tmp_path / "out" / "{0}.tar"
    complete = members_below_after(source, tmp_path / "complete" / "{0}.tar")
    written, write = [], convert.__globals__["_write"]

    def interrupted(archive, key, fields):
        written.append(key)
        if len(written) == 4:
            raise KeyboardInterrupt
        write(archive, key, fields)

    monkeypatch.setitem(convert.__globals__, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, to, samples_per_shard=2)
    assert members_below(to.parent) == {"0.tar": complete["0.tar"]}


def members_below_after(source, to):
    convert(source, to, samples_per_shard=2)
    return members_below(to.parent)


def test_existing_files_are_not_replaced(source, tmp_path):
    (tmp_path / "out.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"`to` must not exist.*Received: .*out\.tar"):
        convert(source, tmp_path / "out.tar")
    (tmp_path / "late-1.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"`to` must not exist.*Received: .*late-1"):
        convert(source, tmp_path / "late-{0}.tar", samples_per_shard=2)
    for name in ("out.tar", "late-1.tar"):
        assert (tmp_path / name).read_bytes() == b"mine"


def test_a_source_is_never_replaced(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = source.read_bytes()
    source.rename("train-1.tar")
    for to in ("train-1.tar", "./train-{0}.tar", tmp_path / "train-{0}.tar"):
        with pytest.raises(ValueError, match=r"`to` must not exist"):
            convert("train-*.tar", to, samples_per_shard=2)
        pathlib.Path("train-0.tar").unlink(missing_ok=True)
    assert pathlib.Path("train-1.tar").read_bytes() == expected


@pytest.mark.parametrize(
    "to",
    [
        *("out", "out.zip", "out/", "a-{0..9}.tar", "{0}-{0}.tar", "m-{0}.csv"),
        *("out.tfrecord", "a-{}.tar", "{0}{x}.tar"),
    ],
)
def test_destinations_other_than_tar_files_are_refused(to, source, tmp_path):
    with pytest.raises(ValueError, match=r"`to` must .* Received: "):
        convert(source, f"{tmp_path}/{to}")


@pytest.mark.parametrize("name", ["samples_per_shard", "image_size"])
def test_numbers_that_are_not_positive_are_refused(name, source, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`{name}` must be an integer of at least 1. Received: .*0"
    ):
        convert(source, tmp_path / "out.tar", **{name: 0})
    assert not files.exists(tmp_path / "out.tar")
