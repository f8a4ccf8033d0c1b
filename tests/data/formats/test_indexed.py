"""The files that hold the index: where they are, and when they are written again."""

import concurrent.futures
import errno
import functools
import http.server
import os
import pathlib
import pickle
import threading

import pytest

from keras_cluster_mask.data import files
from keras_cluster_mask.data.formats import indexed
from keras_cluster_mask.data.formats.tar import Tar
from keras_cluster_mask.data.paths import open_source
from tests.data.reading import pairs_of

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*is damaged"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "keras_cluster_mask" / "index"


@pytest.fixture
def scanned(monkeypatch):
    """list of the names of the shards that were scanned, in order."""
    names, scan = [], Tar.scan

    def counting(self, path, context):
        names.append(os.path.basename(path))
        yield from scan(self, path, context)

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


def keys(source):
    return [item["__key__"] for item in source]


def test_a_changed_shard_is_indexed_again_and_no_other(source, scanned, write_pairs):
    before = open_source(source)
    scanned.clear()
    write_pairs("shards/1.tar", 50, 5)
    after = open_source(source)
    assert scanned == ["1.tar"]
    assert keys(after)[:3] == keys(before)[:3]
    assert keys(after)[3:8] == [f"{n:04}" for n in range(50, 55)]
    # Also if it has as many bytes as before.
    os.utime(source.replace("*", "3"), (1, 1))
    open_source(source)
    assert scanned == ["1.tar", "3.tar"]


def test_a_damaged_index_is_written_again(source, scanned, cache):
    expected = keys(open_source(source))
    path = next(cache.glob("0.tar-*"))
    content = path.read_bytes()
    for damaged in (b"", content[:-1], b"[1]\n" + content, b"\xff" * 100):
        scanned.clear()
        # A file that is mapped into memory must not become shorter.
        path.unlink()
        path.write_bytes(damaged)
        assert keys(open_source(source)) == expected
        assert scanned == ["0.tar"]


def test_several_programs_may_index_the_same_shards(source, cache):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        opened = [*pool.map(lambda _: open_source(source), range(4))]
    assert all(keys(each) == keys(opened[0]) for each in opened)
    assert len([*cache.iterdir()]) == 4


def test_files_of_one_name_have_indexes_of_their_own(tmp_path, write_pairs, cache):
    for folder, count in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        write_pairs(f"{folder}/x.tar", 0, count)
    assert keys(open_source(f"{tmp_path}/?/x.tar")) == ["0000", "0000", "0001"]
    assert len([*cache.glob("x.tar-*")]) == 2


def test_a_full_disk_names_the_cache_and_its_variable(source, cache, monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    message = (
        rf"free some space.*XDG_CACHE_HOME.*Received: {cache}/0.tar.* No space left"
    )
    with pytest.raises(OSError, match=message) as raised:
        open_source(source)
    assert raised.value.errno == errno.ENOSPC
    assert not [*cache.iterdir()]


def test_shards_at_addresses_are_indexed_once(source, scanned, memory):
    local = sorted(pathlib.Path(source).parent.iterdir())
    for path in local:
        memory.put(str(path), f"/indexed/{path.name}")
    remote = open_source("memory://indexed/*.tar")
    assert remote.fingerprint == open_source(source).fingerprint
    scanned.clear()
    assert keys(open_source("memory://indexed/*.tar")) == keys(remote)
    assert scanned == []
    memory.put(str(local[0]), "/indexed/3.tar")
    assert keys(open_source("memory://indexed/*.tar"))[-3:] == keys(remote)[:3]
    assert scanned == ["3.tar"]


def test_a_server_that_sends_whole_files_only_is_an_error(source):
    folder = os.path.dirname(source)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/0.tar"
        (error,) = files.read_ranges([(address, 0, 9)])
        assert "range requests" in str(error)
        server.shutdown()


# === What an index holds ===


def test_a_pickle_holds_names_and_an_index_24_bytes_a_sample(
    tmp_path, write_tar, cache
):
    small = open_source(write_tar("a.tar", pairs_of([b"-"])))
    large = open_source(write_tar("b.tar", pairs_of([b"-"] * 2000)))
    sizes = [len(pickle.dumps(each)) for each in (small, large)]
    assert sizes[1] < sizes[0] + 20 < 2000
    sizes = [next(cache.glob(f"{n}.tar-*")).stat().st_size for n in "ab"]
    assert 0 <= sizes[1] - sizes[0] - 1999 * 24 < 20
    again = pickle.loads(pickle.dumps(large))
    assert again.fingerprint == large.fingerprint
    assert [again[n]["__key__"] for n in (1999, 0)] == ["1999", "00"]
    for number in (2000, -1):
        with pytest.raises(IndexError):
            large[number]


def test_keys_and_names_of_any_letters_are_kept(write_tar):
    odd = "odd\udcff\u2028\n"
    path = write_tar("a.tar", [(f"{odd}.j\udcff", b"j"), (f"{odd}.txt", b"t")])
    (item,) = open_source(path)
    assert (item["__key__"], item["txt"]) == (odd, b"t")


def test_more_files_than_may_be_open_are_read(tmp_path, write_tar):
    resource = pytest.importorskip("resource")
    count = indexed.MAX_OPEN + 100
    for index in range(count):
        write_tar(f"{index}.tar", [(f"{index}.jpg", b"j"), (f"{index}.txt", b"t")])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of open files, new ones get the lowest free number.
    with open(tmp_path / "0.tar") as file:
        lowest = file.fileno()
    limit = lowest + indexed.MAX_OPEN + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        assert len({*keys(open_source(f"{tmp_path}/*.tar"))}) == count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


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
        path = write_rows("x.jsonl", [{"text": "a" * 90_000}] * 79)
    assert len(open_source(f"{server.url}/{path.name}")) == 79
    # The metadata at the end of a Parquet file is read first.
    extra = 2**16 if format == "parquet" else 1
    assert 2**21 < sum(server.sent) <= path.stat().st_size + extra
