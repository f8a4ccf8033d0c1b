import pytest

from keras_cluster_mask.data import files


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
    with files.replacing("file", durable=False) as file:
        file.write(b"all")
    assert names(tmp_path) == ["file"]


def test_files_at_addresses_are_replaced_and_told_apart():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    address = "memory://replaced/file"
    try:
        prints = []
        for content in (b"old", b"newer", b"newer"):
            with files.replacing(address) as file:
                file.write(content)
            assert memory.cat("/replaced/file") == content
            prints.append(files.fingerprint(address))
        assert len(set(map(tuple, prints))) == 3
        assert memory.ls("/replaced", detail=False) == ["/replaced/file"]
    finally:
        memory.rm("/replaced", recursive=True)


def test_a_file_is_told_from_another_of_its_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    before = files.fingerprint(path)
    assert files.fingerprint(path) == before
    path.write_bytes(b"two")
    assert files.fingerprint(path) != before
