import pytest

from keras_cluster_mask.data import files

pytestmark = pytest.mark.any_backend


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with files.replacing(path) as file:
        file.write(b"all")
        file.flush()
        assert names(path.parent) == [".file.part"]
    assert names(path.parent) == ["file"]
    assert path.read_bytes() == b"all"


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with files.replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_a_name_alone_is_a_file_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.replacing("file") as file:
        file.write(b"all")
    assert names(tmp_path) == ["file"]


def test_files_at_addresses_are_replaced():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        for content in (b"old", b"newer"):
            with files.replacing("memory://replaced/file") as file:
                file.write(content)
            assert memory.cat("/replaced/file") == content
        assert memory.ls("/replaced", detail=False) == ["/replaced/file"]
    finally:
        memory.rm("/replaced", recursive=True)
