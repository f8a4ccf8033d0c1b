"""Which files a source names, and which format they have."""

import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from keras_cluster_mask.data import list_shards
from keras_cluster_mask.data.formats import format_of

pytestmark = pytest.mark.any_backend


@pytest.fixture
def folder(tmp_path):
    for name in ("train-00.tar", "train-01.tar", "train-02.tar", "test-[x].tar"):
        (tmp_path / name).touch()
    return tmp_path


def names(source):
    return [shard.rpartition("/")[2] for shard in list_shards(source)]


def test_paths_patterns_and_lists_name_shards_sorted_and_once(folder):
    every = ["train-00.tar", "train-01.tar", "train-02.tar"]
    assert names(folder / "train-01.tar") == ["train-01.tar"]
    assert names(str(folder / "train-*.tar")) == every
    assert names(f"{folder}/train-{{00..02}}.tar") == every
    assert names(f"{folder}/train-{{02,00}}.tar") == ["train-00.tar", "train-02.tar"]
    assert names(f"{folder}/train-{{0{{0,1}},02}}.tar") == every
    assert names(f"{folder}/{{train,tr*}}-0{{1..2}}.tar") == every[1:]
    assert names([folder / "train-02.tar", f"{folder}/*0[12].tar"]) == every[1:]
    assert names(folder / "test-[x].tar") == ["test-[x].tar"]


def test_two_names_of_a_file_are_one_shard(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source = ["train-00.tar", "./train-00.tar", folder / "x" / ".." / "train-00.tar"]
    assert list_shards(source) == [f"{folder}/train-00.tar"]
    monkeypatch.setenv("HOME", str(folder))
    assert list_shards("~/train-0{0..0}.tar") == [f"{folder}/train-00.tar"]


def test_a_file_may_have_braces_in_its_name(tmp_path):
    (tmp_path / "a{b}.tar").touch()
    assert names(tmp_path / "a{b}.tar") == ["a{b}.tar"]


def test_missing_shards_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"missing.*train-03\.tar"):
        list_shards(f"{folder}/train-{{00..03}}.tar")
    with pytest.raises(FileNotFoundError, match=r"pattern.*valid-\*\.tar"):
        list_shards(folder / "valid-*.tar")
    with pytest.raises(FileNotFoundError, match=r"Received a folder"):
        list_shards(folder)


@pytest.mark.parametrize(
    "source", [[], "train-{2..0}.tar", "train-{a}.tar", 3, [None], [["a.tar"]]]
)
def test_sources_that_name_nothing_are_refused(source):
    with pytest.raises((ValueError, TypeError), match=r"`source`.*Received: "):
        list_shards(source)


def test_the_output_of_a_command_is_refused_with_what_helps():
    with pytest.raises(ValueError, match=r"the URL.*Received: source='pipe:cat a"):
        list_shards("pipe:cat a.tar")


def test_a_folder_is_represented_by_its_table(tmp_path):
    for name in ("manifest.jsonl", "metadata.tsv", "metadata.csv"):
        (tmp_path / name).touch()
        assert names(tmp_path) == [name]
        assert names(f"{tmp_path}/") == [name]


def test_the_extension_decides_the_format():
    formats = {
        "a.TFRecord": "TFRecord",
        "a.tfrecords": "TFRecord",
        "a.CSV": "Table",
        "a.ndjson": "Table",
        "a.parquet": "Parquet",
        "a.JPEG": "Folder",
        "a/": "Folder",
        "a.tar.gz": "Tar",
        "a": "Tar",
    }
    assert {path: type(format_of(path)).__name__ for path in formats} == formats


# === Addresses ===


def test_shards_at_addresses_are_listed(memory):
    for index in range(3):
        memory.pipe(f"/tars/{index:02}.tar", b"content")
    every = ["00.tar", "01.tar", "02.tar"]
    assert names("memory://tars/*.tar") == every
    assert names("memory://tars/{00..02}.tar") == every
    assert names("memory://tars/0[12].tar") == every[1:]
    assert names(["memory://tars/00.tar", "memory://tars/{00,02}.tar"]) == every[::2]
    for shard in list_shards("memory://tars/*.tar"):
        with fsspec.open(shard) as file:
            assert file.read() == b"content"
    with pytest.raises(FileNotFoundError, match=r"missing.*memory://tars/03\.tar"):
        list_shards("memory://tars/{00..03}.tar")
    with pytest.raises(FileNotFoundError, match=r"pattern.*memory://no/\*\.tar"):
        list_shards("memory://no/*.tar")


def test_a_folder_at_an_address_is_represented_by_its_table(memory):
    memory.pipe("/set/metadata.csv", b"file_name,text\na.png,a")
    memory.pipe("/empty/other.txt", b"")
    assert names("memory://set") == ["metadata.csv"]
    with pytest.raises(FileNotFoundError, match=r"Received a folder.*memory:.*empty"):
        list_shards("memory://empty")


class CountingFileSystem(MemoryFileSystem):
    """Counts the requests that an object store would answer."""

    protocol = "counting"
    store, pseudo_dirs, requests = {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def ls(self, path, *args, **kwargs):
        self.requests.append(("ls", path))
        return super().ls(path, *args, **kwargs)

    def find(self, path, *args, **kwargs):
        self.requests.append(("find", path))
        return super().find(path, *args, **kwargs)

    def info(self, path, **kwargs):
        self.requests.append(("info", path))
        return super().info(path, **kwargs)


@pytest.mark.parametrize("pattern", ["{000..299}.tar", "*.tar", "[012]??.tar"])
def test_a_pattern_costs_a_listing_whatever_the_number_of_files(pattern):
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    system = fsspec.filesystem("counting")
    for index in range(300):
        system.pipe(f"/many/{index:03}.tar", b"")
    system.requests.clear()
    assert len(list_shards(f"counting://many/{pattern}")) == 300
    listings = [name for name, _ in system.requests if name != "info"]
    assert len(listings) == 1
    assert len(system.requests) < 6


@pytest.mark.parametrize(
    ("address", "package"),
    [("s3://bucket/x.tar", "s3fs"), ("gs://bucket/x.tar", "gcsfs")],
)
def test_the_package_that_opens_an_address_is_named(monkeypatch, address, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"(?i)install {package}.*Received: .*{address}"
    with pytest.raises(ImportError, match=message):
        list_shards(address)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match=r"`source`.*nothing.*source='nothing://a"):
        list_shards("nothing://a/x.tar")
