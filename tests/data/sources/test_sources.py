import sys

import pytest

from keras_cluster_mask.data import list_shards
from keras_cluster_mask.data.sources import find_shards, read_samples

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


def test_missing_shards_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"missing.*train-03\.tar"):
        list_shards(f"{folder}/train-{{00..03}}.tar")
    with pytest.raises(FileNotFoundError, match=r"pattern.*valid-\*\.tar"):
        list_shards(folder / "valid-*.tar")
    with pytest.raises(FileNotFoundError, match=r"Received a folder"):
        list_shards(folder)
    with pytest.raises(ValueError, match=r"`source`.*Received: \[\]"):
        list_shards([])
    with pytest.raises(ValueError, match=r"`source`.*\{2\.\.0\}"):
        list_shards("train-{2..0}.tar")
    with pytest.raises(ValueError, match=r"`source`.*\{a\}"):
        list_shards("train-{a}.tar")


def test_a_folder_stands_for_its_manifest(tmp_path):
    for name in ("manifest.jsonl", "metadata.tsv", "metadata.csv"):
        (tmp_path / name).touch()
        assert names(tmp_path) == [name]
        assert names(f"{tmp_path}/") == [name]


def test_the_ending_tells_the_kind(folder):
    kinds = {
        "a.TFRecord": "RecordShard",
        "a.tfrec.gz": "RecordShard",
        "a.tfrecords": "RecordShard",
        "a.CSV": "ManifestPart",
        "a.ndjson": "ManifestPart",
        "a": "TarShard",
    }
    for name, kind in kinds.items():
        (folder / name).touch()
        (shard,) = find_shards(folder / name)
        assert type(shard).__name__ == kind


# === Addresses ===


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield system
    for path in system.ls("/", detail=False):
        system.rm(path, recursive=True)


def test_tars_at_addresses_are_listed_and_read(memory, write_tar):
    for index in range(3):
        path = write_tar("x.tar", [(f"{index}.jpg", b"j")])
        memory.pipe(f"/tars/{index:02}.tar", path.read_bytes())
    every = ["00.tar", "01.tar", "02.tar"]
    assert names("memory://tars/*.tar") == every
    assert names("memory://tars/{00..02}.tar") == every
    assert names("memory://tars/0[12].tar") == every[1:]
    assert names(["memory://tars/00.tar", "memory://tars/{00,02}.tar"]) == every[::2]
    for shard in list_shards("memory://tars/*.tar"):
        (sample,) = read_samples(shard)
        assert sample["__key__"] == str(int(shard[-6:-4]))
    with pytest.raises(FileNotFoundError, match=r"missing.*memory://tars/03\.tar"):
        list_shards("memory://tars/{00..03}.tar")
    with pytest.raises(FileNotFoundError, match=r"pattern.*memory://no/\*\.tar"):
        list_shards("memory://no/*.tar")


def test_a_compressed_tar_at_an_address_is_read(memory, write_tar):
    path = write_tar("x.tar", [("1.jpg", b"j")], "w:gz")
    memory.pipe("/tars/x.tar.gz", path.read_bytes())
    (sample,) = read_samples("memory://tars/x.tar.gz")
    assert sample == {"__key__": "1", "jpg": b"j"}


def test_a_folder_at_an_address_stands_for_its_manifest(memory):
    memory.pipe("/set/metadata.csv", b"file_name,text\na.png,a")
    memory.pipe("/empty/other.txt", b"")
    assert names("memory://set") == ["metadata.csv"]
    (shard,) = find_shards("memory://set")
    assert shard.path_of("b/a.png") == "memory://set/b/a.png"
    assert shard.path_of("s3://x/a.png") == "s3://x/a.png"
    with pytest.raises(FileNotFoundError, match=r"Received a folder.*memory://empty"):
        list_shards("memory://empty")


@pytest.mark.parametrize(
    ("address", "package"),
    [
        ("s3://bucket/x.tar", "pip install fsspec s3fs"),
        ("gs://bucket/x.tar", "pip install fsspec gcsfs"),
        ("nothing://bucket/x.tar", "pip install fsspec"),
    ],
)
def test_what_opens_an_address_is_named_if_it_is_missing(monkeypatch, address, package):
    # As if neither these nor TensorFlow, which opens gs:// itself, were installed.
    for name in ("s3fs", "gcsfs", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{package}`.*Received: {address}"):
        list_shards(address)
