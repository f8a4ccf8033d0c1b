"""An index knows the samples that reading from start to end finds."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import threading

import pytest

from keras_cluster_mask.data import files, index_parts, open_index
from keras_cluster_mask.data.checks import count_pairs
from keras_cluster_mask.data.index_parts import build_parts
from keras_cluster_mask.data.pairs import Labels, PairReader
from keras_cluster_mask.data.sources import find_shards
from keras_cluster_mask.data.sources.shard import NoRandomAccess

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def assert_agrees(source, image_keys=None, caption_key=None, labels=None, **options):
    """Asserts that an index gives what the pipeline reads; returns the index."""
    label_key = labels.keys if labels else None
    reader = PairReader(find_shards(source), image_keys, caption_key, labels=labels)
    faults = {}

    def report(shard, key, reason, details):
        if reason is not None:
            faults[reason] = faults.get(reason, 0) + 1

    pairs = [pair for shard in reader.shards for pair in reader.read(shard, report)]
    keys = {"image_keys": image_keys, "caption_key": caption_key}
    index = open_index(source, label_key=label_key, **keys, **options)
    samples = [index.read(number) for number in range(len(index))]
    found = [
        (number, reader.pair(index.shard_of(number), sample)[0])
        for number, sample in enumerate(samples)
    ]
    found = [(number, pair) for number, pair in found if pair is not None]
    assert len(found) == len(pairs)
    for (number, pair), expected in zip(found, pairs):
        assert index.key(number) == pair.key == expected.key
        assert pair.image == expected.image
        assert pair.captions == expected.captions
        assert pair.label == expected.label
        # Large tables are several shards for the pipeline.
        assert expected.shard.startswith(index.shard_of(number).path)
    # Faults in contents show when samples are read, also in what damage cuts off.
    known = sum(index.faults["by_reason"].values())
    late = len(index) - len(found) - (sum(faults.values()) - known)
    assert 0 <= late <= faults.get("damaged shard", 0)
    for reason, count in index.faults["by_reason"].items():
        assert faults[reason] >= count
    assert count_pairs(reader) == len(pairs)
    return index


def assert_same_samples(index, source):
    """Asserts that samples have the same fields in the same order."""
    reader = PairReader(find_shards(source))
    expected = [s for shard in reader.shards for s in shard.read(reader.fields)]
    assert [list(sample.items()) for sample in index] == [
        list(sample.items()) for sample in expected
    ]


def tar_files(count, start=0, extra=True):
    found = []
    for number in range(start, start + count):
        key = f"a/{number:04}"
        found += [(f"{key}.jpg", random.Random(number).randbytes(2000 + number))]
        if extra:
            entry = json.dumps({"caption": f"nested {number}", "label": number % 3})
            found.append((f"{key}.json", entry.encode()))
        found.append((f"{key}.txt", b"no %d" % number))
    return found


# === Tar ===


def test_a_thousand_samples_take_32_bytes_each(write_tar):
    source = write_tar("a.tar", tar_files(1000))
    index = assert_agrees(source)
    assert_same_samples(index, source)
    assert len(index) == 1000
    assert os.path.getsize(source.parent / ".a.tar.index") < 33 * 1000
    order = random.Random(0).sample(range(1000), 1000)
    expected = list(index)
    assert [index[number] for number in order] == [expected[n] for n in order]
    assert index[-1] == expected[-1]
    with pytest.raises(IndexError):
        index[1000]


def test_contents_are_not_read(write_tar, monkeypatch):
    content = [(f"{n}.{end}", bytes(50_000)) for n in range(50) for end in ("jpg",)]
    source = write_tar("a.tar", content)
    opened = files.open_file
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    def open_counted(path, mode="rb", buffering=None):
        if os.fspath(path) != str(source):
            return opened(path, mode, buffering)
        return io.BufferedReader(Counted(path), buffering)

    monkeypatch.setattr(files, "open_file", open_counted)
    assert len(open_index(source, wants_caption=False)) == 50
    assert sum(read) < 0.1 * source.stat().st_size


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_keys(tmp_path, format):
    names = [
        "n" * 101,
        "folder/" * 40 + "n" * 300,
        "子犬",
        "odd\udcff",
        "/a/1",
        "new\nline",
    ]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format) as archive:
        for name in names:
            for ending in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(ending)
                archive.addfile(member, io.BytesIO(ending.encode()))
    index = assert_agrees(path)
    assert_same_samples(index, path)
    assert [index.key(number) for number in range(len(names))] == names


def test_folders_links_and_hidden_files_are_no_samples(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [
            ("./folder.jpg", tarfile.DIRTYPE),
            ("./1.jpg", tarfile.REGTYPE),
            ("./._1.jpg", tarfile.REGTYPE),
            ("./1.png", tarfile.FIFOTYPE),
            ("./1.txt", tarfile.REGTYPE),
            ("./2.jpg", tarfile.LNKTYPE),
            ("./2.txt", tarfile.REGTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.jpg"
            member.size = 3 * (kind == tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(b"abc"))
    index = assert_agrees(path)
    assert [sample["__key__"] for sample in index] == ["1"]
    assert index.faults["by_reason"] == {"no image": 1}


def test_every_fault_is_counted(write_tar, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.data.sources.webdataset.MAX_BYTES", 1999)
    jpg, txt = bytes(100), b"t"
    source = write_tar(
        "x.tar",
        [
            *[("1.jpg", jpg), ("1.txt", txt)],
            *[("2.jpg", bytes(2000)), ("2.txt", txt)],
            *[("1.jpg", jpg), ("1.txt", txt)],
            *[("3.txt", txt)],
            *[("4.jpg", jpg)],
            *[("5.jpg", jpg), ("5.txt", b" \n")],
            *[("6.jpg", jpg), ("6.txt", bytes(2000))],
            *[("7.jpg", jpg), ("7.json", b"{}")],
            *[("8.jpg", jpg), ("8.json", b'{"captions": ["", "a"]}')],
            *[("9.jpg", b""), ("9.txt", " \u3000".encode() * 300)],
            *[("10.jpg", jpg), ("10.txt", " \u3000".encode() * 300 + b"x")],
            *[("1.jpg", jpg), ("1.jpg", jpg)],
        ],
    )
    index = assert_agrees(source)
    by_reason = {
        "duplicate key": 3,
        "empty caption": 2,
        "file too large": 1,
        "no caption": 2,
        "no image": 1,
    }
    assert index.faults["by_reason"] == by_reason
    assert index.faults["by_shard"] == {str(source): by_reason}
    # That "7" holds no caption shows when it is read.
    assert [sample["__key__"] for sample in index] == ["1", "7", "8", "10"]


def test_any_place_of_a_cut_is_counted_as_the_pipeline_does(write_tar):
    source = write_tar("x.tar", tar_files(2, extra=False))
    content = source.read_bytes()
    for cut in [0, 1, *range(500, len(content), 271)]:
        source.write_bytes(content[:cut])
        index = assert_agrees(source)
        whole = cut >= 512 * 14
        assert index.faults["by_reason"] == {"damaged shard": 1} or whole
        assert list(index.faults["details"]) == [str(source)] or whole


def test_any_damaged_header_is_counted_as_the_pipeline_does(write_tar):
    source = write_tar("x.tar", tar_files(3))
    content = source.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        block = draw.randrange(len(content) // 512)
        place = 512 * block + draw.choice([draw.randrange(512), 0, 124, 148, 156])
        damaged[place : place + draw.choice([1, 512])] = draw.randbytes(1)
        source.write_bytes(damaged)
        assert_agrees(source)


def test_sizes_beyond_the_file_end_the_shard(tmp_path):
    path = tmp_path / "x.tar"
    member = tarfile.TarInfo("1.jpg")
    for size in (2000, 2**40, 2**80, -512):
        member.size = size
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        assert_agrees(path)


def test_sparse_files_are_read(tmp_path):
    content, block = b"x" * 512, 512
    member = tarfile.TarInfo("1.jpg")
    member.size, member.type = block, tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    # A hole of 1024 bytes, then a block: the real size is 1536.
    header[386:410] = b"%011o\0%011o\0" % (1024, block)
    header[410:434] = b"%011o\0%011o\0" % (1536, 0)
    header[483:495] = b"%011o\0" % 1536
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    text = tarfile.TarInfo("1.txt")
    text.size = 4
    end = text.tobuf() + b"text".ljust(block, b"\0") + bytes(1024)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + content + end)
    index = assert_agrees(path)
    assert index[0] == {"__key__": "1", "jpg": bytes(1024) + content, "txt": b"text"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_with_the_remedy(write_tar, mode):
    source = write_tar("x.tar.gz", tar_files(3), mode)
    with pytest.raises(NoRandomAccess, match=rf"data convert {source} --to"):
        open_index(source)
    assert count_pairs(PairReader(find_shards(source))) == 3
    error = pickle.loads(pickle.dumps(NoRandomAccess("a")))
    assert str(error) == str(NoRandomAccess("a"))


# === Fields ===


def test_one_part_serves_all_choices_of_fields(write_tar, monkeypatch):
    files_ = [*tar_files(5), ("x.png", b"p"), ("x.alt", b"a")]
    source = write_tar("x.tar", files_)
    indexes = [assert_agrees(source)]
    monkeypatch.setattr("keras_cluster_mask.data.index_parts.build_part", pytest.fail)
    indexes += [
        assert_agrees(source, caption_key="json.caption"),
        assert_agrees(source, image_keys=["png", "jpg"], caption_key=["alt", "txt"]),
        assert_agrees(source, caption_key="json.missing"),
        assert_agrees(source, labels=Labels("json.label")),
    ]
    assert [len(index) for index in indexes] == [5, 5, 6, 5, 5]
    assert len({index.fingerprint for index in indexes}) == 5
    captionless = open_index(source, image_keys="txt", wants_caption=False)
    assert len(captionless) == 5
    assert captionless[0] == {"__key__": "a/0000", "txt": b"no 0"}
    assert captionless.read(0, ["json"]).keys() == {"__key__", "json"}
    assert open_index(source, label_key="cls").faults["by_reason"] == {
        "no label": 5,
        "no caption": 1,
    }


# === Tables and folders ===


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl"])
def test_rows_are_samples(write, name):
    mark = "\t" if name == "x.tsv" else ","
    if name == "x.jsonl":
        rows = [
            {"file_name": f"{n}.jpg", "text": ["", f"no\n{n}"], "n": n}
            for n in range(2500)
        ]
        content = "\n\n".join(map(json.dumps, rows))
    else:
        rows = [f'{n % 7}.jpg{mark}"no\n""{n}"""' for n in range(2500)]
        content = "\n".join([f"file_name{mark}text", *rows, ""])
    source = write(name, content)
    index = assert_agrees(source)
    assert_same_samples(index, source)
    assert len(index) == 2500
    assert index.shard_of(0).path_of("1.jpg") == str(source.parent / "1.jpg")


def test_a_broken_row_costs_one_sample(write):
    source = write(
        "x.csv",
        b"\xef\xbb\xbffile_name,text\n1.jpg,one\n2.jpg,\xff\n3.jpg,three\n"
        b'4.jpg,"four\n5.jpg,five\n6.jpg,six,more\n,seven\n8.jpg\n9.jpg, \n10.jpg,ten',
    )
    index = assert_agrees(source)
    assert [each["__key__"] for each in index] == ["1.jpg", "3.jpg", "5.jpg", "10.jpg"]
    assert index.faults["by_reason"] == {
        "a row that is not UTF-8": 1,
        "a row with a quote that does not fit": 1,
        "empty caption": 1,
        "more cells than columns": 1,
        "no caption": 1,
        "no image": 1,
    }


def test_broken_lines_of_json_are_counted(write):
    values = [None, "", 3, [], ["", " "], {"a": "b"}, " ", "text", ["", "a"]]
    lines = [json.dumps({"image": "a.jpg", "text": value}) for value in values]
    lines += [json.dumps({"image": value, "text": "t"}) for value in values]
    lines += [json.dumps({"image": "a", "json": {"caption": v}}) for v in values]
    lines += ["{", "[1]", "[" * 100_000, '{"image": "\\ud800.jpg", "text": "t"}', "{}"]
    source = write("x.jsonl", "\n".join(lines).encode() + b'\n{"image": "\xff"}')
    assert_agrees(source)
    assert_agrees(source, caption_key=["json.caption", "text"])


def test_a_table_with_a_broken_first_line_is_damaged(write):
    for content in (b"\xff\xfe\n1,2\n", b'"a\nb,c\n', b"", b"file_name,text\n"):
        index = assert_agrees(write("x.csv", content))
        assert len(index) == 0


def test_folders_of_images_are_listed_again(write):
    names = ["cats/2.png", "cats/1.PNG", "3.png", ".hidden/4.png"]
    for name in names:
        source = write(f"images/{name}", b"image").parents[0]
    source = source.parent
    options = {"wants_caption": False, "label_key": "folder"}
    index = open_index(source, **options)
    assert list(index) == [
        {"__key__": "3.png", "path": f"{source}/3.png", "folder": "images"},
        {"__key__": "cats/1.PNG", "path": f"{source}/cats/1.PNG", "folder": "cats"},
        {"__key__": "cats/2.png", "path": f"{source}/cats/2.png", "folder": "cats"},
    ]
    os.rename(source / "3.png", source / "5.png")
    again = open_index(source, **options)
    assert [each["__key__"] for each in again] == ["5.png", "cats/1.PNG", "cats/2.png"]
    assert again.fingerprint != index.fingerprint
    (sample,) = open_index(source / "5.png", **options)
    assert sample["path"] == f"{source}/5.png"
    reader = PairReader(find_shards(source), wants_caption=False)
    assert count_pairs(reader) == 3


# === TFRecord ===


@pytest.fixture
def write_records(tmp_path):
    tf = pytest.importorskip("tensorflow")
    kinds = {int: "int64", float: "float", bytes: "bytes"}
    lists = {
        "int64": tf.train.Int64List,
        "float": tf.train.FloatList,
        "bytes": tf.train.BytesList,
    }

    def feature(value):
        values = value if isinstance(value, list) else [value]
        kind = kinds[type(values[0])] if values else "bytes"
        return tf.train.Feature(**{f"{kind}_list": lists[kind](value=values)})

    def write_records(name, samples):
        path = tmp_path / name
        with tf.io.TFRecordWriter(str(path), "GZIP" if ".gz" in name else "") as file:
            for sample in samples:
                features = {key: feature(value) for key, value in sample.items()}
                features = tf.train.Features(feature=features)
                file.write(tf.train.Example(features=features).SerializeToString())
        return path

    return write_records


def record(number, **others):
    content = random.Random(number).randbytes(3000 + number)
    caption = b"no %d" % number
    return {"image/encoded": content, "caption": caption, "image/id": number, **others}


def test_examples_are_samples_also_without_tensorflow(write_records, monkeypatch):
    samples = [
        *(record(number) for number in range(50)),
        record(3),
        {"image/encoded": bytes(9), "caption": [b"", b"second"], "key": b"\xff"},
        {"image/encoded": [bytes(9), bytes(9)], "caption": b"x" * 2000},
        {"image/encoded": bytes(9), "caption": b" " * 2000},
        {"image/encoded": bytes(9), "caption": []},
        {"image/encoded": [], "caption": b"x"},
        {"image/encoded": bytes(9), "caption": [1.5, -2.0], "x": [-1, 2**40]},
        {},
    ]
    source = write_records("x.tfrecord", samples)
    index = assert_agrees(source)
    assert index.faults["by_reason"] == {
        "duplicate key": 1,
        "empty caption": 2,
        "no image": 2,
    }
    reader = PairReader(find_shards(source))
    expected = {s["__key__"]: s for s in reader.shards[0].read()}
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    every = [*expected["00000056"]]
    assert index.read(len(index) - 1, every) == expected["00000056"]
    assert [each["__key__"] for each in index][49:52] == ["49", "\udcff", "00000052"]


@pytest.mark.filterwarnings("ignore")
def test_a_cut_or_a_wrong_length_ends_a_file_of_records(write_records):
    source = write_records("x.tfrecord", [record(number) for number in range(4)])
    content = source.read_bytes()
    for cut in (1, 11, 13, 3000, 5000, len(content) - 1):
        source.write_bytes(content[:cut])
        index = assert_agrees(source)
        assert index.faults["by_reason"] == {"damaged shard": 1}
    source.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert_agrees(source)


def test_compressed_records_are_refused(write_records):
    source = write_records("x.tfrecord.gz", [record(0)])
    with pytest.raises(NoRandomAccess, match=r"x\.tfrecord\.gz"):
        open_index(source)
    assert count_pairs(PairReader(find_shards(source))) == 1


# === Objects ===


class Samples:
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.mark.parametrize("kind", [list, Samples])
def test_objects_are_sources(kind):
    samples = [
        {"image": {"bytes": b"i", "path": None}, "text": "one", "other": 1},
        {"image": {"bytes": None, "path": "a.jpg"}, "text": None, "__key__": "k"},
    ]
    index = open_index(kind(samples))
    assert len(index) == 2
    assert index[0] == {"__key__": "0", "image": b"i", "text": "one"}
    assert index[-1] == {"__key__": "k", "image": "a.jpg"}
    assert index.key(1) == "k"
    reader = PairReader([])
    assert reader.pair(index.shard_of(0), index[0])[0].captions == ("one",)
    assert reader.pair(index.shard_of(1), index[1]) == (None, "no caption")
    copy = pickle.loads(pickle.dumps(index))
    assert (list(copy), copy.fingerprint) == (list(index), index.fingerprint)


def test_objects_with_other_samples_are_refused_when_they_are_read():
    from PIL import Image

    with pytest.raises(ValueError, match=r"dicts.*Received: a tuple as sample 0"):
        open_index([("a", "b")])[0]
    decoded = open_index([{"image": Image.new("RGB", (2, 2)), "text": "t"}])
    with pytest.raises(ValueError, match=r"not decoded.*decode=False.*Received: Image"):
        decoded[0]


# === Files of the index ===


def test_a_part_is_built_once_and_again_if_the_shard_changes(write_tar, monkeypatch):
    source = write_tar("x.tar", tar_files(5))
    index = open_index(source)
    build = index_parts.build_part
    built = []

    def count(path, index_dir):
        built.append(path)
        return build(path, index_dir)

    monkeypatch.setattr("keras_cluster_mask.data.index_parts.build_part", count)
    assert open_index(source).fingerprint == index.fingerprint
    assert built == []
    write_tar("x.tar", tar_files(6))
    with pytest.raises(ValueError, match=r"must not change.*x\.tar"):
        index[0]
    again = open_index(source)
    assert len(again) == 6
    assert built == [str(source)]
    assert again.fingerprint != index.fingerprint
    with pytest.raises(ValueError, match="open the index again"):
        index[1]
    with pytest.raises(ValueError, match="open the index again"):
        pickle.loads(pickle.dumps(index))
    # The same size and another date.
    os.utime(source, (1, 1))
    assert open_index(source).fingerprint == again.fingerprint
    assert len(built) == 2


def test_a_shard_that_changes_while_it_is_read_is_found(write_tar):
    source = write_tar("x.tar", tar_files(5))
    index = open_index(source)
    assert index[0]["__key__"] == "a/0000"
    with open(source, "r+b") as file:
        file.write(write_tar("y.tar", tar_files(5, start=7)).read_bytes())
    with pytest.raises(ValueError, match="another sample is in its place"):
        index[1]
    os.truncate(source, 100)
    with pytest.raises(ValueError, match=r"must not change.*x\.tar"):
        index[2]


def test_moving_shards_does_not_change_the_fingerprint(write_tar, tmp_path):
    first = open_index(write_tar("x.tar", tar_files(5)))
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "x.tar", tmp_path / "moved" / "y.tar")
    assert open_index(tmp_path / "moved" / "y.tar").fingerprint == first.fingerprint


def test_a_damaged_part_is_built_again(write_tar):
    source = write_tar("x.tar", tar_files(5))
    part = source.parent / ".x.tar.index"
    expected = open_index(source).fingerprint
    content = part.read_bytes()
    for damaged in (b"", b"{}\n", content[:-1], b"\xff" * 99, content[:40]):
        part.write_bytes(damaged)
        assert open_index(source).fingerprint == expected
        assert part.read_bytes() == content


def test_a_folder_for_the_index_can_be_named(write_tar, tmp_path):
    source = [write_tar("x.tar", tar_files(5)), write_tar("y.tar", tar_files(2))]
    index = open_index(source, index_dir=tmp_path / "new" / "index")
    assert len(index) == 7
    names = sorted(path.name for path in (tmp_path / "new" / "index").iterdir())
    assert [name[:6] for name in names] == ["x.tar-", "y.tar-"]
    assert not (tmp_path / ".x.tar.index").exists()


def test_the_index_of_a_read_only_folder_is_in_the_cache(write_tar, monkeypatch):
    source = write_tar("x.tar", tar_files(5))
    replace = os.replace

    def refuse(old, new):
        if os.path.dirname(new) == str(source.parent):
            raise PermissionError(13, "Permission denied", new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    reader = PairReader(find_shards(source))
    assert count_pairs(reader) == 5
    assert [path.name for path in source.parent.iterdir()] == ["x.tar"]
    cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])
    assert len(list((cache / "keras_cluster_mask" / "index").iterdir())) == 1
    monkeypatch.setattr("keras_cluster_mask.data.index_parts.build_part", pytest.fail)
    assert len(open_index(source)) == 5
    with pytest.raises(OSError, match="`index_dir` must be a folder"):
        index_parts._write([str(source / "x")], [])


def test_shards_at_addresses_are_indexed(write_tar):
    system = pytest.importorskip("fsspec").filesystem("memory")
    source = write_tar("x.tar", tar_files(5))
    system.pipe("/index/x.tar", source.read_bytes())
    try:
        index = open_index("memory://index/x.tar")
        assert list(index) == list(open_index(source))
        assert index.fingerprint == open_index(source).fingerprint
        assert system.ls("/index", detail=False) == ["/index/x.tar"]
    finally:
        system.rm("/index", recursive=True)


def test_a_shard_that_cannot_be_read_is_counted(write_tar, monkeypatch):
    sources = [write_tar(f"{n}.tar", tar_files(2, start=n)) for n in range(3)]
    opened = files.open_file

    def refuse(path, *options, **others):
        if os.fspath(path) == str(sources[1]):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return opened(path, *options, **others)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_file", refuse)
        index = assert_agrees(sources)
    assert index.faults["by_shard"] == {str(sources[1]): {"unreadable shard": 1}}
    assert "Permission denied" in index.faults["details"][str(sources[1])]
    copy = pickle.loads(pickle.dumps(index))
    assert (len(copy), copy.faults) == (4, index.faults)
    # What went wrong once is tried again.
    assert len(open_index(sources)) == 6


def test_a_pickle_holds_the_names_of_files(write_tar):
    source = [write_tar("x.tar", tar_files(500)), write_tar("y.tar", tar_files(3))]
    index = open_index(source)
    index[3]
    content = pickle.dumps(index)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert list(copy) == list(index)
    assert (copy.faults, copy.fingerprint) == (index.faults, index.fingerprint)


def test_threads_may_read_at_the_same_time(write_tar, monkeypatch):
    monkeypatch.setattr("keras_cluster_mask.data.index.OPEN_FILES", 2)
    source = [write_tar(f"{n}.tar", tar_files(20, start=20 * n)) for n in range(5)]
    index = open_index(source)
    expected = list(index)
    wrong = []

    def read(seed):
        for number in random.Random(seed).choices(range(100), k=200):
            if index[number] != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def build_often(path, barrier):
    for _ in range(20):
        barrier.wait(60)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(os.path.dirname(path), ".x.tar.index"))
        assert len(build_parts([path])[0]) == 200


@pytest.mark.slow
def test_two_processes_may_build_the_same_part(write_tar):
    source = write_tar("x.tar", tar_files(200))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=build_often, args=(str(source), barrier))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    names = sorted(path.name for path in source.parent.iterdir())
    assert names == [".x.tar.index", "x.tar"]
    assert_agrees(source)


@pytest.mark.slow
def test_workers_build_what_is_missing_without_keras(write_tar, tmp_path):
    source = [write_tar(f"{n}.tar", tar_files(3, start=3 * n)) for n in range(4)]
    expected = open_index(source[:1])
    index = open_index(source, num_workers=2)
    assert len(index) == 12
    assert index[0] == expected[0]
    packed = write_tar("z.tar", tar_files(2), "w:gz")
    with pytest.raises(NoRandomAccess, match=r"z\.tar"):
        open_index([*source, packed], num_workers=2, index_dir=tmp_path / "index")
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "def loaded():\n"
        "    import keras_cluster_mask.data.index\n"
        "    return [n for n in ('keras', 'tensorflow', 'jax') if n in sys.modules]\n"
        "if __name__ == '__main__':\n"
        "    pool = multiprocessing.get_context('spawn').Pool(1)\n"
        "    print(pool.apply(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_gz_name_is_no_reason_to_refuse_a_plain_tar(write_tar):
    source = write_tar("x.tar", tar_files(2))
    plain = source.rename(source.parent / "x.tar.gz")
    assert len(open_index(plain)) == 2
    plain.write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(NoRandomAccess):
        open_index(plain)
