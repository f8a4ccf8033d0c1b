"""The bundled images: from a clone, from a server, or an error that says what to do."""

import functools
import hashlib
import http.server
import pathlib
import shutil
import threading

import keras
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import examples

pytestmark = pytest.mark.any_backend

DATASETS = pathlib.Path(__file__).parents[2] / "datasets"


@pytest.fixture
def outside_of_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "REPOSITORY", tmp_path / "site-packages")
    monkeypatch.delenv("KCM_DATA_ORIGIN", raising=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads in place of the user's."""
    folder = tmp_path / "keras"
    folder.mkdir()
    get_file = functools.partial(keras.utils.get_file, cache_dir=str(folder))
    monkeypatch.setattr(keras.utils, "get_file", get_file)
    return folder


@pytest.fixture
def server(tmp_path):
    """A server of a copy of `datasets`: its address, its folder, what it was asked."""
    folder = tmp_path / "served" / "datasets"
    for name in examples.FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DATASETS / name, folder / name)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder.parent)

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/datasets", folder, asked
        running.shutdown()


def test_in_a_clone_it_is_the_folder_of_the_clone():
    assert kcm.data.example_images() == DATASETS / "images"
    assert len(kcm.data.list_shards(DATASETS / "images" / "train-*.tar")) == 4


def test_the_hashes_are_those_of_the_files_of_the_repository():
    for name, sha256 in examples.FILES.items():
        content = (DATASETS / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
    bundled = [*DATASETS.glob("images/*.tar"), *DATASETS.glob("photographs/*.jpg")]
    assert {path.relative_to(DATASETS).as_posix() for path in bundled} == {
        *examples.FILES
    }


@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.usefixtures("outside_of_a_clone")
def test_elsewhere_it_downloads_every_file_once(
    by_variable, server, cache, monkeypatch
):
    address, _, asked = server
    if by_variable:
        monkeypatch.setenv("KCM_DATA_ORIGIN", address)
    for _ in range(2):
        folder = kcm.data.example_images(None if by_variable else f"{address}/")
        assert folder.is_relative_to(cache)
    for name in examples.FILES:
        found = (folder.parent / name).read_bytes()
        assert found == (DATASETS / name).read_bytes()
    assert sorted(asked) == sorted(f"/datasets/{name}" for name in examples.FILES)
    assert len(kcm.data.read_captions(folder / "test-*.tar")) == 346


def test_an_origin_is_used_in_a_clone_too(server, cache):
    assert kcm.data.example_images(server[0]).is_relative_to(cache)


def test_a_file_that_differs_is_refused(server):
    address, folder, _ = server
    with open(folder / "images" / "train-00002.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"train-00002.tar differs.*Received: origin="):
        kcm.data.example_images(address)


def test_a_file_that_is_missing_is_named(server):
    address, folder, _ = server
    (folder / "photographs" / "rocket.jpg").unlink()
    with pytest.raises(OSError, match=r"rocket.jpg: 404 .*Received: origin='http.*'$"):
        kcm.data.example_images(address)


def test_an_origin_that_is_no_address_is_refused():
    with pytest.raises(ValueError, match=r"Received: origin='datasets'$"):
        kcm.data.example_images("datasets")


@pytest.mark.usefixtures("outside_of_a_clone")
def test_without_clone_and_address_the_error_names_both_remedies():
    with pytest.raises(FileNotFoundError) as error:
        kcm.data.example_images()
    message = str(error.value)
    assert "install from a clone" in message
    assert "KCM_DATA_ORIGIN" in message
    assert message.endswith("Received: origin=None")
