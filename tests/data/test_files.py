import threading
import time
import zipfile

import pytest

from keras_cluster_mask.data import files, paths
from tests.data.reading import read_samples

pytestmark = pytest.mark.any_backend


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER", (0.0, 0.0))


# === Writing ===


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file"

    def write(content):
        with files.replacing(path) as file:
            file.write(content)
            file.flush()
            (name,) = {*names(path.parent)} - {"file"}
            # Hidden from patterns.
            assert name.startswith(".file.")
            assert name.endswith(".part")
            if content == b"half":
                raise KeyboardInterrupt

    write(b"all")
    with pytest.raises(KeyboardInterrupt):
        write(b"half")
    assert names(path.parent) == ["file"]
    assert path.read_bytes() == b"all"


def test_files_at_addresses_are_replaced(memory):
    for content in (b"old", b"newer"):
        with files.replacing("memory://replaced/file") as file:
            file.write(content)
        assert memory.cat("/replaced/file") == content
    assert memory.ls("/replaced", detail=False) == ["/replaced/file"]


# === Listing ===


def test_patterns_do_not_match_hidden_files(tmp_path, memory):
    for name in ("a.tar", ".a.tar.index", ".b.tar"):
        (tmp_path / name).touch()
        memory.pipe(f"/set/{name}", b"")
    for folder in (tmp_path, "memory://set"):
        for pattern in ("*", "*.*", "?.tar"):
            (found,) = paths.find_files(f"{folder}/{pattern}")
            assert found.rpartition("/")[2] == "a.tar"


# === Names ===


def read_all(source):
    """The keys, the images and the captions of the samples."""
    pairs, _ = read_samples(source, with_images=True)
    return [(pair.key, pair.image, *pair.captions) for pair in pairs]


def test_local_names_may_have_colons(write_tar, write_rows, tmp_path, monkeypatch):
    shard = write_tar("x::1.tar", [("a::b.png", b"png"), ("a::b.txt", b"one")])
    folder = tmp_path / "f::g"
    folder.mkdir()
    (folder / "a::b.png").write_bytes(b"png")
    (folder / "a::b.txt").write_bytes(b"one")
    rows = [{"path": "f::g/a::b.png", "text": "one"}]
    monkeypatch.chdir(tmp_path)
    for source in (shard, tmp_path / "*.tar", shard.name):
        assert read_all(source) == [("a::b", b"png", "one")]
    for source in (folder, folder.name):
        assert read_all(source) == [("a::b.png", b"png", "one")]
    assert read_all(write_rows("x::y.csv", rows)) == [(rows[0]["path"], b"png", "one")]
    assert read_all(rows) == [("0", b"png", "one")]


def test_chains_of_fsspec_are_read(write_tar, tmp_path, memory):
    shard = write_tar("x.tar", [("a.png", b"png"), ("a.txt", b"one")])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.write(shard, "x.tar")
        file.writestr("a.png", b"png")
    memory.put(f"{tmp_path}/x.*", "/set/")
    archive = "memory://set/x.zip"
    for source in (
        f"zip://*.tar::{tmp_path}/x.zip",
        f"simplecache::zip://x.tar::{archive}",
        "simplecache::memory://set/*.tar",
    ):
        assert read_all(source) == [("a", b"png", "one")]
    for link in (
        f"zip://a.png::{tmp_path}/x.zip",
        f"simplecache::zip://a.png::{archive}",
    ):
        assert read_all([{"path": link, "text": "one"}]) == [("0", b"png", "one")]


# === Reading parts ===


CONTENT = bytes(range(256)) * 1000


@pytest.fixture(params=["local", "memory"])
def file(request, tmp_path, memory):
    """The path of a file, local or at an address."""
    if request.param == "local":
        (tmp_path / "a").write_bytes(CONTENT)
        return str(tmp_path / "a")
    memory.pipe("/parts/a", CONTENT)
    return "memory://parts/a"


def test_ranges_are_read_in_the_order_in_which_they_are_wanted(file):
    # Far from each other, next to each other, within and across each other, empty.
    ranges = [(200_000, 200_100), (0, 10), (10, 20), (5, 90), (12, 15), (255_000, None)]
    ranges += [(0, 10), (100, 100), (0, len(CONTENT))]
    rest = [(0, None), (100, 200), (200_000, None), (0, None)]
    for several in (ranges, ranges + rest, []):
        found = files.read_ranges([(file, start, stop) for start, stop in several])
        assert found == [CONTENT[start:stop] for start, stop in several]


def test_ranges_beyond_the_end_and_missing_files_are_errors(file):
    end = len(CONTENT)
    ranges = [(file, end - 5, end + 1), (file, 0, 5), (file + "missing", 0, 5)]
    beyond, first, missing = files.read_ranges(ranges)
    assert isinstance(beyond, EOFError)
    assert f"{file} ends before byte {end + 1}" in str(beyond)
    assert first == CONTENT[:5]
    assert isinstance(missing, FileNotFoundError)


@pytest.fixture
def address(storage, tmp_path):
    """A file in an object store."""
    (tmp_path / "a").write_bytes(CONTENT)
    return f"storage://{tmp_path}/a"


def test_neighbors_are_read_in_one_request(address, storage):
    ranges = [(address, start, start + 90) for start in range(0, 6400, 100)]
    found = files.read_ranges([*ranges[::2], *ranges[1::2]])
    assert found[1] == CONTENT[200:290]
    assert [span for _, *span in storage.requests] == [[0, 6390]]
    files.read_ranges([(address, 0, 10), (address, 10 + files.MAX_GAP + 1, 99_999)])
    assert len(storage.requests) == 3


def test_what_cannot_be_read_is_read_again(address, storage):
    # The clients of object stores have errors of their own.
    storage.errors.extend([RuntimeError("slow down"), OSError("reset")])
    far = [(address, 0, 5), (address, 200_000, 200_005)]
    assert files.read_ranges(far) == [CONTENT[:5], CONTENT[200_000:200_005]]
    assert not storage.errors
    assert len(storage.requests) == 2
    storage.errors.extend([RuntimeError("slow down")] * 10)
    assert "slow down" in str(files.read_ranges(far)[0])


def test_a_range_beyond_the_end_is_requested_once(tmp_path, server):
    (tmp_path / "a").write_bytes(CONTENT)
    (found,) = files.read_ranges([(f"{server.url}/a", len(CONTENT), len(CONTENT) + 9)])
    assert isinstance(found, Exception)
    assert server.sent == [0]


# === Storage that stalls or sends too little ===


@pytest.fixture
def short_wait(monkeypatch):
    monkeypatch.setattr(files, "MAX_WAIT", 0.5)


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_a_request_that_a_server_does_not_answer_in_full_is_sent_again(
    tmp_path, server, short_wait, fault
):
    (tmp_path / "a").write_bytes(CONTENT)
    url, server.faults = f"{server.url}/a", [fault]
    assert files.read_ranges([(url, 0, 5000)]) == [CONTENT[:5000]]
    assert len(server.sent) == 2
    with files.open_file(url) as file:
        server.faults = [fault]
        assert file.read() == CONTENT
    server.faults = [fault] * 9
    if fault == "stall":
        with pytest.raises(TimeoutError, match=f"{url} did not respond within 0.5"):
            files.read_ranges([(url, 0, 5000)])
    else:
        (error,) = files.read_ranges([(url, 0, 5000)])
        assert "/a ends before byte 5000" in str(error)
    # As often as other errors.
    assert len(server.faults) == 9 - 1 - len(files.RETRY_AFTER)


def test_any_storage_that_stalls_is_an_error(address, storage, short_wait, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(storage, "cat_file", lambda *_, **__: released.wait())
    with pytest.raises(TimeoutError, match=f"{address} did not respond"):
        files.read_ranges([(address, 0, 5), (__file__, 0, 5)])
    released.set()


# === Threads ===


def test_closing_waits_for_a_call_in_progress():
    begun, ended = threading.Event(), threading.Event()

    def call():
        begun.set()
        time.sleep(0.2)
        ended.set()

    threads = files.Threads(2)
    threads.submit(call)
    begun.wait()
    threads.shutdown()
    assert ended.is_set()


def test_closing_waits_a_second_at_most_for_calls_that_do_not_end():
    release = threading.Event()
    threads = files.Threads(8)
    for _ in range(8):
        threads.submit(release.wait)
    closing = threading.Thread(target=threads.shutdown, daemon=True)
    closing.start()
    closing.join(4.0)
    assert not closing.is_alive()
    release.set()
