"""The files that hold the index: where they are, and when they are built again."""

import concurrent.futures
import errno
import functools
import http.server
import json
import os
import pathlib
import pickle
import shutil
import threading

import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats.tar import Tar
from keras_cluster_mask.data.parts import build_parts, read_part
from keras_cluster_mask.data.samples import IMAGE_KEYS
from keras_cluster_mask.data.shards import find_shards
from tests.data.reading import pairs_of

pytestmark = pytest.mark.any_backend


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def scanned(monkeypatch):
    """list of the names of the shards that were scanned, in order."""
    names, scan = [], Tar.scan

    def counting(self, path):
        names.append(os.path.basename(path))
        yield from scan(self, path)

    monkeypatch.setattr(Tar, "scan", counting)
    return names


@pytest.fixture
def source(tmp_path, write_pairs):
    """A pattern of four shards of three pairs, one of them damaged."""
    (tmp_path / "shards").mkdir()
    for index in range(4):
        path = write_pairs(f"shards/{index}.tar", 3 * index, 3)
        if index == 2:
            path.write_bytes(path.read_bytes()[: 512 * 9])
    return f"{tmp_path}/shards/*.tar"


def build(source, **options):
    return build_parts(find_shards(source), IMAGE_KEYS, **options)


def contents(built):
    return [pathlib.Path(part.path).read_bytes() for part in built]


def test_a_changed_shard_is_indexed_again_and_no_other(source, scanned, write_pairs):
    before = build(source)
    scanned.clear()
    write_pairs("shards/1.tar", 50, 5)
    after = build(source)
    assert scanned == ["1.tar"]
    assert [part.num_records for part in after] == [3, 5, before[2].num_records, 3]
    # Also if it has as many bytes as before.
    path = pathlib.Path(source).parent / "3.tar"
    os.utime(path, (1, 1))
    build(source)
    assert scanned == ["1.tar", "3.tar"]


def test_a_damaged_part_is_built_again(source, scanned):
    built = build(source)
    expected = contents(built)
    for damage in (
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"[1]\n" + content,
        lambda content: b"\xff" * 100,
        lambda content: content.replace(b'"version": 6', b'"version": 5'),
        lambda content: content.replace(b'"digest"', b'"digits"'),
    ):
        scanned.clear()
        path = pathlib.Path(built[0].path)
        path.write_bytes(damage(path.read_bytes()))
        assert contents(build(source)) == expected
        assert scanned == ["0.tar"]


@pytest.mark.slow
def test_processes_build_the_same_parts(source, tmp_path):
    serial = build(source, index_dir=tmp_path / "serial")
    parallel = build(source, index_dir=tmp_path / "parallel", num_workers=2)
    assert contents(parallel) == contents(serial)
    assert [part.damage is None for part in parallel] == [True, True, False, True]


@pytest.mark.slow
def test_an_error_in_a_process_is_raised(source, write_tar):
    write_tar("shards/9.tar.gz", [("1.jpg", b"j")], "w:gz")
    with pytest.raises(ValueError, match=r"without compression.*/9\.tar\.gz"):
        build(f"{source}*", num_workers=1)


def test_several_programs_may_index_the_same_shards(source):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        built = [*pool.map(lambda _: build(source, index_dir="beside"), range(4))]
    assert all(each == built[0] for each in built)
    names = sorted(os.listdir(os.path.dirname(source)))
    hidden = [f".{index}.tar.index" for index in range(4)]
    assert names == [*hidden, "0.tar", "1.tar", "2.tar", "3.tar"]


# === Where parts are ===


def test_parts_are_in_the_cache_in_the_given_folder_or_beside_the_shards(
    source, tmp_path, cache, scanned
):
    folder = os.path.dirname(source)
    assert all(part.path.startswith(str(cache)) for part in build(source))
    assert sorted(os.listdir(folder)) == [f"{index}.tar" for index in range(4)]
    given = build(source, index_dir=tmp_path / "new" / "index")
    assert {os.path.dirname(part.path) for part in given} == {f"{tmp_path}/new/index"}
    beside = build(source, index_dir="beside")
    # A part in the cache is used.
    assert all(part.path.startswith(str(cache)) for part in beside)
    shutil.rmtree(cache)
    beside = build(source, index_dir="beside")
    assert [p.path for p in beside] == [f"{folder}/.{i}.tar.index" for i in range(4)]
    scanned.clear()
    # They need no cache then, for anyone.
    assert build(source) == beside
    assert scanned == []


def test_shards_of_one_name_have_parts_of_their_own(tmp_path, write_pairs):
    for folder, count in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        write_pairs(f"{folder}/x.tar", 0, count)
    built = build(f"{tmp_path}/?/x.tar", index_dir=tmp_path / "index")
    assert [part.num_records for part in built] == [1, 2]


def test_a_folder_that_cannot_be_written_to_is_indexed_in_the_cache(
    source, cache, scanned
):
    folder = os.path.dirname(source)
    for index in range(4):
        # No file can replace a folder, whoever the user is.
        os.makedirs(f"{folder}/.{index}.tar.index/x")
    built = build(source, index_dir="beside")
    assert all(part.path.startswith(str(cache)) for part in built)
    assert build(source, index_dir="beside") == built
    assert len(scanned) == 4


def test_a_full_disk_names_the_index_and_the_argument(source, tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    message = rf"`index_dir`.*free space.*Received: {tmp_path}/x/0.tar.* No space left"
    with pytest.raises(OSError, match=message) as raised:
        build(source, index_dir=tmp_path / "x")
    assert raised.value.errno == errno.ENOSPC
    assert not [*(tmp_path / "x").iterdir()]


def test_shards_at_addresses_are_indexed_in_the_cache(source, cache, scanned, memory):
    local = list(find_shards(source))
    for path in local:
        memory.put(path, f"/indexed/{os.path.basename(path)}")
    remote = build("memory://indexed/*.tar")
    assert all(part.path.startswith(str(cache)) for part in remote)
    assert [part.digest for part in remote] == [p.digest for p in build(source)]
    scanned.clear()
    assert build("memory://indexed/*.tar") == remote
    assert scanned == []
    memory.put(local[0], "/indexed/3.tar")
    assert build("memory://indexed/*.tar")[3].digest == remote[0].digest
    assert scanned == ["3.tar"]


def test_a_shard_that_cannot_be_opened_is_opened_again(source, monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0, 0.0))
    failures, open_file = [OSError(5, "reset")] * 2, files.open_file

    def fails_twice(path, *arguments):
        if path.endswith("0.tar") and failures:
            raise failures.pop()
        return open_file(path, *arguments)

    monkeypatch.setattr(files, "open_file", fails_twice)
    assert [part.num_records for part in build(source)][::3] == [3, 3]
    assert not failures
    failures.extend([OSError(5, "reset")] * 10)
    os.utime(source.replace("*", "0"), (1, 1))
    with pytest.raises(OSError, match="reset"):
        build(source)


def test_a_server_that_sends_whole_files_only_is_an_error(source):
    folder = os.path.dirname(source)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/0.tar"
        (error,) = files.read_ranges([(address, 0, 9)])
        assert "does not send parts" in str(error)
        server.shutdown()


# === What a part holds ===


def test_a_part_is_a_line_and_32_bytes_a_sample(source):
    (part, *_) = build(source)
    assert part.layouts == [[["png", "txt"], None, 3]]
    assert os.path.getsize(part.path) == part.start + 3 * 32 + len(part.stamp)


def test_keys_and_names_of_any_letters_are_kept(tmp_path, write_tar):
    odd = "odd\udcff\u2028\n"
    path = write_tar("a.tar", [(f"{odd}.j\udcff", b"j"), (f"{odd}.txt", b"t")])
    path.write_bytes(path.read_bytes()[:-9000])
    (part,) = build(path)
    head = json.loads(pathlib.Path(part.path).read_bytes().partition(b"\n")[0])
    assert head["layouts"] == part.layouts
    assert read_part(part.shard, part.path) == part
    assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize("format", ["tar", "parquet", "jsonl"])
def test_indexing_requests_each_byte_of_a_file_once(
    server, write_tar, write_rows, format
):
    images = [os.urandom(3000 * size) for size in range(1, 80)]
    if format == "tar":
        path = write_tar("x.tar", pairs_of(images))
    elif format == "parquet":
        path = write_rows("x.parquet", [{"image": image} for image in images])
    else:
        path = write_rows("x.jsonl", [{"image": "a" * 30, "text": "a" * 90_000}] * 79)
    (part,) = build(f"{server.url}/{path.name}")
    assert part.num_records == 79
    # The metadata at the end of a Parquet file is read first.
    extra = 2**16 if format == "parquet" else 1
    assert 2**21 < sum(server.sent) <= path.stat().st_size + extra
