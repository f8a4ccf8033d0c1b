"""Which files a source names, and what all formats have in common."""

import gzip
import pathlib
import re
import sys

import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import example_images
from keras_cluster_mask.data.paths import find_files, format_of, open_source
from keras_cluster_mask.data.samples import Fields
from tests.data.formats.conftest import ROWS

pytestmark = pytest.mark.any_backend


@pytest.fixture
def folder(tmp_path):
    for name in ("train-00.tar", "train-01.tar", "train-02.tar", "test-[x].tar"):
        (tmp_path / name).touch()
    return tmp_path


def list_files(source):
    several = source if isinstance(source, list) else [source]
    return sorted({path for each in several for path in find_files(each)})


def names(source):
    return [shard.rpartition("/")[2] for shard in list_files(source)]


@pytest.mark.parametrize("place", ["local", "memory://tars"])
def test_paths_patterns_and_lists_name_shards_sorted_and_once(folder, memory, place):
    if place == "local":
        place = folder
    else:
        memory.put(f"{folder}/", "/tars/", recursive=True)
    every = ["train-00.tar", "train-01.tar", "train-02.tar"]
    for pattern, expected in {
        "train-01.tar": every[1:2],
        "train-*.tar": every,
        "train-{00..02}.tar": every,
        "train-{02,00}.tar": every[::2],
        "train-{0{0,1},02}.tar": every,
        "{train,tr*}-0{1..2}.tar": every[1:],
    }.items():
        assert names(f"{place}/{pattern}") == expected
    assert names([f"{place}/train-02.tar", f"{place}/*0[12].tar"]) == every[1:]
    assert names(folder / "test-[x].tar") == ["test-[x].tar"]


def test_two_names_of_a_file_are_one_shard(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source = ["train-00.tar", "./train-00.tar", folder / "x" / ".." / "train-00.tar"]
    assert list_files(source) == [f"{folder}/train-00.tar"]
    monkeypatch.setenv("HOME", str(folder))
    assert list_files("~/train-0{0..0}.tar") == [f"{folder}/train-00.tar"]


def test_a_file_may_have_braces_in_its_name(tmp_path):
    (tmp_path / "a{b}.tar").touch()
    assert names(tmp_path / "a{b}.tar") == ["a{b}.tar"]


def test_a_folder_is_represented_by_its_table(tmp_path, memory):
    for name in ("manifest.jsonl", "metadata.tsv", "captions.csv"):
        (tmp_path / name).touch()
        assert names(tmp_path) == [name]
        assert names(f"{tmp_path}/") == [name]
        (tmp_path / name).unlink()
    # Nothing says which of two is meant.
    for name in ("metadata.csv", "captions.csv"):
        (tmp_path / name).touch()
    received = rf"{tmp_path}/ with metadata.csv, captions.csv"
    with pytest.raises(ValueError, match=f"`source` must.*Received: {received}"):
        names(tmp_path)
    assert names(tmp_path / "captions.csv") == ["captions.csv"]
    memory.pipe("/set/metadata.csv", b"file_name,text")
    assert names("memory://set") == ["metadata.csv"]


def test_the_extension_decides_the_format():
    formats = {
        "a.CSV": "Table",
        "a.ndjson": "Table",
        "a.parquet": "Parquet",
        "a.JPEG": "Folder",
        "a/": "Folder",
        "a.tar.gz": "Tar",
        "a": "Tar",
    }
    assert {path: format_of(path).__name__ for path in formats} == formats


# === All formats ===


def texts(fields):
    found = [fields[name] for name in ("image", "caption")]
    return [x.decode() if isinstance(x, bytes) else x for x in found]


def test_samples_are_read_from_a_file_and_an_address(shard, memory, read_all):
    samples, faults = read_all(shard)
    assert faults == []
    assert [key for key, _ in samples] == ["k0", "k1", "k2"]
    assert [texts(fields) for _, fields in samples] == [
        [row["image"], row["caption"]] for row in ROWS
    ]
    memory.pipe(f"/set/{shard.name}", shard.read_bytes())
    assert read_all(f"memory://set/{shard.name}") == (samples, [])


def test_a_missing_file_is_not_a_damaged_one(shard):
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        format_of(str(shard))({str(shard): ""})


def test_a_fault_calls_a_file_what_it_is(shard):
    source = open_source(shard)
    shard.unlink()
    fault = Fields(()).sample(source[2])
    nouns = {".tar": "shard", ".parquet": "Parquet file"}
    noun = nouns.get(shard.suffix, "table")
    start = f"the sample '2' of {shard}: the {noun} cannot be read ("
    assert str(fault).startswith(start)


@pytest.mark.parametrize(
    "name",
    [
        *("x.tar.gz", "x.json", "x.zip", "x", "x.csv.zip"),
        *("x.tfrecord", "x.tfrecord-00000-of-00002"),
    ],
)
def test_other_and_compressed_files_are_refused(name, write):
    contents = {"gz": gzip.compress(bytes(2048)), "zip": b"PK\3\4" + bytes(2048)}
    path = write(name, contents.get(name.rpartition(".")[2], b'{"images": []}'))
    remedy = rf"`source`.*unknown format.*TFRecordDataset.*Received: source='{path}'"
    with pytest.raises(ValueError, match=remedy):
        open_source(path)


# === Addresses ===


@pytest.mark.parametrize("pattern", ["{000..299}.tar", "*.tar", "[012]??.tar"])
def test_a_pattern_costs_a_listing_whatever_the_number_of_files(
    memory, monkeypatch, pattern
):
    for index in range(300):
        memory.pipe(f"/many/{index:03}.tar", b"")
    requests = []
    for name in ("ls", "find"):
        method = getattr(memory, name)

        def counted(*arguments, name=name, method=method, **options):
            requests.append(name)
            return method(*arguments, **options)

        monkeypatch.setattr(memory, name, counted)
    assert len(list_files(f"memory://many/{pattern}")) == 300
    assert len(requests) == 1


# === Refusals ===


@pytest.mark.parametrize(
    ("source", "error", "received"),
    [
        ("train-{00..03}.tar", FileNotFoundError, "train-03.tar"),
        ("valid-*.tar", FileNotFoundError, "valid-*.tar"),
        ("memory://tars/{00..03}.tar", FileNotFoundError, "memory://tars/00.tar"),
        ("memory://no/*.tar", FileNotFoundError, "memory://no/*.tar"),
        ("train-{2..0}.tar", FileNotFoundError, "train-2.tar"),
        ("train-{a}.tar", FileNotFoundError, "train-{a}.tar"),
        ("nothing://a/x.tar", ValueError, "nothing://a/x.tar"),
        # The package that opens an address is named.
        ("s3://b/x.tar", ImportError, "s3://b/x.tar"),
    ],
)
def test_what_is_no_shard_is_refused(
    folder, memory, monkeypatch, source, error, received
):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=rf"`source`.*Received.*{re.escape(received)}"):
        list_files(source)


# === The example images ===


def test_example_images_are_a_part_of_the_package():
    folder = pathlib.Path(kcm.__file__).parent / "datasets" / "images"
    assert example_images() == folder
    assert len(list_files(folder / "train-*.tar")) == 4
